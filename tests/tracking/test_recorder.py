"""What a training tells MLflow arrives once, whatever happens to the store: a real `mlflow server`, and real faults before it."""

import contextlib
import resource
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import Server, free_port
from test_train import Project

from stages.params import Tracking
from stages.tracking import client_of, experiment_of, recorder, without_secrets
from stages.tracking.recorder import Recorder, recording


class Fault:
    """A loopback server that hands requests to the server at `port`, except those that `plan` numbers: "500", "lost answer", "slow"."""

    def __init__(self, port: int) -> None:
        self.port, self.plan, self.served = port, dict[int, str](), 0
        self.stopped = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def always(self, fault: str) -> None:
        self.plan = {number: fault for number in range(1000)}

    def close(self) -> None:
        self.stopped.set()
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                if not (more := client.recv(65536)):
                    return
                request += more
            head, _, body = request.partition(b"\r\n\r\n")
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
            (length,) = [int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:")] or [0]
            while len(body) < length:
                body += client.recv(65536)
            fault, self.served = self.plan.get(self.served, ""), self.served + 1
            if fault == "500":
                client.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\nConnection: close\r\n\r\nsick")
                return
            if fault == "slow":
                self.stopped.wait(30)
                return
            with socket.create_connection(("127.0.0.1", self.port)) as server:
                server.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
                answer = b""
                while more := server.recv(65536):
                    answer += more
            if fault != "lost answer":
                client.sendall(answer)


@pytest.fixture
def fault(server: Server) -> Iterator[Fault]:
    started = Fault(server.port)
    yield started
    started.close()


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recorder, "INTERVAL_S", 0.05)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def store(fresh_store: Path, project: Path) -> Tracking:
    """An empty SQLite store of the test's own."""
    shutil.copy(fresh_store, project / "mlflow.db")
    return at(f"sqlite:///{project}/mlflow.db", "test")


def at(uri: str, experiment: str) -> Tracking:
    return Tracking(uri=uri, experiment=experiment, model_name="test")


def dead() -> str:
    return f"http://127.0.0.1:{free_port()}"


def runs(tracking: Tracking) -> dict[str, Any]:
    """The runs of the experiment by name; fails where two have one name."""
    client = client_of(tracking.uri)
    experiment = client.get_experiment_by_name(tracking.experiment)
    found = client.search_runs([experiment.experiment_id]) if experiment else []
    assert len({run.info.run_name for run in found}) == len(found), [run.info.run_name for run in found]
    return {run.info.run_name: run for run in found}


def history(tracking: Tracking, run: Any, name: str) -> list[tuple[int, float]]:
    points = client_of(tracking.uri).get_metric_history(run.info.run_id, name)
    return [(point.step, point.value) for point in points]


def unsent() -> list[str]:
    return sorted(path.name for path in Path("models/unsent").glob("*"))


def wait_until(is_true: Any) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stop(stopped: Recorder) -> None:
    """Leaves `stopped` as SIGKILL does: no end is written, and its file is free."""
    stopped._is_ending.set()
    stopped._thread.join()
    assert stopped._file
    stopped._file.close()


# faults


def test_points_arrive_once_when_the_server_is_killed_and_started_again(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = at(server.uri, "killed")
    with recording(tracking, "first", resumes=False) as first:
        first.points({"train_loss": 4.0}, 1)
        wait_until(lambda: first._sent == 2)
        server.kill()
        first.points({"train_loss": 3.0}, 2)
    assert "next training sends it" in first.outcome and first.run_id
    assert [name.rpartition("-")[0] for name in unsent()] == ["first"]
    with recording(tracking, "second", resumes=False) as second:
        second.points({"train_loss": 2.0}, 1)
        server.start()
        wait_until(lambda: not any(name.startswith("first") for name in unsent()))
    assert second.outcome == f"MLflow run {second.run_id}"
    found = runs(tracking)
    assert {name: run.info.status for name, run in found.items()} == {"first": "FINISHED", "second": "FINISHED"}
    assert history(tracking, found["first"], "train_loss") == [(1, 4.0), (2, 3.0)]
    assert history(tracking, found["second"], "train_loss") == [(1, 2.0)]
    assert unsent() == []
    assert capsys.readouterr().out.count(" fails: ") == 2  # once for each training, however often it was tried


@pytest.mark.parametrize("kind", ["500", "lost answer"])
def test_whichever_request_fails_there_is_one_run_with_each_point_once(kind: str, fault: Fault) -> None:
    for number in range(12):
        tracking = at(fault.uri, f"{kind} {number}")
        fault.plan, fault.served = {number: kind}, 0
        with recording(tracking, "run", resumes=False) as kept:
            kept.note(params={"cfg.r": 4}, datasets=[("train", "train.jsonl", "0123", "training")])
            kept.points({"train_loss": 4.0, "dev_loss": 5.0}, 1)
        assert fault.served > number or number > 9
        fault.plan = {}
        with recording(tracking, "next", resumes=False):
            pass
        run = runs(tracking)["run"]
        assert (run.info.status, run.data.params["cfg.r"]) == ("FINISHED", "4")
        assert [entry.dataset.digest for entry in run.inputs.dataset_inputs] == ["0123"]
        assert [history(tracking, run, name) for name in ("train_loss", "dev_loss")] == [[(1, 4.0)], [(1, 5.0)]]
        assert unsent() == []


def test_a_slow_server_holds_nothing_up(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "WAIT_S", 0.3)
    fault.always("slow")
    tracking = at(fault.uri, "slow")
    began = time.monotonic()
    with recording(tracking, "run", resumes=False) as kept:
        for step in range(200):
            kept.points({"train_loss": step}, step)
    assert time.monotonic() - began < 5  # and not 30
    assert (kept.run_id, kept._sent) == ("", 0)
    assert len(unsent()) == 1
    monkeypatch.setattr(recorder, "WAIT_S", 30.0)
    fault.plan = {}
    with recording(tracking, "next", resumes=False):
        pass
    assert history(tracking, runs(tracking)["run"], "train_loss") == [(step, float(step)) for step in range(200)]


def test_a_full_disk_under_the_store_loses_nothing(store: Tracking, project: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((project / "mlflow.db").stat().st_size, before[1]))
    try:
        with recording(store, "run", resumes=False) as kept:
            for step in range(3000):
                kept.points({"train_loss": 1 / (step + 1)}, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "next training sends it" in kept.outcome
    with recording(store, "next", resumes=False):
        pass
    assert history(store, runs(store)["run"], "train_loss") == [(step, 1 / (step + 1)) for step in range(3000)]
    assert unsent() == []


def test_where_no_file_can_be_kept_mlflow_still_gets_the_points(
    store: Tracking, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "models").write_text("in the way")
    with recording(store, "run", resumes=False) as kept:
        kept.points({"train_loss": 4.0}, 1)
    assert kept.outcome == f"MLflow run {kept.run_id}"
    assert history(store, runs(store)["run"], "train_loss") == [(1, 4.0)]
    assert capsys.readouterr().out.count("is lost") == 1
    with recording(at(dead(), "test"), "run", resumes=False) as lost:
        pass
    assert "could not be written" in lost.outcome


def test_a_training_goes_on_while_the_server_is_down_and_the_next_one_sends_both(
    tiny_folder: Path, project: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Project(project, tiny_folder)
    first.tracking = at(f"http://me:secret@127.0.0.1:{free_port()}", "trained")
    metrics = first.run()
    assert (metrics["mlflow_run_id"], metrics["steps"]) == ("", 3)
    assert first.adapter.is_dir()
    (kept,) = unsent()
    said = capsys.readouterr()
    assert kept in said.out.splitlines()[-1]
    assert "secret" not in said.out + said.err
    first.tracking = at(server.uri, "trained")
    first.settings = Project(project, tiny_folder, seed=2).settings
    again = first.run()
    found = {run.info.run_id: run for run in runs(first.tracking).values()}
    assert len(found) == 2
    (earlier,) = (run for run_id, run in found.items() if run_id != again["mlflow_run_id"])
    for run in found.values():
        assert [step for step, _ in history(first.tracking, run, "train_loss")] == [1, 2, 3]
        assert run.info.status == "FINISHED"
    assert earlier.data.metrics["final.dev_loss"] == metrics["dev_loss"] != again["dev_loss"]
    assert unsent() == []


# trainings that stop


def test_a_resumed_training_continues_its_run_and_computes_no_point_twice(store: Tracking) -> None:
    stopped = Recorder(store, "run", resumes=False)
    stopped.points({"train_loss": 4.0}, 1)
    stopped.points({"train_loss": 3.0}, 2)
    stop(stopped)
    with open(stopped._path, "ab") as file:
        file.write(b'{"points": [["train_lo')  # the kill came in the middle of a line
    with recording(store, "run", resumes=True) as resumed:
        resumed.points({"train_loss": 3.5}, 2)
        resumed.points({"train_loss": 2.0}, 3)
    assert resumed.run_id == stopped.run_id
    run = runs(store)["run"]
    assert history(store, run, "train_loss") == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert run.info.status == "FINISHED"
    assert unsent() == []


def test_a_stopped_training_that_nobody_resumes_is_shown_as_killed(store: Tracking) -> None:
    killed = Recorder(store, "run", resumes=False)
    killed.note(params={"cfg.target_modules": ("q_proj", "v_proj")})
    wait_until(lambda: killed.run_id)
    stop(killed)
    assert runs(store)["run"].data.params == {"cfg.target_modules": "['q_proj', 'v_proj']"}
    with recording(store, "other", resumes=True) as other:
        pass
    assert {name: run.info.status for name, run in runs(store).items()} == {"run": "KILLED", "other": "FINISHED"}
    assert other.run_id == runs(store)["other"].info.run_id
    assert unsent() == []


def test_an_interrupted_and_a_failed_training_say_so_and_can_be_resumed(store: Tracking) -> None:
    for error, status in ((KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")):
        with contextlib.suppress(error), recording(store, status, resumes=False) as stopped:
            raise error
        assert runs(store)[status].info.status == status
        with recording(store, status, resumes=True) as resumed:
            wait_until(lambda: resumed._sent)
            assert runs(store)[status].info.status == "RUNNING"
        assert resumed.run_id == stopped.run_id
        assert runs(store)[status].info.status == "FINISHED"


def test_what_a_training_at_work_keeps_is_not_touched(store: Tracking) -> None:
    with recording(at(dead(), "test"), "first", resumes=False) as first:
        with recording(store, "first", resumes=True) as second:
            second.points({"train_loss": 1.0}, 1)
        assert unsent() == [first._path.name]
    assert list(runs(store)) == ["first"]


# what is recorded


def test_the_runs_of_a_sweep_are_nested_in_one_run(store: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "0123456789abcdef")
    for name in ("low", "high"):
        monkeypatch.setenv("DVC_EXP_NAME", f"{name}-rate")
        with recording(store, name, resumes=False):
            pass
    found = runs(store)
    assert set(found) == {"sweep-01234567", "low", "high"}
    parent = found["sweep-01234567"].info
    assert parent.status == "FINISHED"
    assert {found[name].data.tags["mlflow.parentRunId"] for name in ("low", "high")} == {parent.run_id}
    assert Counter(run.data.tags.get("dvc.experiment") for run in found.values()) == {None: 1, "low-rate": 1, "high-rate": 1}


def test_a_queued_experiment_uses_the_store_of_the_project_not_of_its_copy(
    fresh_store: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = project / ".dvc/tmp/exps/one"
    copy.mkdir(parents=True)
    (project / "models").mkdir()
    shutil.copy(fresh_store, project / "models/mlflow.db")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(project))
    tracking = at("sqlite:///models/mlflow.db", "test")
    with recording(tracking, "run", resumes=False) as kept:
        assert (project / "models/unsent" / kept._path.name).is_file()
    assert list(copy.iterdir()) == []
    assert list(runs(at(f"sqlite:///{project}/models/mlflow.db", "test"))) == ["run"]


def test_lines_show_no_password() -> None:
    told = (
        "API request to http://me:p@ss@host:5000/api?token=x failed; postgresql://me:secret@host/db?password=y is not http://a/b"
    )
    assert without_secrets(told) == ("API request to http://host:5000/api failed; postgresql://host/db is not http://a/b")


def test_an_experiment_that_another_process_makes_at_the_same_moment_is_used(
    store: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(store.uri)
    look = client.get_experiment_by_name
    made: list[str] = []

    def look_just_before_another_makes_it(name: str) -> Any:
        found = look(name)
        if not made:
            made.append(client.create_experiment(name))
        return found

    monkeypatch.setattr(client, "get_experiment_by_name", look_just_before_another_makes_it)
    assert experiment_of(client, "shared") == made[0]
