import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.llm.child import running_server
from stages.llm.endpoint import free_port
from stages.program import ServerFailed

SERVER = """
import http.server, os, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[2], "w").write(f"{os.getpid()} {worker.pid}")
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            print("OutOfMemoryError: no room left", flush=True); print("bye", flush=True); os._exit(9)
        self.send_response(200); self.end_headers(); self.wfile.write(os.environ.get("COLOUR", "").encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


def is_alive(pid: int) -> bool:
    """Whether `pid` runs: an ended process that nobody has waited for does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def get(address: str) -> str:
    import urllib.request

    with urllib.request.urlopen(address, timeout=5) as reply:
        return str(reply.read().decode())


def test_a_server_is_ready_inside_the_block_and_neither_it_nor_its_workers_run_after_it(tmp_path: Path) -> None:
    port, pids = free_port(), tmp_path / "pids"
    address = f"http://127.0.0.1:{port}/health"
    with running_server("fake", [sys.executable, "-c", SERVER, str(port), str(pids)], {"COLOUR": "blue"}, address, 20):
        assert get(address) == "blue"
        server, worker = map(int, pids.read_text().split())
        assert is_alive(server) and is_alive(worker)
    assert not is_alive(server)
    assert ends_within(worker, 5)


def test_no_proxy_is_asked_for_a_server_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")  # where nobody answers
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port), str(tmp_path / "pids")]
    with running_server("fake", command, {}, f"http://127.0.0.1:{port}/health", 5):
        pass


def test_a_server_that_exits_at_the_start_is_reported_with_its_last_line_and_code() -> None:
    program = "print('loading'); print('no such model: x', flush=True); raise SystemExit(3)"
    address = f"http://127.0.0.1:{free_port()}/health"
    started = time.monotonic()
    with pytest.raises(ServerFailed) as failed, running_server("fake", [sys.executable, "-c", program], {}, address, 20):
        pass
    assert str(failed.value) == "fake stopped while it started (exit code 3): no such model: x"
    assert time.monotonic() - started < 10


def test_the_line_that_names_an_error_is_preferred_to_what_is_printed_after_it() -> None:
    program = "print('ValueError: bad head'); print('see the manual', flush=True); raise SystemExit(1)"
    address = f"http://127.0.0.1:{free_port()}/health"
    with (
        pytest.raises(ServerFailed, match=r"ValueError: bad head$"),
        running_server("f", [sys.executable, "-c", program], {}, address, 20),
    ):
        pass


def test_a_server_that_is_never_healthy_is_stopped(tmp_path: Path) -> None:
    program = (
        "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); print('warming up', flush=True); time.sleep(60)"
    )
    address = f"http://127.0.0.1:{free_port()}/health"
    with (
        pytest.raises(ServerFailed, match=r"fake was not ready after 1 s: warming up"),
        running_server("fake", [sys.executable, "-c", program, str(tmp_path / "pid")], {}, address, 1.4),
    ):
        pass
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_server_that_ends_in_the_block_adds_its_own_words_to_the_failure(tmp_path: Path) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}/health"
    command = [sys.executable, "-c", SERVER, str(port), str(tmp_path / "pids")]
    with pytest.raises(ServerFailed) as failed, running_server("fake", command, {}, address, 20):
        with contextlib.suppress(OSError):
            get(f"http://127.0.0.1:{port}/die")
        assert ends_within(int((tmp_path / "pids").read_text().split()[0]), 5)
        raise ServerFailed("no answer")
    assert str(failed.value) == "no answer (fake had ended with exit code 9: OutOfMemoryError: no room left)"


def test_a_server_ends_when_the_program_that_started_it_is_killed(tmp_path: Path) -> None:
    port = free_port()
    program = (
        "import sys, time; from stages.llm.child import running_server\n"
        "with running_server('fake', [sys.executable, '-c', *sys.argv[1:4]], {}, sys.argv[4], 20):\n"
        "    print('up', flush=True); time.sleep(60)"
    )
    arguments = [SERVER, str(port), str(tmp_path / "pids"), f"http://127.0.0.1:{port}/health"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n"
    server, worker = map(int, (tmp_path / "pids").read_text().split())
    assert is_alive(server)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert ends_within(server, 5)
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
