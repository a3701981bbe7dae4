import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from conftest import PARAMS, Exported

from stages.program import BadModelFile
from stages.release import read_release
from stages.serve import MAX_BODY_BYTES, TooLarge, read_body, read_question

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@contextlib.contextmanager
def serving(project: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A `serve` process in `project`, and the address that it prints."""
    command = [sys.executable, "-m", "stages.serve"]
    process = subprocess.Popen(command, cwd=project, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serve: http://127.0.0.1:") and line.endswith("/chat answers questions (Ctrl-C stops)\n")
        yield process, line.split("/chat")[0].removeprefix("serve: ")
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def address(exported: Exported) -> Iterator[str]:
    with serving(exported.project) as (_process, address):
        yield address


@pytest.fixture
def project(exported: Exported, tmp_path: Path) -> Path:
    """A copy of the exported project, to damage."""
    (tmp_path / "params.yaml").write_text(PARAMS, encoding="utf-8")
    shutil.copytree(exported.gguf, tmp_path / "models/gguf", ignore=shutil.ignore_patterns("*q4*"))
    return tmp_path


def refusal(project: Path) -> str:
    """What `serve` prints when it refuses to start in `project`."""
    command = [sys.executable, "-m", "stages.serve"]
    done = subprocess.run(command, check=False, cwd=project, env=ENVIRONMENT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


def engines_of(pid: int) -> list[int]:
    """The children of the process `pid`."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_question_is_answered_and_asked_again_it_is_answered_the_same(address: str) -> None:
    replies = [httpx.post(f"{address}/chat", json={"question": "What color is the sky?"}, timeout=60) for _ in range(2)]
    assert [reply.status_code for reply in replies] == [200, 200]
    assert list(replies[0].json()) == ["answer"]
    assert replies[0].json()["answer"].strip() != ""
    assert replies[0].json() == replies[1].json()


def test_more_questions_than_slots_are_all_answered(address: str) -> None:
    with ThreadPoolExecutor(8) as pool:

        def ask(number):
            return httpx.post(f"{address}/chat", json={"question": f"What is {number}?"}, timeout=60)

        assert [reply.status_code for reply in pool.map(ask, range(8))] == [200] * 8


def test_health_is_ok_while_the_engine_runs(address: str) -> None:
    reply = httpx.get(f"{address}/health")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b"question", b'{"question": 3}', b'{"question": null}', b'{"question": " \\n"}', b"\xff", b"[" * 50_000],
)
def test_a_body_without_a_question_gets_400(address: str, body: bytes) -> None:
    reply = httpx.post(f"{address}/chat", content=body)
    assert (reply.status_code, reply.json()) == (400, {"error": "No question provided"})


def test_a_question_longer_than_the_context_gets_413(address: str) -> None:
    reply = httpx.post(f"{address}/chat", json={"question": "word " * 600}, timeout=60)
    assert (reply.status_code, reply.json()) == (413, {"error": "The question is longer than the context of 512 tokens"})


def test_a_body_over_64_kb_gets_413_and_the_next_question_is_answered(address: str) -> None:
    reply = httpx.post(f"{address}/chat", json={"question": "a" * MAX_BODY_BYTES}, timeout=60)
    assert (reply.status_code, reply.json()) == (413, {"error": "The question is larger than 64000 bytes"})
    assert httpx.post(f"{address}/chat", json={"question": "Why?"}, timeout=60).status_code == 200


def test_another_host_name_is_refused(address: str) -> None:
    assert httpx.get(f"{address}/health", headers={"Host": "other.example"}).status_code == 400


def test_there_are_no_pages_that_load_scripts_from_elsewhere(address: str) -> None:
    assert [httpx.get(f"{address}{path}").status_code for path in ("/docs", "/redoc", "/openapi.json")] == [404, 404, 404]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_its_engine(exported: Exported, number: signal.Signals) -> None:
    with serving(exported.project) as (process, address):
        engines = engines_of(process.pid)
        process.send_signal(number)
        code = process.wait(timeout=20)
    assert len(engines) == 1
    assert code == {signal.SIGTERM: 143, signal.SIGINT: 0}[number]
    assert not Path(f"/proc/{engines[0]}").exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")


def test_a_dead_engine_is_503_and_not_ok(exported: Exported) -> None:
    with serving(exported.project) as (process, address):
        os.kill(engines_of(process.pid)[0], signal.SIGKILL)
        time.sleep(0.2)
        answer = httpx.post(f"{address}/chat", json={"question": "Why?"}, timeout=60)
        health = httpx.get(f"{address}/health")
    assert (answer.status_code, health.status_code) == (503, 503)
    assert answer.json()["error"].startswith("The engine failed")


def test_a_flipped_bit_in_the_served_file_is_refused(project: Path) -> None:
    with open(project / "models/gguf/docsmith-q8_0.gguf", "r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(50_000_000)
        file.write(bytes([byte ^ 1]))
    assert "serve: models/gguf/docsmith-q8_0.gguf is damaged: its SHA-256 is" in refusal(project)


def test_another_system_prompt_in_params_is_refused_with_the_command_to_run(project: Path) -> None:
    (project / "params.yaml").write_text(PARAMS.replace("Answer briefly.", "Answer at length."), encoding="utf-8")
    said = refusal(project)
    assert "chat.system_prompt is not the one that models/gguf was exported with ('Answer briefly.')" in said
    assert said.endswith("dvc repro export\n")


def test_an_edited_release_is_refused(project: Path) -> None:
    release = project / "models/gguf/release.json"
    release.write_text(release.read_text(encoding="utf-8").replace("briefly", "at length"), encoding="utf-8")
    with pytest.raises(BadModelFile, match="release.json is damaged"):
        read_release(project / "models/gguf")


def test_a_template_that_is_not_the_releases_is_refused(project: Path) -> None:
    from stages.release import Release, write_release

    gguf = project / "models/gguf"
    values = json.loads((gguf / "release.json").read_text(encoding="utf-8"))
    write_release(gguf, Release(**{**values, "chat_sha256": "0" * 64}))
    assert "the chat template in docsmith-q8_0.gguf is not the release's" in refusal(project)


def test_a_folder_that_is_no_export_is_refused(project: Path) -> None:
    shutil.rmtree(project / "models/gguf")
    assert refusal(project) == "serve: models/gguf has no SHA256SUMS, so it is not an export; build it with: dvc repro export\n"


def test_a_taken_port_is_one_line(project: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (project / "params.yaml").write_text(PARAMS.replace("port: 0", f"port: {port}"), encoding="utf-8")
        assert f"cannot listen on serve.host 127.0.0.1, serve.port {port}: Address already in use" in refusal(project)


def test_an_endless_body_is_left_unread() -> None:
    import asyncio

    pieces = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal pieces
        while True:
            pieces += 1
            yield b"x" * 16_000

    with pytest.raises(TooLarge):
        asyncio.run(read_body(endless()))
    assert pieces == 5  # 4 x 16,000 is the limit


def test_space_around_a_question_is_dropped_and_other_fields_are_ignored() -> None:
    assert read_question(b'{"question": " Why? \\n", "temperature": 2}') == "Why?"
