"""up | down -> an MLflow server on PostgreSQL for several people, on 127.0.0.1, whose data lies in --folder

`up` makes the database where there is none, starts both servers, and returns when MLflow answers; a second one finds them at work.
`down` stops those two processes and no others, and keeps the data. `up` takes twenty seconds on two busy cores.

The database has no password that could leak: it listens on a socket in a folder that is its own, and the system tells it who asks.
"""

import contextlib
import fcntl
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from stages.files import write_json
from stages.program import BadInput, Busy, ServerFailed, run, say

IS_ROOT = os.geteuid() == 0
# outside the project, which `make clean` and a new clone replace, and where PostgreSQL's own user can enter
FOLDER = Path("/var/lib/docsmith-team" if IS_ROOT else os.path.expanduser("~/.local/share/docsmith-team"))
PROGRAMS = Path("/usr/lib/postgresql")  # Debian's place: a folder for each version
OWNER = "postgres"  # the system's user for PostgreSQL, which refuses to run as root
HOST = "127.0.0.1"
START_S, STOP_S = 300.0, 30.0
MAX_SOCKET = 107  # bytes in the path of a socket, by Linux


class Server(msgspec.Struct, frozen=True):
    """A process that `up` started. `born` tells it from another process that the system gave the same number later."""

    pid: int
    born: str
    port: int


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on; [] for a process that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return fields if fields[0] not in "ZX" else []  # one that nobody has waited for has ended all the same


def born(pid: int) -> str:
    """When the process started, as the boot of the machine and the ticks since then; empty for one that has ended."""
    stat = stat_of(pid)
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()} {stat[19]}" if stat else ""


def running(record: Path) -> Server | None:
    """The server that `record` names, if it is still at work."""
    try:
        server = msgspec.json.decode(record.read_bytes(), type=Server)
    except FileNotFoundError:
        return None
    return server if server.born and born(server.pid) == server.born else None  # one that ended at once has no start


def start(record: Path, command: Sequence[str], port: int, **how: Any) -> "subprocess.Popen[bytes]":
    """Starts `command` in a session of its own, so that it outlives this one; what it prints goes to a .log beside `record`."""
    with record.with_suffix(".log").open("ab") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=record.parent, start_new_session=True, **how
        )
    write_json(record, Server(child.pid, born(child.pid), port))
    return child


def wait_until(answers: Callable[[], bool], child: "subprocess.Popen[bytes]", log: Path) -> None:
    """Returns when the child answers. Raises ServerFailed when it ends before, or takes too long."""
    deadline = time.monotonic() + START_S
    while not answers():
        if child.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
            what = f"ended with code {child.returncode}" if child.returncode is not None else f"took over {START_S:g} s to start"
            raise ServerFailed(f"{log.stem} {what}: {last[:200]}. All of it is in {log}")
        time.sleep(0.1)


def stop(record: Path, number: int) -> bool:
    """Ends the server that `record` names, with all of its processes, by the signal `number`; whether there was one."""
    server = running(record)
    if server:
        for last in (number, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, last)
            deadline = time.monotonic() + STOP_S
            while is_group_alive(server.pid) and time.monotonic() < deadline:
                time.sleep(0.05)
    record.unlink(missing_ok=True)
    return server is not None


def is_group_alive(group: int) -> bool:
    """Whether a process of the group is still at work."""
    everyone = [stat_of(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return any(stat and stat[2] == str(group) for stat in everyone)


def programs(database: Path) -> Path:
    """The folder of PostgreSQL's programs: of the version that made `database`, or of the newest one. Raises BadInput."""
    mark = database / "PG_VERSION"
    wanted = mark.read_text(encoding="utf-8").strip() if mark.is_file() else ""
    found = sorted((path.parent for path in PROGRAMS.glob("*/bin/initdb")), key=lambda path: float(path.parent.name))
    fitting = [path for path in found if wanted in ("", path.parent.name)]
    if not fitting and wanted:
        raise BadInput(f"{database} was made by PostgreSQL {wanted}, which is not installed. Install postgresql-{wanted}")
    if not fitting:
        raise BadInput(f"there is no PostgreSQL in {PROGRAMS}. Install it with: make postgres")
    return fitting[-1]


def as_owner() -> dict[str, Any]:
    """How a process of PostgreSQL is started: by root as PostgreSQL's own user, by anyone else as themselves."""
    return {"user": OWNER, "group": OWNER, "extra_groups": []} if IS_ROOT else {}


def check_folder(folder: Path, database: Path) -> None:
    """Raises BadInput for a folder in which PostgreSQL cannot work."""
    if len(os.fsencode(database / ".s.PGSQL.5432")) > MAX_SOCKET:
        raise BadInput(f"{folder}: its path is too long for a socket in it, which may have {MAX_SOCKET} bytes. Choose --folder")
    if subprocess.run(["test", "-x", folder], cwd="/", check=False, **as_owner()).returncode:
        raise BadInput(f"{folder} cannot be entered by the user {OWNER}, who runs the database. Choose another with --folder")


def make_database(database: Path, bin: Path) -> None:
    """An empty cluster in `database`, whole or not at all, that this user alone may use: as `postgres` or as `mlflow`."""
    draft = database.with_suffix(".new")
    shutil.rmtree(draft, ignore_errors=True)  # of one that was killed
    draft.mkdir(mode=0o700)
    if IS_ROOT:
        shutil.chown(draft, OWNER, OWNER)
    command = [str(bin / "initdb"), "--pgdata", str(draft), "--username", "postgres", "--encoding", "UTF8", "--no-locale"]
    made = subprocess.run([*command, "--auth", "peer"], cwd="/", capture_output=True, text=True, check=False, **as_owner())
    if made.returncode:
        raise ServerFailed(f"initdb failed: {' '.join(made.stderr.split())[-300:]}")
    me = pwd.getpwuid(os.geteuid()).pw_name
    # written into the files that initdb made, which keeps their owner
    (draft / "pg_hba.conf").write_text("local all postgres peer map=team\nlocal mlflow mlflow peer map=team\n", encoding="utf-8")
    (draft / "pg_ident.conf").write_text(f'team "{me}" postgres\nteam "{me}" mlflow\n', encoding="utf-8")
    os.rename(draft, database)


def start_database(record: Path, database: Path, bin: Path) -> None:
    """Starts PostgreSQL on its socket, and makes MLflow's role and database where they are missing."""
    import psycopg

    settings = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={database}"]
    child = start(record, [str(bin / "postgres"), "-D", str(database), *settings], 0, **as_owner())

    def answers() -> bool:
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(**to) as connection:
            connection.autocommit = True
            for kind, table, name in (("ROLE", "pg_roles", "rolname"), ("DATABASE", "pg_database", "datname")):
                if not connection.execute(f"SELECT 1 FROM {table} WHERE {name} = 'mlflow'").fetchone():
                    connection.execute(f"CREATE {kind} mlflow {'LOGIN' if kind == 'ROLE' else 'OWNER mlflow'}")
            return True
        return False

    to: Mapping[str, Any] = {"host": str(database), "user": "postgres", "dbname": "postgres"}
    wait_until(answers, child, record.with_suffix(".log"))


def start_mlflow(record: Path, database: Path, artifacts: Path, port: int) -> None:
    """Starts `mlflow server` on the database."""
    # one worker, of 270 MB, beside its parent of the same size; MLflow's default of four is for more people
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg://mlflow@/mlflow?host={quote(str(database), safe='')}",
        "MLFLOW_ARTIFACTS_DESTINATION": str(artifacts),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    child = start(record, command, port, env=environment)
    wait_until(lambda: is_answering(port), child, record.with_suffix(".log"))


def check_port(port: int) -> None:
    """Raises BadInput for a port that a server cannot have."""
    try:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as MLflow's server does
            tried.bind((HOST, port))
    except OSError as error:
        raise BadInput(f"port {port} of {HOST} cannot be had ({error.strerror}). Stop what uses it, or choose --port") from None


def is_answering(port: int) -> bool:
    """Whether MLflow answers with something that stands in its database."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=10) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps others from starting or stopping what is in `folder`. Raises Busy."""
    with open(folder / "lock", "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"somebody else starts or stops the servers of {folder}. Try again") from None
        yield


def up(folder: Path, port: int) -> str:
    """Starts what is not at work yet; what it cannot finish, it stops. Gives the line that says where MLflow answers."""
    if importlib.util.find_spec("psycopg") is None:
        raise BadInput("the package psycopg is missing. Install it with: make team")
    if not folder.is_dir():
        folder.mkdir(parents=True)
        folder.chmod(0o711)  # to be entered by PostgreSQL's user
    database, artifacts = folder / "database", folder / "artifacts"
    postgres, mlflow = folder / "postgres.json", folder / "mlflow.json"
    with held(folder), contextlib.ExitStack() as on_failure:
        found = running(mlflow)
        if found and running(postgres):
            return f"runs already at http://{HOST}:{found.port}, with its data in {folder}"
        port = found.port if found else port
        bin = programs(database)
        check_folder(folder, database)
        if not found:
            check_port(port)
        artifacts.mkdir(mode=0o700, exist_ok=True)
        if not database.is_dir():
            make_database(database, bin)
        if not running(postgres):  # MLflow finds one that was started again by itself
            on_failure.callback(stop, postgres, signal.SIGINT)
            start_database(postgres, database, bin)
        if not found:
            on_failure.callback(stop, mlflow, signal.SIGTERM)
            start_mlflow(mlflow, database, artifacts, port)
        on_failure.pop_all()
    return f"MLflow answers at http://{HOST}:{port}, with its data in {folder}"


def down(folder: Path) -> str:
    """Stops MLflow and then its database. Gives the line that says so."""
    if not folder.is_dir():
        return f"nothing runs in {folder}"
    with held(folder):
        # SIGINT: PostgreSQL ends what is connected, and writes everything out
        found = [stop(folder / "mlflow.json", signal.SIGTERM), stop(folder / "postgres.json", signal.SIGINT)]
    return f"stopped; the data stay in {folder}" if any(found) else f"nothing runs in {folder}"


def main(action: str, folder: Path = FOLDER, port: int = 5001) -> None:
    folder = folder.expanduser().resolve()
    if action == "down":
        say(f"team: {down(folder)}")
    elif action == "up":
        say(f"team: {up(folder, port)}")
        say("team: put this address into params.yaml as tracking.uri; stop the servers with: make team-down")
    else:
        raise BadInput(f"{action} is neither up nor down")


if __name__ == "__main__":
    run(main)
