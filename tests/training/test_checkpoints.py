import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_train import Project, example

from stages.files import sha256_of, sha256_of_file, write_json
from stages.records import write_records
from stages.training.checkpoints import SUMS, epochs_of, is_whole, last_checkpoint, sums_of

# five steps in an epoch: neither the end of an epoch nor an entry of the log falls on a checkpoint
SETTINGS: dict[str, Any] = {"max_steps": 24, "save_steps": 4, "logging_steps": 3, "eval_steps": 12, "lora_dropout": 0.1}


def project(folder: Path, base: Path) -> Project:
    made = Project(folder, base, **SETTINGS)
    write_records(made.train, [example(f"e{n}", f"What is {n} times {n}?", "It is " + f"{n * n} " * n) for n in range(1, 11)])
    return made


def wait_until(there: Callable[[], bool], child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill(child: subprocess.Popen[str]) -> str:
    """What the child had said when it was killed."""
    child.send_signal(signal.SIGKILL)
    said, _ = child.communicate()
    assert child.returncode == -signal.SIGKILL
    return said


def test_a_run_killed_in_mid_save_and_in_mid_step_ends_like_one_that_was_never_stopped(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = project(tmp_path / "whole", tiny_folder), project(tmp_path / "killed", tiny_folder)
    killed.tracking = whole.tracking
    said, complaints = (child := whole.start()).communicate(timeout=120)
    assert child.returncode == 0 and "resumes" not in said, complaints
    rows = (whole.curves / "train.csv").read_text()
    assert list(whole.losses("train")) == [3, 4, 6, 8, 9, 12, 15, 16, 18, 20, 21, 24]

    child = killed.start()
    wait_until((killed.checkpoints / "checkpoint-4").is_dir, child)
    saved = killed.checkpoints / "checkpoint-8"
    saved.mkdir()
    os.mkfifo(saved / "optimizer.pt")  # nobody reads it: the save stops there, after the weights
    wait_until((saved / "adapter_model.safetensors").is_file, child)
    time.sleep(0.2)
    assert not (saved / "trainer_state.json").exists()
    assert kill(child).count("resumes") == 0
    assert is_whole(killed.checkpoints / "checkpoint-4") and not is_whole(saved)

    child = killed.start()
    wait_until((killed.checkpoints / "checkpoint-12" / SUMS).is_file, child)
    assert "train: resumes from " in kill(child).replace(f"{killed.checkpoints}/checkpoint-4\n", "")
    assert not killed.adapter.exists()

    child = killed.start()
    said, complaints = child.communicate(timeout=120)
    assert child.returncode == 0, complaints
    assert said.count("train: resumes from ") == 1 and "train: 24 steps" in said, said
    assert (killed.curves / "train.csv").read_text() == rows
    assert sha256_of(killed.adapter) == sha256_of(whole.adapter)
    assert not killed.checkpoints.exists()

    import mlflow

    client = mlflow.MlflowClient(killed.tracking.uri)
    runs = client.search_runs([client.get_experiment_by_name("test").experiment_id], order_by=["attributes.start_time"])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]  # one for each, however often it was killed
    curves = [[(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train_loss")] for run in runs]
    assert curves[0] == curves[1]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Two checkpoints of the fingerprint "one", after 4 and after 12 steps."""
    folder = tmp_path / "checkpoints"
    assert last_checkpoint(folder, "one") is None
    for step in (4, 12):
        one = folder / f"checkpoint-{step}"
        one.mkdir()
        (one / "trainer_state.json").write_text(f'{{"epoch": {step / 8}}}')
        (one / "adapter_model.safetensors").write_bytes(b"weights" * step)
        (one / "optimizer.pt").write_bytes(b"moments" * step)
        write_json(one / SUMS, sums_of(one))
    return folder


def test_the_last_checkpoint_is_that_of_the_highest_step(checkpoints: Path) -> None:
    found = last_checkpoint(checkpoints, "one")
    assert found == str(checkpoints / "checkpoint-12")
    assert epochs_of(Path(found)) == 1.5


@pytest.mark.parametrize("name", ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt", SUMS])
@pytest.mark.parametrize("harm", ["cut", "lost", "flipped"])
def test_a_checkpoint_with_a_harmed_file_gives_way_to_the_one_before(name: str, harm: str, checkpoints: Path) -> None:
    file = checkpoints / "checkpoint-12" / name
    content = file.read_bytes()
    if harm == "lost":
        file.unlink()
    else:
        file.write_bytes(content[:-9] if harm == "cut" else content[:-2] + b"x" + content[-1:])
    assert last_checkpoint(checkpoints, "one") == str(checkpoints / "checkpoint-4")
    assert not file.parent.exists()


def test_checkpoints_of_other_settings_are_removed(checkpoints: Path) -> None:
    assert last_checkpoint(checkpoints, "two") is None
    assert [path.name for path in checkpoints.iterdir()] == ["fingerprint"]
    assert last_checkpoint(checkpoints, "one") is None


def test_the_sums_of_a_checkpoint_leave_themselves_out(checkpoints: Path) -> None:
    one = checkpoints / "checkpoint-4"
    assert sums_of(one)["optimizer.pt"] == sha256_of_file(one / "optimizer.pt")
    assert len(sums_of(one)) == 3
