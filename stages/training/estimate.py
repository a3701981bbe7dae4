"""How long training takes and how much memory: by a short probe before it, and by a bar while it runs."""

import math
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from stages.models.memory import memory
from stages.program import progress
from stages.training.batches import Tokens

PROBED_STEPS = 3  # the first warms up


def estimate_of(trainer: Any, rows: Sequence[Tokens]) -> str:
    """What trainer.train() would take, in a line: from steps on a typical batch and on the longest, and an evaluation.

    Afterwards the model of `trainer` is of no use.
    """
    _, per_epoch, _, _, batch, _, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    by_length = sorted(rows, key=lambda row: len(row.input_ids))
    middle = max(len(rows) - batch, 0) // 2
    tokens = sum(len(row.input_ids) for row in rows) * steps / per_epoch
    pace = seconds_per_token(trainer, by_length[middle : middle + batch])
    seconds_per_token(trainer, by_length[-batch:])  # for its memory
    started = time.monotonic()
    trainer.evaluate()
    evaluations = math.ceil(steps / trainer.args.eval_steps)
    seconds = tokens * pace + evaluations * (time.monotonic() - started)
    there = memory()
    return (
        f"{steps} steps of {batch} examples, {tokens:,.0f} tokens, about {seconds / 60:.1f} min on this machine "
        f"({1 / pace:,.0f} tokens/s, {evaluations} evaluations), {peak_memory() / 1e9:.1f} GB at the peak; {there.line()}"
    )


def seconds_per_token(trainer: Any, rows: Sequence[Tokens]) -> float:
    """Of training steps on the one batch `rows`, which are really done, without a checkpoint."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    ends = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.monotonic())

    clock = Clock()
    trainer.add_callback(clock)
    trainer.args.save_strategy = trainer.args.eval_strategy = "no"
    trainer.args.max_steps = PROBED_STEPS
    trainer.train_dataset = Dataset.from_list([msgspec.to_builtins(row) for row in rows])
    trainer.train()
    trainer.remove_callback(clock)
    return (ends[-1] - ends[0]) / (len(ends) - 1) / sum(len(row.input_ids) for row in rows)


def peak_memory() -> int:
    """The most bytes that this process has held: of the GPU where there is one, else of memory."""
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bar() -> Any:
    """A trainer callback that shows the steps done, with ETA and the last loss, until it is closed."""
    from transformers import TrainerCallback

    class Bar(TrainerCallback):  # type: ignore[misc]
        shown: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                self.shown = progress(None, "train", state.max_steps, "step", done=state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.shown is not None:
                self.shown.update()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if self.shown is not None and logs and "loss" in logs:
                self.shown.set_postfix(loss=f"{logs['loss']:.3f}")

        def close(self) -> None:
            if self.shown is not None:
                self.shown.close()

    return Bar()
