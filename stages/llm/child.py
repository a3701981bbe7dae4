"""A server of ours as a child process: started, waited for, and stopped whatever happens."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence

from stages.program import ServerFailed, end_with_parent

STOP_WAIT_S = 15
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands between two local processes

Child = subprocess.Popen[bytes]
Started = Callable[[Child], None]  # is given a server's process before the server is ready; what it raises ends the server


@contextlib.contextmanager
def running_server(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    health: str,
    start_s: float,
    started: Started = lambda child: None,
) -> Iterator[None]:
    """Runs `command` until the block ends; enters the block when the address `health` answers 200.

    The server leads its own process group, and ends when the thread that is here ends. Its output goes to a temporary file.
    Raises ServerFailed with the last line of that output when the server exits, or is not healthy within `start_s` seconds.
    """
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            started(child)
            _wait_until_healthy(name, child, health, start_s, log)
            try:
                yield
            except ServerFailed as error:
                if child.poll() is None:
                    raise
                raise ServerFailed(f"{error} ({name} had ended with exit code {child.returncode}: {_last_words(log)})") from None
        finally:
            _stop(child)


def _wait_until_healthy(name: str, child: Child, health: str, start_s: float, log: object) -> None:
    deadline = time.monotonic() + start_s
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise ServerFailed(f"{name} stopped while it started (exit code {child.returncode}): {_last_words(log)}")
        with contextlib.suppress(OSError, urllib.error.URLError), DIRECT.open(health, timeout=2) as reply:
            if reply.status == 200:
                return
        time.sleep(0.2)
    raise ServerFailed(f"{name} was not ready after {start_s:.0f} s: {_last_words(log)}")


def _last_words(log: object) -> str:
    """The line of the log that most likely says what went wrong: the last one that names an error, else the last."""
    log.seek(0)  # type: ignore[attr-defined]
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]  # type: ignore[attr-defined]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or ["it printed nothing"])[-1][-400:]


def _stop(child: Child) -> None:
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_WAIT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # workers that outlived the server's own end
    child.wait()
