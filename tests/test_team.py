"""team: data, runs and models that two people share, on a real PostgreSQL, MLflow server and S3-compatible server."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Finished
from mlflow_server import free_port
from small_project import IDENTITY, call, succeed

from stages import team
from stages.files import write_json
from stages.pages import read_figures

TEAM = (sys.executable, "-m", "stages.team")
PROMOTE = (sys.executable, "-m", "stages.promote")
KEYS = {"AWS_ACCESS_KEY_ID": "docsmith", "AWS_SECRET_ACCESS_KEY": "of-the-test"}
REPOSITORY = Path(__file__).parents[1]


class Store(NamedTuple):
    """Where the team's servers keep their data, and where MLflow answers."""

    folder: Path
    port: int

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> Any:
        import mlflow

        return mlflow.MlflowClient(self.uri, self.uri)

    def says(self, action: str) -> str:
        return succeed(REPOSITORY, *TEAM, action, "--folder", str(self.folder), "--port", str(self.port))


class People(NamedTuple):
    """The clones of two people who share a DVC remote and an MLflow server, and nothing else."""

    first: Path
    second: Path


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder that PostgreSQL's user can enter, as it cannot enter tmp_path where root runs the tests; its path is short."""
    with tempfile.TemporaryDirectory(prefix="docsmith-team-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """The servers of `make team-up`, in a folder where an earlier one was killed while it made the database."""
    with shared_folder() as folder:
        (folder / "team/database.new/base").mkdir(parents=True)
        (folder / "team").chmod(0o711)
        made = Store(folder / "team", free_port())
        try:
            assert f"MLflow answers at {made.uri}" in made.says("up")
            yield made
        finally:
            team.down(made.folder)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A server that speaks S3, with the bucket `docs`."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while True:
            bucket = urllib.request.Request(f"http://127.0.0.1:{port}/docs", method="PUT")
            with contextlib.suppress(OSError), urllib.request.urlopen(bucket, timeout=10):
                break
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def stages_in(said: str) -> list[str]:
    """The stages that `dvc repro` says it ran."""
    return re.findall("^Running stage '(.*)'", said, re.MULTILINE)


@pytest.fixture(scope="module")
def people(finished: Finished, s3: str, store: Store, tmp_path_factory: pytest.TempPathFactory) -> People:
    """What docs/team/store.md says, done by two people: the first one pushes a run, the second one clones and pulls it."""
    root = tmp_path_factory.mktemp("people")
    first, second = root / "first", root / "second"
    succeed(root, "git", "clone", "--quiet", str(finished.git_remote), str(first))
    succeed(first, "dvc", "pull", "--quiet")
    succeed(first, "dvc", "remote", "add", "--quiet", "--default", "team", "s3://docs/dvc")
    succeed(first, "dvc", "remote", "modify", "team", "endpointurl", s3)
    succeed(first, "dvc", "remote", "modify", "team", "read_timeout", "300")
    for name, value in KEYS.items():
        succeed(first, "dvc", "remote", "modify", "--local", "team", name.lower().removeprefix("aws_"), value)
    params = first / "params.yaml"
    told = params.read_text(encoding="utf-8").replace("uri: sqlite:///models/mlflow.db", f"uri: {store.uri}")
    params.write_text(told, encoding="utf-8")
    assert stages_in(succeed(first, "dvc", "repro")) == ["dataset", "report"]  # which show params.yaml
    succeed(first, "dvc", "push", "--quiet")
    succeed(first, "git", "commit", "--quiet", "--all", "--message", "Share data and runs")
    succeed(root, "git", "clone", "--quiet", str(first), str(second))
    succeed(second, "dvc", "pull", "--quiet", **KEYS)
    succeed(second, "cp", "-r", str(finished.project / "models/cache"), "models")  # the base model, converted once
    return People(first, second)


def test_a_fresh_clone_gets_a_colleagues_run_from_s3_and_has_nothing_to_run(people: People) -> None:
    assert stages_in(succeed(people.second, "dvc", "repro")) == []
    assert "up to date" in succeed(people.second, "dvc", "status")
    assert succeed(people.second, "git", "status", "--porcelain") == ""
    name = "models/gguf/docsmith-q8_0.gguf"
    assert (people.second / name).read_bytes() == (people.first / name).read_bytes()


def test_the_keys_of_the_bucket_are_not_in_git(people: People) -> None:
    (kept,) = (line for line in (people.first / ".dvc/config.local").read_text().splitlines() if "secret_access_key" in line)
    assert kept.split(" = ")[1] == KEYS["AWS_SECRET_ACCESS_KEY"]
    assert call(people.first, "git", "grep", KEYS["AWS_SECRET_ACCESS_KEY"]).returncode == 1
    assert "endpointurl" in succeed(people.second, "git", "show", "HEAD:.dvc/config")


def test_a_promotion_keeps_the_scores_and_answers_on_the_server(people: People, store: Store) -> None:
    assert "version 1 is challenger" in succeed(people.first, *PROMOTE)
    client = store.client()
    version = client.get_model_version("docsmith", "1")
    assert version.tags["similarity.recall"].startswith("base ") and len(version.tags["sha256.docsmith-q8_0.gguf"]) == 64
    (evaluation,) = client.get_run(version.run_id).inputs.dataset_inputs
    assert evaluation.dataset.name == "exam"
    (answers,) = (store.folder / "artifacts").rglob("answers.json")
    asked = json.loads(answers.read_text(encoding="utf-8"))
    assert {row[asked["columns"].index("system")] for row in asked["data"]} == {"base", "tuned", "tuned_rag", "q8_0"}
    assert client.get_registered_model("docsmith").aliases == {"challenger": "1"}


def started(project: Path, *more: str) -> "subprocess.Popen[str]":
    """`python -m stages.promote` with a process of its own."""
    environment = {name: value for name, value in (os.environ | IDENTITY).items() if name != "MLFLOW_TRACKING_URI"}
    return subprocess.Popen(
        [*PROMOTE, *more], cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_of_two_people_who_promote_at_once_one_loses_in_one_line_and_may_try_again(people: People, store: Store) -> None:
    client = store.client()
    client.create_registered_model("docsmith.lock", tags={"holder": "the test"})  # until both stand before it
    both = {place: started(place, "--force", f"{place.name} wants it") for place in people}
    for one in both.values():
        assert one.stdout and one.stderr
        assert "waiting for another promotion (the test)" in (one.stdout.readline() or one.stderr.read())
    client.delete_registered_model("docsmith.lock")
    said = {place: (*one.communicate(timeout=120), one.returncode) for place, one in both.items()}
    (winner,) = (place for place, (*_, code) in said.items() if code == 0)
    (loser,) = set(people) - {winner}
    champion = client.get_model_version_by_alias("docsmith", "champion")
    assert f"version {champion.version} is champion" in said[winner][0] and champion.tags["forced"] == f"{winner.name} wants it"
    assert said[loser][2] == 75
    (line,) = (line for line in said[loser][1].splitlines() if line.startswith("promote:"))
    lost = f"version {champion.version} became champion while this model was compared. Nothing was registered. Run it again"
    assert line == f"promote: {lost}"
    assert len(client.search_model_versions("name = 'docsmith'")) == int(champion.version)
    assert not client.search_registered_models("name = 'docsmith.lock'")
    assert "is champion already" in succeed(loser, *PROMOTE, "--force", "again")


def test_a_training_is_recorded_on_the_server(people: People, store: Store) -> None:
    params = people.second / "params.yaml"
    fewer = params.read_text(encoding="utf-8")
    for name in ("max_steps", "per_device_train_batch_size"):
        fewer = re.sub(f"{name}: .*", f"{name}: 2", fewer)
    params.write_text(fewer, encoding="utf-8")
    said = succeed(people.second, "dvc", "repro", "--single-item", "train")
    run_id = str(read_figures(people.second / "reports/metrics/train.json")["mlflow_run_id"])
    assert f"MLflow run {run_id}" in said
    run = store.client().get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["cfg.max_steps"] == "2"
    assert [point.step for point in store.client().get_metric_history(run_id, "train_loss")] == [1, 2]
    assert sorted(one.tags[0].value for one in run.inputs.dataset_inputs) == ["training", "validation"]


def test_a_backup_brings_back_what_was_deleted(store: Store, tmp_path: Path) -> None:
    client = store.client()
    run_id = client.create_run("0", run_name="kept").info.run_id
    at = ["--host", str(store.folder / "database"), "--username", "mlflow"]
    backup = tmp_path / "backup.sql"
    succeed(tmp_path, "pg_dump", *at, "--clean", "--if-exists", "--file", str(backup), "mlflow")
    client.delete_run(run_id)
    assert client.get_run(run_id).info.lifecycle_stage == "deleted"
    succeed(tmp_path, "psql", *at, "--single-transaction", "--quiet", "--file", str(backup), "mlflow")
    assert client.get_run(run_id).info.lifecycle_stage == "active"


def test_the_servers_come_back_with_their_data_and_down_leaves_nothing_running(store: Store) -> None:
    client = store.client()
    run_id = client.create_run("0").info.run_id
    client.log_text(run_id, "kept", "note.txt")
    first = team.running(store.folder / "postgres.json"), team.running(store.folder / "mlflow.json")
    assert all(first)
    assert f"runs already at {store.uri}" in store.says("up")
    assert first == (team.running(store.folder / "postgres.json"), team.running(store.folder / "mlflow.json"))

    assert "stopped; the data stay" in store.says("down")
    assert not any(team.is_group_alive(server.pid) for server in first if server)
    assert not (store.folder / "database/postmaster.pid").exists()  # it ended well, and did not have to be killed
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", store.port))
    assert "nothing runs" in store.says("down")

    store.says("up")
    assert store.client().get_run(run_id).info.run_id == run_id
    (note,) = (store.folder / "artifacts").rglob("note.txt")
    assert note.read_text() == "kept"


def is_any_at_work_in(folder: Path) -> bool:
    """Whether a process has `folder` as its working folder, as all of PostgreSQL's have."""
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if entry.readlink() == folder:
                return True
    return False


def test_a_database_that_died_is_started_again_while_mlflow_goes_on(store: Store) -> None:
    old = team.running(store.folder / "postgres.json")
    assert old
    os.kill(old.pid, signal.SIGKILL)
    while Path(f"/proc/{old.pid}").exists() or is_any_at_work_in(store.folder / "database"):
        time.sleep(0.05)
    served_by = team.running(store.folder / "mlflow.json")
    assert served_by and f"MLflow answers at {store.uri}" in store.says("up")
    new = team.running(store.folder / "postgres.json")
    assert new and new.pid != old.pid and team.running(store.folder / "mlflow.json") == served_by
    assert store.client().search_experiments()


def test_the_database_is_reached_by_this_user_alone_and_mlflow_owns_nothing_but_its_own(store: Store) -> None:
    import psycopg

    at = {"host": str(store.folder / "database"), "user": "mlflow"}
    assert (store.folder / "database").stat().st_mode & 0o777 == 0o700
    with psycopg.connect(dbname="mlflow", **at) as connection:
        assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
        assert connection.execute("SELECT usesuper FROM pg_user WHERE usename = 'mlflow'").fetchone() == (False,)
    with pytest.raises(psycopg.OperationalError, match="no pg_hba.conf entry"):
        psycopg.connect(dbname="postgres", **at)


# ---- what cannot be started


def refused(folder: Path, *more: str) -> str:
    """The one line with which `up` ends in error."""
    done = call(REPOSITORY, *TEAM, "up", "--folder", str(folder), *more)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_a_port_that_is_taken_is_named_before_anything_is_made() -> None:
    with shared_folder() as folder, socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused(folder, "--port", str(port))
        assert (
            line == f"team: port {port} of 127.0.0.1 cannot be had (Address already in use). Stop what uses it, or choose --port"
        )
        assert [path.name for path in folder.iterdir()] == ["lock"]


def test_what_was_begun_is_stopped_when_up_is_interrupted() -> None:
    with shared_folder() as folder:
        command = [*TEAM, "up", "--folder", str(folder), "--port", str(free_port())]
        child = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not (server := team.running(folder / "mlflow.json")):
            assert child.poll() is None, child.communicate()
            time.sleep(0.05)
        database = team.running(folder / "postgres.json")
        child.terminate()
        child.communicate(timeout=60)
        assert child.returncode == 143
        assert database and not team.is_group_alive(database.pid) and not team.is_group_alive(server.pid)
        assert list(folder.glob("*.json")) == [] and not (folder / "database/postmaster.pid").exists()


def test_a_folder_that_postgresql_cannot_enter_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o700 if team.IS_ROOT else 0)
    try:
        assert ("cannot be entered by the user postgres" if team.IS_ROOT else "Permission denied") in refused(closed / "team")
    finally:
        closed.chmod(0o700)


def test_a_path_that_is_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    assert "its path is too long for a socket" in refused(tmp_path / ("long" * 25))


def test_a_postgresql_that_is_missing_or_of_another_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "PROGRAMS", tmp_path)
    with pytest.raises(team.BadInput, match=f"there is no PostgreSQL in {tmp_path}. Install it with: make postgres"):
        team.programs(tmp_path / "database")
    for version in ("9.6", "15", "17"):
        (tmp_path / version / "bin").mkdir(parents=True)
        (tmp_path / version / "bin/initdb").touch()
    assert team.programs(tmp_path / "database") == tmp_path / "17/bin"
    (tmp_path / "database").mkdir()
    (tmp_path / "database/PG_VERSION").write_text("15\n")
    assert team.programs(tmp_path / "database") == tmp_path / "15/bin"
    shutil.rmtree(tmp_path / "15")
    with pytest.raises(team.BadInput, match="was made by PostgreSQL 15, which is not installed. Install postgresql-15"):
        team.programs(tmp_path / "database")


def test_down_ends_no_process_that_has_the_number_of_one_that_ended(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        write_json(tmp_path / "mlflow.json", team.Server(other.pid, "an earlier boot 4711", 5001))
        assert team.down(tmp_path) == f"nothing runs in {tmp_path}"
        assert other.poll() is None
        write_json(tmp_path / "mlflow.json", team.Server(other.pid, team.born(other.pid), 5001))
        assert team.down(tmp_path) == f"stopped; the data stay in {tmp_path}"
        assert other.wait() == -signal.SIGTERM


def test_a_server_that_ended_before_its_start_was_read_is_not_at_work(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as other:
        other.wait()
        assert team.born(other.pid) == ""
        write_json(tmp_path / "mlflow.json", team.Server(other.pid, "", 5001))
        assert team.running(tmp_path / "mlflow.json") is None


def test_two_who_start_or_stop_at_once_do_not_meet(tmp_path: Path) -> None:
    with team.held(tmp_path), pytest.raises(team.Busy, match=f"somebody else starts or stops the servers of {tmp_path}"):
        team.down(tmp_path)


def test_what_is_neither_up_nor_down_is_refused(tmp_path: Path) -> None:
    with pytest.raises(team.BadInput, match="sideways is neither up nor down"):
        team.main("sideways", tmp_path)
