import csv
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import yaml
from conftest import CHAT
from test_train import but

from stages.params import Models, Tracking
from stages.program import BadParams, LimitBroken
from stages.records import Example, Message, write_records
from stages.train import main
from stages.training.ranks import RESTARTS

TRAIN = but(max_steps=12, per_device_train_batch_size=4, eval_steps=12, save_steps=4)
# the stage in fp32: what the file changes is changed in each process, for each reads it again
STAGE = """
import stages.train
stages.train.has_bf16 = lambda: False
if __name__ == "__main__":
    stages.train.run(stages.train.main)
"""
FILES = ("train.jsonl", "dev.jsonl", "checkpoints", "adapter", "curves", "train.json")


def conversation(number: int) -> Example:
    """One with an answer of 1 to 25 words, so that shares of a batch differ."""
    answer = " ".join(f"word{number * 7 + place}" for place in range(1 + number * number % 25))
    messages = (Message("user", f"What is {number}?"), Message("assistant", answer))
    return Example(id=str(number), pair_ids=(str(number),), document_id="d", messages=messages)


class Stage:
    """A folder with a project, where the stage runs as a program of its own."""

    def __init__(self, folder: Path, base: Path, database: Path | None = None, **changes: Any) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / ".dvc").mkdir()  # there is a lock
        if database is not None:
            shutil.copy(database, folder / "mlflow.db")
        write_records(folder / "train.jsonl", [conversation(number) for number in range(10)])  # steps of 4, 4 and 2
        write_records(folder / "dev.jsonl", [conversation(11)])
        (folder / "stage.py").write_text(STAGE)
        self.sections = {
            "train": msgspec.structs.replace(TRAIN, **changes),
            "models": Models(base=str(base), teacher="", embedder=""),
            "chat": CHAT,
            "tracking": Tracking(uri="sqlite:///mlflow.db", experiment="test", model_name="test"),
        }
        (folder / "params.yaml").write_text(yaml.safe_dump(msgspec.to_builtins(self.sections)))

    def start(self, **environment: str) -> "subprocess.Popen[str]":
        path = os.pathsep.join([os.getcwd(), *sys.path])
        return subprocess.Popen(
            [sys.executable, "stage.py", *FILES],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self) -> "Stage":
        running = self.start()
        self.said, complaints = running.communicate(timeout=300)
        assert running.returncode == 0, complaints
        return self

    def wait_for(self, running: "subprocess.Popen[str]", step: int) -> list[psutil.Process]:
        """The processes of the training, when the checkpoint of `step` or a later one is there."""
        deadline = time.monotonic() + 300
        while not any(
            int(state.parent.name.rpartition("-")[2]) >= step
            for state in (self.folder / "checkpoints").glob("checkpoint-*/trainer_state.json")
        ):
            assert running.poll() is None, running.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        ranks = [one for one in psutil.Process(running.pid).children() if "spawn_main" in " ".join(one.cmdline())]
        assert len(ranks) == 2
        return ranks

    def losses(self) -> list[float]:
        with (self.folder / "curves/train.csv").open() as curve:
            rows = list(csv.DictReader(curve))
        assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
        return [float(row["loss"]) for row in rows]

    def adapter(self) -> dict[str, Any]:
        from safetensors.torch import load_file

        return dict(load_file(self.folder / "adapter/adapter_model.safetensors"))


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A run of one process, with batches of four."""
    return Stage(tmp_path_factory.mktemp("alone") / "project", tiny_folder).run()


def assert_same(one: Stage, other: Stage) -> None:
    import torch

    losses = one.losses()
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.05
    assert other.losses() == pytest.approx(losses, rel=2e-5)
    weights = other.adapter()
    for name, weight in one.adapter().items():
        assert torch.allclose(weights[name], weight, atol=1e-3), name
    assert max(weight.abs().max() for name, weight in weights.items() if "lora_B" in name) > 0.02


def test_two_processes_learn_what_one_learns_with_the_same_batch_and_a_killed_one_changes_nothing(
    alone: Stage, tiny_folder: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path / "project", tiny_folder, alone.folder / "mlflow.db", processes=2, per_device_train_batch_size=2)
    running = stage.start()
    stage.wait_for(running, 4)[1].kill()  # in the second epoch, of three steps each
    said, complaints = running.communicate(timeout=300)
    assert running.returncode == 0, complaints
    assert f"a process was lost; all start again (1 of {RESTARTS} times)" in said
    assert "train: resumes from checkpoints/checkpoint-" in said
    assert said.count("train: 12 steps") == 1
    assert_same(alone, stage)


def test_accumulated_batches_of_two_processes_give_the_steps_of_one_large_batch(
    alone: Stage, tiny_folder: Path, tmp_path: Path
) -> None:
    changes = {"processes": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert_same(alone, Stage(tmp_path / "project", tiny_folder, alone.folder / "mlflow.db", **changes).run())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_stage_leaves_no_process_behind_and_none_listened_beyond_loopback(
    number: signal.Signals, alone: Stage, tiny_folder: Path, tmp_path: Path
) -> None:
    changes = {"processes": 2, "per_device_train_batch_size": 2, "max_steps": 5000, "save_steps": 1, "eval_steps": 5000}
    stage = Stage(tmp_path / "project", tiny_folder, alone.folder / "mlflow.db", **changes)
    running = stage.start()
    ranks = stage.wait_for(running, 1)
    sockets = [one for process in (psutil.Process(running.pid), *ranks) for one in process.net_connections("inet")]
    assert sockets and {one.laddr.ip for one in sockets} == {"127.0.0.1"}
    running.send_signal(number)
    running.communicate(timeout=60)
    assert running.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive


def test_processes_that_another_launcher_started_join_and_the_first_alone_writes(
    alone: Stage, tiny_folder: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path / "project", tiny_folder, alone.folder / "mlflow.db", per_device_train_batch_size=2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    both = [stage.start(**place, RANK=rank, LOCAL_RANK=rank, GLOO_SOCKET_IFNAME="lo") for rank in ("0", "1")]
    said = [running.communicate(timeout=300) for running in both]
    assert [running.returncode for running in both] == [0, 0], said
    assert said[0][0].startswith("train: 12 steps") and said[1][0] == ""
    assert_same(alone, stage)


def test_what_a_person_has_to_answer_is_raised_at_once(
    alone: Stage, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stage = Stage(tmp_path / "project", tiny_folder, alone.folder / "mlflow.db", processes=2, max_length=8)
    monkeypatch.chdir(stage.folder)
    with pytest.raises(LimitBroken, match=r"train\.max_length is 8"):
        main(*map(Path, FILES), **stage.sections)  # type: ignore[arg-type]
    (stage.folder / "dev.jsonl").unlink()
    with pytest.raises(FileNotFoundError) as missing:
        main(*map(Path, FILES), **stage.sections)  # type: ignore[arg-type]
    assert missing.value.filename == "dev.jsonl"
    assert capfd.readouterr() == ("", "")


def test_unsloth_in_several_processes_is_one_line_that_names_trl(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "project", tmp_path, processes=2, engine="unsloth")
    with pytest.raises(BadParams, match=r"unsloth.* set it to trl, or train\.processes to 1$"):
        main(*map(Path, FILES), **stage.sections)  # type: ignore[arg-type]


def test_a_batch_is_dealt_out_whole_evenly_and_in_parts_that_fit() -> None:
    from stages.training.shared import deal

    assert deal(range(8), 2, 2) == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    assert deal(range(5), 2, 2) == [[[0, 2], [4]], [[1], [3]]]
    assert deal([7], 3, 2) == [[[7]], [[7]]]
    assert deal(range(3), 4, 1) == [[[0, 1, 2]]]
    for count, size, ranks in itertools.product(range(1, 20), range(2, 5), range(1, 4)):
        parts = deal(range(count), size, ranks)
        assert len({len(one) for one in parts}) == 1 and len(parts) == ranks
        flat = [part for one in parts for part in one]
        assert all(0 < len(part) <= size for part in flat)
        dealt = sorted(item for part in flat for item in part)
        assert dealt == list(range(count)) if count >= ranks else set(dealt) == set(range(count))
