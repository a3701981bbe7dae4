import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
import uvicorn
from small_api import CHAT, SERVE, Sources, children, make_release

from stages.llm import llama_cpp
from stages.llm.llama_cpp import llama_server
from stages.llm.vllm import gpu_of
from stages.params import Tracking, convert_section
from stages.program import BadModelFile, BadParams, ServerFailed
from stages.promote import register, run_of_version
from stages.records import Message
from stages.registry import CHAMPION, change, changing
from stages.release import SUMS_FILE, Release, gguf_name, read_release, write_release
from stages.release.convert import convert
from stages.serving import engine as engine_module
from stages.serving import replicas as replicas_module
from stages.serving import router as router_module
from stages.serving.api import application
from stages.serving.asking import body_of, whole
from stages.serving.engine import Engine, running_engine
from stages.serving.feedback import Feedback
from stages.serving.limits import Connection
from stages.serving.remote import distance
from stages.serving.settings import Serve

TALKS = msgspec.structs.replace(CHAT, max_new_tokens=300)
TWO = msgspec.structs.replace(SERVE, replicas=2, parallel=2, max_waiting=12)
NOWHERE = Tracking(uri="sqlite:///none.db", experiment="none", model_name="docsmith")
GGUF = gguf_name("f16")


@pytest.fixture(scope="module")
def release(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "gguf"
    folder.mkdir()
    make_release(tiny_folder, folder)
    return folder


@pytest.fixture(autouse=True)
def a_proxy_that_nobody_answers_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is between processes of one machine asks no proxy."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(engine_module, "LOOK_S", 0.1)


def run(serve: Serve, scenario: Callable[[Engine], Awaitable[object]], tracking: Tracking = NOWHERE) -> None:
    """Runs `scenario` with an engine as in `serve`."""

    async def whole_life() -> None:
        async with running_engine(serve, TALKS, tracking) as engine:
            await scenario(engine)

    asyncio.run(whole_life())
    assert children("stages.llm.llama_cpp") == children("vllm::router") == {}


def on(release: Path | str, **changed: Any) -> Serve:
    return msgspec.structs.replace(TWO, model=str(release), **changed)


def replicas() -> list[int]:
    return list(children("stages.llm.llama_cpp"))


def worked_s(pid: int) -> float:
    """The seconds of a core that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def chat_server(engine: Engine, serve: Serve, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the real application over `engine`, as `serve` starts it."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = application(engine, Sources(), Feedback(folder / "feedback.sqlite"), serve, TALKS, serve.host, ())
    server = uvicorn.Server(uvicorn.Config(app, http=Connection, ws="none", log_config=None, timeout_graceful_shutdown=5))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    address = "http://{}:{}".format(*listener.getsockname()[:2])
    try:
        async with httpx.AsyncClient(base_url=address, timeout=120, trust_env=False) as client:
            await until(lambda: server.started)
            yield client
    finally:
        server.should_exit = True
        await serving


class Heard(NamedTuple):
    """What a client got: how many pieces, and the event that ended them, or for a whole answer its text's length and "whole"."""

    status: int
    pieces: int
    end: str


async def asked(client: httpx.AsyncClient, question: str, stream: bool, begun: list[str]) -> Heard:
    """Asks POST /chat; adds the question to `begun` when the first piece of a streamed answer comes."""
    body = {"question": question, "stream": stream}
    if not stream:
        reply = await client.post("/chat", json=body)
        return Heard(reply.status_code, len(reply.json().get("answer", "")), "whole")
    pieces, event = 0, ""
    async with client.stream("POST", "/chat", json=body) as reply:
        async for line in reply.aiter_lines():
            event = line.removeprefix("event: ") if line.startswith("event: ") else event
            pieces += line == "event: delta"
            if line == "event: delta" and pieces == 3:
                begun.append(question)
        return Heard(reply.status_code, pieces, event)


# ---- a replica that dies


def test_a_replica_killed_under_load_loses_only_the_answers_that_it_had_begun_to_stream_and_comes_back(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(engine: Engine) -> None:
        heard: list[Heard] = []
        begun: list[str] = []
        over = False

        async def conversation(number: int) -> None:
            turn = 0
            while not over:
                turn += 1
                heard.append(await asked(client, f"Question {number}, {turn}?", number % 2 == 0, begun))

        async with chat_server(engine, on(release), tmp_path) as client:
            assert (await client.get("/ready")).status_code == 200
            clients = [asyncio.create_task(conversation(number)) for number in range(8)]
            await until(lambda: len(heard) >= 4 and len(begun) > len(heard) // 2)
            victim, other = sorted(replicas(), key=worked_s)[::-1]
            before = len(heard)
            os.kill(victim, signal.SIGKILL)
            await until(lambda: engine.replicas == 1, 5)
            assert (await client.get("/ready")).status_code == 200
            assert "docsmith_replicas 1.0" in (await client.get("/metrics")).text
            await until(lambda: engine.replicas == 2)
            assert other in replicas() and victim not in replicas() and engine.restarts == 1
            back = len(heard)
            (fresh,) = set(replicas()) - {other}
            idle_s = worked_s(fresh)
            await until(lambda: len(heard) > back + 8 and worked_s(fresh) > idle_s)
            over = True
            await asyncio.gather(*clients)
            assert "docsmith_replicas 2.0" in (await client.get("/metrics")).text
        assert len(heard) > before + 8
        assert {one.status for one in heard} == {200}
        assert all(one.pieces > 0 for one in heard)
        broken = [one for one in heard if one.end == "error"]
        assert len(broken) <= TWO.parallel
        assert {one.end for one in heard} - {"error"} == {"whole", "done"}

    run(on(release), scenario)
    assert "serve: replica " in (said := capsys.readouterr().out) and f" of {release} answers again\n" in said


def test_a_stream_that_breaks_off_ends_with_an_error_and_one_that_waits_is_answered_by_the_other(
    release: Path, tmp_path: Path
) -> None:
    async def scenario(engine: Engine) -> None:
        serve = on(release, parallel=1)
        async with chat_server(engine, serve, tmp_path) as client:
            begun: list[str] = []
            streams = [asyncio.create_task(asked(client, f"Stream {number}?", True, begun)) for number in range(2)]
            await until(lambda: len(begun) == 2)  # one slot each: both replicas write
            waiting = [asyncio.create_task(asked(client, f"Wait {number}?", number % 2 == 0, begun)) for number in range(2)]
            await asyncio.sleep(0.1)
            os.kill(replicas()[0], signal.SIGKILL)
            ends = sorted((await asyncio.gather(*streams)), key=lambda one: one.end)
            assert [one.end for one in ends] == ["done", "error"] and ends[1].pieces >= 3
            answers = await asyncio.gather(*waiting)
            assert [(one.status, one.end) for one in answers] == [(200, "done"), (200, "whole")]
            assert all(one.pieces > 0 for one in answers)

    run(on(release, parallel=1), scenario)


def test_the_router_is_started_again_when_it_dies_and_no_engine_is(release: Path) -> None:
    async def scenario(engine: Engine) -> None:
        (router,) = children("vllm::router")
        before = sorted(replicas())
        os.kill(router, signal.SIGKILL)
        await until(lambda: not engine.ready, 5)
        await until(lambda: engine.ready)
        assert sorted(replicas()) == before and engine.restarts == 1
        async with engine.lease() as served:
            async with asyncio.timeout(10):
                while True:
                    try:
                        await whole(served, body_of(served, [Message("user", "Why?")], TALKS, {}, False))
                        break
                    except Exception:  # it does not know the engines yet
                        await asyncio.sleep(0.05)

    run(on(release), scenario)


# ---- who gets what


def test_the_turns_of_a_conversation_go_to_one_replica_and_conversations_to_both(release: Path) -> None:
    async def scenario(engine: Engine) -> None:
        before = {pid: worked_s(pid) for pid in replicas()}

        async def conversation(number: int) -> list[tuple[int, int]]:
            """(prompt tokens, those of them that the replica had cached) for each turn."""
            turns, counts = [], []
            for turn in range(3):
                turns.append(
                    Message("user", f"{number}: of the chapters, which is about birds, and what is in part {turn} of it?")
                )
                async with engine.lease() as served:
                    reply = await whole(served, body_of(served, turns, TALKS, {"max_tokens": 12}, False))
                counts.append((reply["usage"]["prompt_tokens"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]))
                turns.append(Message("assistant", reply["choices"][0]["message"]["content"] or "-"))
            return counts

        conversations = await asyncio.gather(*map(conversation, range(4)))
        again = [
            cached >= asked_before - 8  # a turn's last tokens may be cut otherwise once something follows
            for counts in conversations
            for (asked_before, _), (_, cached) in zip(counts, counts[1:], strict=False)
        ]
        assert again == [True] * 8, conversations
        assert all(worked_s(pid) > seconds for pid, seconds in before.items())

    run(on(release), scenario)


# ---- another version


def test_a_promotion_with_two_replicas_fails_no_request(
    release: Path, fresh_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.tracking import connect

    monkeypatch.chdir(tmp_path)
    shutil.copy(fresh_store, tmp_path / "mlflow.db")
    tracking = Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="serving", model_name="docsmith")
    client = connect(tracking)
    second = shutil.copytree(release, tmp_path / "second")
    write_release(second, msgspec.structs.replace(read_release(release), base="other"))
    numbers = []
    for folder in (release, second):
        sums = replicas_module.sha256_of_file(folder / SUMS_FILE)
        tags = {"verdict": "promote", "verdict_reason": "", "quant": "f16", "gguf_path": str(folder), "sha256sums": sums}
        numbers.append(register(client, tracking, tags, run_of_version(client, tracking, "", sums), "it answers"))

    def promote(number: str) -> None:
        with changing(client, "docsmith"):
            change(client, "docsmith", {CHAMPION: number}, {})

    promote(numbers[0])

    async def scenario(engine: Engine) -> None:
        seen: list[str] = []

        async def ask_on() -> None:
            while len(set(seen)) < 2 or seen[-6:] != [f"docsmith/{numbers[1]}"] * 6:
                async with engine.lease() as served:
                    reply = await whole(served, body_of(served, [Message("user", "Why?")], TALKS, {"max_tokens": 8}, False))
                    assert reply["choices"][0]["message"]["content"]
                    seen.append(served.version)

        askers = [asyncio.create_task(ask_on()) for _ in range(4)]
        await until(lambda: len(seen) > 4)
        await asyncio.to_thread(promote, numbers[1])
        async with asyncio.timeout(60):
            await asyncio.gather(*askers)
        await until(lambda: len(replicas()) == 2, 20)
        assert seen[0] == f"docsmith/{numbers[0]}" and engine.restarts == 0 and engine.replicas == 2

    run(on("models:/docsmith@champion"), scenario, tracking)


# ---- engines elsewhere


def test_engines_elsewhere_answer_while_one_of_them_can_and_one_that_comes_back_is_used_again(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PROBE_S", 0.2)
    monkeypatch.setattr(engine_module, "FIRST_PAUSE_S", 0.2)
    with contextlib.ExitStack() as stack:
        started: list[Any] = []
        servers = [stack.enter_context(llama_server(release / GGUF, 512, 2, started.append)) for _ in range(2)]

        async def scenario(engine: Engine) -> None:
            assert (engine.replicas, len(replicas())) == (2, 2)  # none of ours is left
            started[0].kill()
            for _ in range(3):
                async with engine.lease() as served:
                    reply = await whole(served, body_of(served, [Message("user", "Why?")], TALKS, {"max_tokens": 8}, False))
                    assert reply["choices"][0]["message"]["content"]
            await until(lambda: engine.replicas == 1)
            port = urlsplit(servers[0].url).port
            monkeypatch.setattr(llama_cpp, "free_port", lambda: port)
            stack.enter_context(llama_server(release / GGUF, 512, 2))
            await until(lambda: engine.replicas == 2)

        async def whole_life() -> None:
            async with running_engine(on(release, endpoints=tuple(one.url for one in servers)), TALKS, NOWHERE) as engine:
                await scenario(engine)

        asyncio.run(whole_life())


def test_an_engine_elsewhere_with_another_file_name_or_context_is_refused(
    release: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv[:1])  # which it sets
    (tmp_path / "other").mkdir()
    convert(tiny_folder, tmp_path / "other" / GGUF)
    renamed = Path(shutil.copy(release / GGUF, tmp_path / "renamed.gguf"))
    wrong = [
        (
            tmp_path / "other" / GGUF,
            512,
            BadModelFile,
            "serves another model than the release: the likelihoods of its first words",
        ),
        (renamed, 512, BadModelFile, r"not docsmith-f16; start it with the release's GGUF file and --alias docsmith-f16"),
        (release / GGUF, 256, BadModelFile, "has 256 tokens of context for an answer, and chat.context_tokens is 512"),
    ]

    async def refused(serve: Serve) -> None:
        async with running_engine(serve, TALKS, NOWHERE):
            pass

    for gguf, context_tokens, kind, words in wrong:
        with llama_server(gguf, context_tokens, 2) as endpoint, pytest.raises(kind, match=words) as error:
            asyncio.run(refused(on(release, endpoints=(endpoint.url,))))
        assert "\n" not in str(error.value)
    with pytest.raises(ServerFailed, match=r"http://127.0.0.1:9/v1: the engine did not answer /v1/models"):
        asyncio.run(refused(on(release, endpoints=("http://127.0.0.1:9/v1",))))


def test_a_router_that_does_not_take_the_engines_is_one_line(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "CALL_S", 1e-6)

    async def ready(_engine: Engine) -> None:
        pass

    with pytest.raises(ServerFailed, match="the router does not take the engines: .*Timeout"):
        run(on(release), ready)


def test_models_are_as_far_apart_as_the_likelihoods_of_their_first_words() -> None:
    ours = [{1: -0.5, 2: -1.5, 3: -2.0, 4: -9.0}]
    assert distance(ours, [{1: -0.5, 2: -1.75, 3: -2.0, 4: -3.0}]) == 0.25  # the fourth is not one of the likeliest
    assert distance(ours, [{1: -0.5, 2: -1.5, 4: -9.0}]) == float("inf")


# ---- what cannot be had


def test_replicas_without_the_router_are_refused_in_one_line(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm_router", None)  # as if it were not installed
    for changed, asks in (({}, "serve.replicas 2"), ({"endpoints": ("http://127.0.0.1:9/v1",)}, "serve.endpoints")):
        with pytest.raises(BadParams, match=f"^params.yaml: {asks} needs the package vllm-router. Install it with: make team$"):
            run(on(release, **changed), lambda engine: asyncio.sleep(0))


def test_engines_elsewhere_are_not_vllm(release: Path) -> None:
    with pytest.raises(BadParams, match="set serve.engine to llama.cpp"):
        run(on(release, endpoints=("http://127.0.0.1:9/v1",), engine="vllm"), lambda engine: asyncio.sleep(0))


def test_a_model_that_no_replica_can_serve_is_refused(release: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(release, tmp_path / "damaged")
    write_release(damaged, msgspec.json.decode((damaged / "release.json").read_bytes(), type=Release))
    with (damaged / GGUF).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BadModelFile, match="f16.gguf is damaged"):
        run(on(damaged), lambda engine: asyncio.sleep(0))


def test_each_replica_under_vllm_has_a_gpu_of_its_own() -> None:
    assert [gpu_of(replica, ["3", "5"]) for replica in range(2)] == ["3", "5"]
    with pytest.raises(BadParams, match="each of serve.replicas needs a GPU under vLLM; this machine shows 2"):
        gpu_of(2, ["3", "5"])


def test_an_address_elsewhere_that_asks_for_encryption_is_refused_since_there_is_none() -> None:
    url = "https://engine.example.org/v1"
    with pytest.raises(BadParams, match="serve.endpoints"):
        convert_section("serve", {**msgspec.to_builtins(SERVE), "endpoints": [url]}, Serve, "params.yaml")
    plain = url.replace("https", "http")
    assert convert_section("serve", {**msgspec.to_builtins(SERVE), "endpoints": [plain]}, Serve, "p").endpoints == (plain,)
