"""Checkpoints: a training that was killed at any moment goes on from the last whole one, as if it had never stopped."""

import shutil
from pathlib import Path
from typing import Any

import msgspec

from stages.files import sha256_of_file, write_json, write_text

SUMS = "sha256.json"  # written last: transformers itself leaves no sign that a checkpoint is whole


def last_checkpoint(checkpoints: Path, fingerprint: str) -> str | None:
    """The checkpoint to resume from. Those of other data or settings, half-written ones and damaged ones are removed first."""
    mark = checkpoints / "fingerprint"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != fingerprint:
        shutil.rmtree(checkpoints, ignore_errors=True)
        write_text(mark, fingerprint)
    whole = []
    for folder in checkpoints.glob("checkpoint-*"):
        if is_whole(folder):
            whole.append(folder)
        else:
            shutil.rmtree(folder)
    return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]))) if whole else None


def epochs_of(checkpoint: Path) -> float:
    """How many epochs were done when `checkpoint` was written."""
    return float(msgspec.json.decode((checkpoint / "trainer_state.json").read_bytes())["epoch"])


def is_whole(checkpoint: Path) -> bool:
    """Whether `checkpoint` was written to its end, and is still what was written."""
    try:
        written = msgspec.json.decode((checkpoint / SUMS).read_bytes())
    except (FileNotFoundError, msgspec.DecodeError):
        return False
    return bool(written == sums_of(checkpoint))


def sums_of(checkpoint: Path) -> dict[str, str]:
    """File name -> SHA-256."""
    return {path.name: sha256_of_file(path) for path in checkpoint.iterdir() if path.is_file() and path.name != SUMS}


def resumable() -> Any:
    """A trainer callback that makes checkpoints whole, and the curve after them the one of a run without a stop.

    transformers restores weights, optimizer, schedule, random numbers and the log, but not the losses since the log's last entry.
    """
    from accelerate import PartialState
    from transformers import TrainerCallback

    class Resumable(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_log |= control.should_save

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            PartialState().wait_for_everyone()  # each process writes its random numbers
            if state.is_world_process_zero:
                checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                write_json(checkpoint / SUMS, sums_of(checkpoint))

    return Resumable()
