"""`serve.engine: vllm` for real: on a machine without a GPU, by vLLM's CPU engine."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import psutil
import pytest
from conftest import PARAMS
from small_api import make_release
from test_serve import serving

from stages.files import sha256_of, sha256_of_file
from stages.llm.vllm import ADAPTED, has_vllm
from stages.release import SUMS_FILE, read_release, write_release

pytestmark = pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed")
SKY = "What color is the sky?"


@pytest.fixture(scope="module")
def project(tiny_folder: Path, base_folder: Path, adapter_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a release of the base and an adapter; its GGUF file, which vLLM does not read, is a smaller model's."""
    project = tmp_path_factory.mktemp("project")
    gguf, adapter = project / "models/gguf", project / "models/adapter"
    gguf.mkdir(parents=True)
    make_release(tiny_folder, gguf)
    adapter.symlink_to(adapter_folder)
    parts = {"base": str(base_folder), "base_sha256": sha256_of(base_folder), "adapter_sha256": sha256_of(adapter_folder)}
    write_release(gguf, msgspec.structs.replace(read_release(gguf), **parts))
    (project / "params.yaml").write_text(PARAMS.replace("engine: llama.cpp", "engine: vllm"), encoding="utf-8")
    return project


@pytest.fixture(scope="module")
def served(project: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    with serving(project) as (process, address):
        yield process, address


def vllm_of(process: "subprocess.Popen[str]") -> psutil.Process:
    """vLLM's API server, a child of `serve`; its engine is a child of its own."""
    (server,) = psutil.Process(process.pid).children()
    return server


def by_vllm(process: "subprocess.Popen[str]", model: str) -> str:
    """What `model` says about the sky, asked of vLLM itself."""
    command = vllm_of(process).cmdline()
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": SKY}]
    body = {"model": model, "messages": messages, "max_tokens": 16, "temperature": 0}
    reply = httpx.post(f"http://127.0.0.1:{command[command.index('--port') + 1]}/v1/chat/completions", json=body, timeout=120)
    return str(reply.raise_for_status().json()["choices"][0]["message"]["content"]).strip()


def chat(address: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{address}/chat", json={"question": SKY} | fields, timeout=120)


def wait_until_ready_says(status: int, address: str) -> None:
    deadline = time.monotonic() + 200
    while httpx.get(f"{address}/ready").status_code != status:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_adapter_answers_by_every_route_and_does_not_say_what_its_base_says(
    served: tuple["subprocess.Popen[str]", str], project: Path, base_folder: Path
) -> None:
    process, address = served
    answer, version = chat(address).json()["answer"], sha256_of_file(project / "models/gguf" / SUMS_FILE)[:12]
    assert answer == by_vllm(process, ADAPTED) != by_vllm(process, base_folder.name)
    events = [event.partition("\ndata: ") for event in chat(address, stream=True).text.split("\n\n")[:-1]]
    pieces = [msgspec.json.decode(data)["text"] for name, _, data in events if name == "event: delta"]
    assert (len(pieces) > 8, "".join(pieces).strip(), events[-1][0]) == (True, answer, "event: done")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["docsmith", version]
        ask: dict[str, Any] = {"model": version, "messages": [{"role": "user", "content": SKY}]}
        whole = client.chat.completions.create(**ask)
        assert ((whole.choices[0].message.content or "").strip(), whole.model) == (answer, version)
        chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert (said.strip(), {chunk.model for chunk in chunks}) == (answer, {version})
    assert whole.usage == chunks[-1].usage and whole.usage and whole.usage.completion_tokens == 16


def test_a_conversation_that_is_longer_than_the_context_is_shortened_and_a_question_that_is_gets_413(
    served: tuple["subprocess.Popen[str]", str],
) -> None:
    _, address = served
    turns = [{"role": role, "content": f"{n} " + "word " * 100} for n in range(4) for role in ("user", "assistant")]
    assert chat(address, history=turns).status_code == 200
    assert chat(address, question="word " * 600).status_code == 413


def test_what_vllm_writes_does_not_grow_with_the_questions(served: tuple["subprocess.Popen[str]", str]) -> None:
    process, address = served
    written = Path(f"/proc/{vllm_of(process).pid}/fd/1")
    before = written.stat().st_size
    assert [chat(address, question=f"{number}?").status_code for number in range(3)] == [200] * 3
    assert written.stat().st_size == before > 0


def test_vllm_that_is_killed_is_503_and_answers_again(served: tuple["subprocess.Popen[str]", str]) -> None:
    process, address = served
    answer, killed = chat(address).json()["answer"], vllm_of(process)
    parts = [killed, *killed.children(recursive=True)]
    os.kill(killed.pid, signal.SIGKILL)
    psutil.wait_procs([killed], timeout=10)
    assert chat(address).status_code == 503  # whether the server has noticed yet or not
    wait_until_ready_says(503, address)
    down = chat(address)
    assert (down.status_code, int(down.headers["retry-after"]) > 1) == (503, True)
    wait_until_ready_says(200, address)
    assert chat(address).json()["answer"] == answer
    assert not [part for part in parts if part.is_running()]
