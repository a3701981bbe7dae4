import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from conftest import PARAMS, Exported

from stages import serve as serve_module
from stages.program import BadModelFile, BadParams
from stages.release import read_release
from stages.serve import Followed, read_keys
from stages.serving.sources import Sources

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
KEY = "a-key-of-more-than-sixteen"


@contextlib.contextmanager
def serving(project: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A `serve` process in `project`, and the address that it prints."""
    command = [sys.executable, "-m", "stages.serve"]
    process = subprocess.Popen(
        command, cwd=project, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("serve: http://")), "")
        address, _, rest = line.removeprefix("serve: ").partition("/chat")
        assert rest == f" answers questions, {address}/ is the chat page (Ctrl-C stops)\n", process.communicate()[1]
        yield process, address
    finally:
        process.kill()
        process.communicate()


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
    return [child.pid for child in psutil.Process(pid).children()]


def test_a_question_is_answered_and_asked_again_it_is_answered_the_same(address: str) -> None:
    replies = [httpx.post(f"{address}/chat", json={"question": "What color is the sky?"}, timeout=60) for _ in range(2)]
    assert [reply.status_code for reply in replies] == [200, 200]
    assert list(replies[0].json()) == ["answer", "id", "model", "sources", "covered"]
    assert replies[0].json()["answer"].strip() != ""
    assert replies[0].json()["answer"] == replies[1].json()["answer"]


def test_more_questions_than_slots_are_all_answered(address: str) -> None:
    with ThreadPoolExecutor(8) as pool:

        def ask(number):
            return httpx.post(f"{address}/chat", json={"question": f"What is {number}?"}, timeout=60)

        assert [reply.status_code for reply in pool.map(ask, range(8))] == [200] * 8


def test_health_is_ok_while_the_engine_runs(address: str) -> None:
    reply = httpx.get(f"{address}/health")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_open_answers_finish(exported: Exported, number: signal.Signals) -> None:
    with serving(exported.project) as (process, address):
        with httpx.stream("POST", f"{address}/chat", json={"question": "Why?", "stream": True}, timeout=60) as reply:
            pieces = reply.iter_text()
            text = next(pieces)
            process.send_signal(number)
            text += "".join(pieces)
        assert process.wait(timeout=20) == {signal.SIGTERM: 143, signal.SIGINT: 0}[number]
    assert "event: done" in text


def test_a_dead_engine_is_503_and_is_back_within_five_seconds(exported: Exported) -> None:
    with serving(exported.project) as (process, address):
        os.kill(engines_of(process.pid)[0], signal.SIGKILL)
        answer = httpx.post(f"{address}/chat", json={"question": "Why?"}, timeout=60)
        health = httpx.get(f"{address}/health")
        deadline = time.monotonic() + 10
        # not until /ready is 200: for a tenth of a second after the kill, it still is
        while (again := httpx.post(f"{address}/chat", json={"question": "Why?"}, timeout=60)).status_code == 503:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ready = httpx.get(f"{address}/ready")
    assert (answer.status_code, health.status_code, ready.status_code, again.status_code) == (503, 200, 200, 200)
    assert int(answer.headers["retry-after"]) >= 1


def test_keys_of_the_environment_are_needed_and_logs_have_neither_keys_nor_questions(exported: Exported) -> None:
    with serving(exported.project, DOCSMITH_API_KEYS=f" {KEY} , {KEY}2,") as (process, address):
        statuses = [
            httpx.post(f"{address}/chat", json={"question": "swordfish?"}, headers=headers, timeout=60).status_code
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {KEY}2"})
        ]
        httpx.get(f"{address}/health?question=swordfish", headers={"Authorization": f"Bearer {KEY}"})
        process.send_signal(signal.SIGINT)
        said, logged = process.communicate(timeout=20)
    assert statuses == [401, 401, 200]
    assert logged.count("POST /chat 401") == 2 and logged.count("POST /chat 200") == 1
    assert KEY not in said + logged and "swordfish" not in said + logged


def test_sources_that_cannot_be_read_leave_the_old_ones_and_the_next_ones_are_read_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve_module, "LOOK_AGAIN_S", 0.01)
    engine = SimpleNamespace(served=SimpleNamespace(folder=Path()))

    def read(folder: Path) -> Sources:
        if folder == Path("full"):
            raise OSError(28, "No space left on device", "data/store/embeddings")
        return Sources([], str(folder), Path())

    async def scenario() -> None:
        followed = Followed(engine, read)
        following = asyncio.create_task(followed.follow())
        old = followed.find
        engine.served = SimpleNamespace(folder=Path("full"))
        await asyncio.sleep(0.2)
        assert followed.find == old
        engine.served = SimpleNamespace(folder=Path("other"))
        await asyncio.sleep(0.2)
        assert followed.find != old
        following.cancel()

    asyncio.run(scenario())
    assert capsys.readouterr().out.startswith("serve: the sources stay those of .: [Errno 28] No space left on device")


def test_a_key_that_could_be_guessed_or_mistyped_is_refused_and_not_shown() -> None:
    assert read_keys({}) == read_keys({"DOCSMITH_API_KEYS": " , "}) == ()
    for key in ("short", "x" * 15, "sixteen letters and spaces", "sixteen-lettérs-and-more"):
        with pytest.raises(BadParams, match="DOCSMITH_API_KEYS: key 2 is not 16 or more") as refused:
            read_keys({"DOCSMITH_API_KEYS": f"{KEY},{key}"})
        assert key not in str(refused.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_others_reach_needs_keys(project: Path, host: str) -> None:
    (project / "params.yaml").write_text(PARAMS.replace("host: 127.0.0.1", f"host: '{host}'"), encoding="utf-8")
    assert f"serve.host {host} lets other machines in, so callers need a key: set DOCSMITH_API_KEYS" in refusal(project)


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
