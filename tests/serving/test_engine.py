import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import msgspec
import pytest
from conftest import CHAT
from small_api import children, make_release

from stages.files import sha256_of, sha256_of_file
from stages.params import Chat, Tracking
from stages.program import BadInput, BadModelFile, BadParams, ServerFailed
from stages.promote import register, run_of_version
from stages.registry import CHAMPION, change, changing
from stages.release import SUMS_FILE, Release, gguf_name, write_release
from stages.release.convert import convert
from stages.serving import engine as engine_module
from stages.serving.engine import Engine, EngineDown, Model, Served, _key, find_model, running_adapter, running_engine
from stages.serving.settings import Serve

if TYPE_CHECKING:
    from mlflow_server import Server

SERVE = Serve(
    model="",
    host="127.0.0.1",
    port=0,
    engine="llama.cpp",
    parallel=2,
    max_waiting=8,
    requests_per_minute=999,
    passages=0,
    min_similarity=0.4,
)
NOWHERE = Tracking(uri="sqlite:///none.db", experiment="none", model_name="docsmith")
GGUF = gguf_name("f16")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def release(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "gguf"
    folder.mkdir()
    make_release(tiny_folder, folder)
    return folder


def another(release: Path, folder: Path, **changed: object) -> Path:
    """A copy of `release` with other values in release.json."""
    shutil.copytree(release, folder)
    old = msgspec.json.decode((folder / "release.json").read_bytes(), type=Release)
    write_release(folder, msgspec.structs.replace(old, **changed))
    return folder


class Registry(NamedTuple):
    """A registry of MLflow with versions of a model."""

    client: Any
    tracking: Tracking

    def add(self, folder: Path) -> str:
        """Registers the release in `folder` as `promote` does, and gives the version's number."""
        tags = {
            "verdict": "promote",
            "verdict_reason": "it is better",
            "quant": "f16",
            "gguf_path": str(folder),
            "sha256sums": sha256_of_file(folder / SUMS_FILE),
        }
        run_id = run_of_version(self.client, self.tracking, "", tags["sha256sums"])
        return register(self.client, self.tracking, tags, run_id, "it answers")

    def promote(self, version: str) -> None:
        name = self.tracking.model_name
        with changing(self.client, name):
            change(self.client, name, {CHAMPION: version}, {})


def registry_at(uri: str) -> Registry:
    from stages.tracking import connect

    tracking = Tracking(uri=uri, experiment="serving", model_name="docsmith")
    return Registry(connect(tracking), tracking)


@pytest.fixture
def registry(fresh_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.chdir(tmp_path)
    shutil.copy(fresh_store, tmp_path / "mlflow.db")
    return registry_at(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "LOOK_S", 0.1)


def serving(model: Path | str, **changed: Any) -> Serve:
    return msgspec.structs.replace(SERVE, model=str(model), **changed)


def run(
    model: Path | str, scenario: Callable[[Engine], Awaitable[object]], tracking: Tracking = NOWHERE, chat: Chat = CHAT
) -> None:
    """Runs `scenario` with an engine for `model`."""

    async def whole() -> None:
        async with running_engine(serving(model), chat, tracking) as engine:
            await scenario(engine)

    asyncio.run(whole())


def engines() -> dict[int, str]:
    """The engines that this process has started, and the files that they serve."""
    return {pid: words[3] for pid, words in children("stages.llm.llama_cpp").items()}


def the_child() -> int:
    (pid,) = engines()
    return pid


async def until(holds: Callable[[], bool], seconds: float) -> float:
    """Waits until `holds` does, and gives the seconds that it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, "it took too long"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


def question(max_tokens: int = 4, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": max_tokens, "temperature": 0, **more}


async def ask(engine: Engine) -> str:
    """Asks once, and gives the version that answered."""
    async with engine.lease() as served, httpx.AsyncClient(timeout=60) as client:
        reply = await client.post(f"{served.endpoint.url}/chat/completions", json=question())
        reply.raise_for_status()
        return served.version


async def stream(served: Served, began: asyncio.Event) -> int:
    """Asks for a long answer as a stream, and gives the number of its pieces."""
    pieces = 0
    body = question(400, stream=True, ignore_eos=True)
    async with (
        httpx.AsyncClient(timeout=60) as client,
        client.stream("POST", f"{served.endpoint.url}/chat/completions", json=body) as reply,
    ):
        async for line in reply.aiter_lines():
            pieces += line.startswith("data: {")
            if pieces == 5:
                began.set()
    return pieces


# ---- a folder


def test_a_folder_is_served_under_the_hash_of_its_checksums(release: Path) -> None:
    async def scenario(engine: Engine) -> None:
        assert (engine.ready, engine.restarts) == (True, 0)
        assert engine.served is not None and engine.served.folder == release
        assert engine.served.version == sha256_of_file(release / SUMS_FILE)[:12] == await ask(engine)
        props = httpx.get(engine.served.endpoint.url.removesuffix("/v1") + "/props").json()
        assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (2, CHAT.context_tokens)

    run(release, scenario)
    assert engines() == {}


def test_a_folder_that_fails_a_check_is_refused_and_nothing_stays_behind(release: Path, tmp_path: Path) -> None:
    damaged = another(release, tmp_path / "damaged")
    flip_a_bit(damaged / GGUF)
    wrong = {
        damaged: (BadModelFile, "f16.gguf is damaged: its SHA-256 is"),
        another(release, tmp_path / "template", chat_sha256="0" * 64): (BadModelFile, "is not the release's"),
        tmp_path / "none": (BadModelFile, "so it is not an export"),
    }
    for folder, (kind, words) in wrong.items():
        with pytest.raises(kind, match=words):
            run(folder, ask)
    sings = msgspec.structs.replace(CHAT, system_prompt="Sing.")
    with pytest.raises(BadParams, match="chat.system_prompt is not the one"):
        run(release, ask, chat=sings)
    assert engines() == {}


def flip_a_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


# ---- an engine that dies


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_an_engine_that_dies_in_mid_answer_is_back_within_5_s(release: Path, number: signal.Signals) -> None:
    async def scenario(engine: Engine) -> None:
        began = asyncio.Event()

        async def broken_off() -> None:
            with pytest.raises(httpx.HTTPError):
                async with engine.lease() as served:
                    await stream(served, began)

        answer = asyncio.create_task(broken_off())
        await began.wait()
        os.kill(the_child(), number)
        assert await until(lambda: not engine.ready, 5) < 0.5
        assert engine.served is None
        with pytest.raises(EngineDown) as down:
            await ask(engine)
        assert 1 <= down.value.retry_after_s <= 10
        assert await until(lambda: engine.ready, 60) < 5
        await answer
        assert engine.restarts == 1
        assert await ask(engine) == engine.served.version

    run(release, scenario)


def test_an_engine_that_does_not_answer_its_health_check_is_ended_and_restarted(
    release: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_module, "PROBE_S", 0.1)
    monkeypatch.setattr(engine_module, "PROBE_TIMEOUT_S", 0.5)

    async def scenario(engine: Engine) -> None:
        hung = the_child()
        os.kill(hung, signal.SIGSTOP)
        await until(lambda: not engine.ready, 20)
        await until(lambda: engine.ready, 60)
        assert the_child() != hung
        assert engine.restarts == 1
        await ask(engine)

    run(release, scenario)
    assert f"{release} does not answer its health check" in capsys.readouterr().out


def test_an_engine_that_dies_again_and_again_is_left_down_for_longer_each_time_until_another_version_comes(
    release: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_module, "CRASHES", 2)
    monkeypatch.setattr(engine_module, "FIRST_PAUSE_S", 2.0)
    first, second = registry.add(release), registry.add(another(release, tmp_path / "second", base="other"))
    registry.promote(first)

    async def scenario(engine: Engine) -> None:
        downs = []
        for _ in range(2):
            await until(lambda: engine.ready, 60)
            os.kill(the_child(), signal.SIGKILL)
            downs.append(await until(lambda: not engine.ready, 5) + await until(lambda: engine.ready, 60))
        assert downs[1] > 2 > 0
        monkeypatch.setattr(engine_module, "FIRST_PAUSE_S", 50.0)
        os.kill(the_child(), signal.SIGKILL)
        await until(lambda: not engine.ready, 5)
        await asyncio.sleep(0.2)
        with pytest.raises(EngineDown) as down:
            await ask(engine)
        assert 95 < down.value.retry_after_s < 120
        assert engines() == {}
        registry.promote(second)
        await until(lambda: engine.ready, 60)
        assert await ask(engine) == f"docsmith/{second}"

    run("models:/docsmith@champion", scenario, registry.tracking)
    assert "is restarted in 100 s, since it has failed 3 times in a row" in capsys.readouterr().out


def test_a_killed_server_takes_its_engine_with_it(release: Path) -> None:
    program = (
        "import asyncio, sys, msgspec\n"
        "from stages.params import Chat, Tracking\n"
        "from stages.serving.engine import running_engine\n"
        "from stages.serving.settings import Serve\n"
        "serve, chat = msgspec.json.decode(sys.argv[1], type=Serve), msgspec.json.decode(sys.argv[2], type=Chat)\n"
        "async def main():\n"
        "    async with running_engine(serve, chat, Tracking('', '', '')) as engine:\n"
        "        print(engine.served.endpoint.url, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    arguments = [msgspec.json.encode(one).decode() for one in (serving(release), CHAT)]
    parent = subprocess.Popen([sys.executable, "-c", program, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    health = parent.stdout.readline().strip().removesuffix("/v1") + "/health"
    assert httpx.get(health).is_success
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    with pytest.raises(httpx.ConnectError):
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.ReadError, httpx.RemoteProtocolError):  # it ends while it answers
                httpx.get(health)
            time.sleep(0.05)


# ---- a version in the registry


def test_promotions_and_rollbacks_during_traffic_fail_no_request(
    release: Path, tmp_path: Path, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = [registry.add(release), registry.add(another(release, tmp_path / "second", base="other"))]
    names = [f"docsmith/{version}" for version in versions]
    registry.promote(versions[0])

    async def scenario(engine: Engine) -> None:
        seen: list[str] = []
        over = False

        async def client() -> None:
            while not over:
                seen.append(await ask(engine))

        clients = [asyncio.create_task(client()) for _ in range(3)]
        for turn in (1, 0, 1, 0):
            await asyncio.to_thread(registry.promote, versions[turn])
            await until(lambda turn=turn: engine.served.version == names[turn], 60)
            asked = len(seen)
            await until(lambda asked=asked: len(seen) > asked + 6, 60)
            assert seen[-1] == names[turn]
        over = True
        await asyncio.gather(*clients)
        await until(lambda: len(engines()) == 1, 20)
        changes = [now for before, now in zip(seen, seen[1:], strict=False) if before != now]
        assert set(changes) == set(names) and engine.restarts == 0

    run("models:/docsmith@champion", scenario, registry.tracking)
    said = capsys.readouterr().out
    assert said.count(f"serve: models:/docsmith@champion is {names[1]} now, which is started beside {names[0]}\n") == 2
    assert said.count(f"serve: {names[0]} answers now\n") == 2


def test_an_answer_that_has_begun_is_finished_by_the_version_that_began_it(
    release: Path, tmp_path: Path, registry: Registry
) -> None:
    first, second = registry.add(release), registry.add(another(release, tmp_path / "second", base="other"))
    registry.promote(first)

    async def scenario(engine: Engine) -> None:
        async with engine.lease() as old:
            registry.promote(second)
            await until(lambda: engine.served.version == f"docsmith/{second}", 60)
            assert await stream(old, asyncio.Event()) > 300
            assert len(engines()) == 2
        await until(lambda: len(engines()) == 1, 20)

    run("models:/docsmith@champion", scenario, registry.tracking)


def test_a_version_that_fails_a_check_or_its_first_answer_is_not_taken_and_not_tried_again_before_it_is_mended(
    release: Path,
    tiny_folder: Path,
    tmp_path: Path,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    registry.promote(registry.add(release))
    template = another(release, tmp_path / "template", chat_sha256="0" * 64)
    silent = another(release, tmp_path / "silent")
    (silent / GGUF).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv[:1])  # which it sets
        convert(tiny_folder, silent / GGUF)  # its embeddings are tied: it says line ends alone
    write_release(silent, msgspec.json.decode((silent / "release.json").read_bytes(), type=Release))
    damaged = another(release, tmp_path / "damaged", base="other")
    whole = (damaged / GGUF).read_bytes()
    flip_a_bit(damaged / GGUF)
    reasons = {template: "is not the release's", silent: "has nothing to say to", damaged: "f16.gguf is damaged"}

    async def scenario(engine: Engine) -> None:
        said = ""
        for folder, reason in reasons.items():
            version = registry.add(folder)
            registry.promote(version)
            said = ""
            began = time.monotonic()
            while f"serve: docsmith/{version} cannot answer: " not in said:
                assert time.monotonic() - began < 60, said
                assert await ask(engine) == "docsmith/1"
                said += capsys.readouterr().out
            await asyncio.sleep(0.5)
            said += capsys.readouterr().out
            assert reason in said and said.count("cannot answer") == said.count("is started beside docsmith/1") == 1
        (damaged / GGUF).write_bytes(whole)
        await until(lambda: engine.served.version == f"docsmith/{version}", 60)
        assert engine.restarts == 0

    run("models:/docsmith@champion", scenario, registry.tracking)
    assert engines() == {}


def test_a_version_by_its_number_stays_whatever_becomes_champion(release: Path, tmp_path: Path, registry: Registry) -> None:
    first, second = registry.add(release), registry.add(another(release, tmp_path / "second", base="other"))
    registry.promote(first)

    async def scenario(engine: Engine) -> None:
        registry.promote(second)
        await asyncio.sleep(1)
        assert await ask(engine) == f"docsmith/{first}"

    run(f"models:/docsmith/{first}", scenario, registry.tracking)


def test_a_registry_that_is_down_is_reported_once_and_the_model_goes_on_answering(
    release: Path,
    server: "Server",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    registry = registry_at(server.uri)
    first, second = registry.add(release), registry.add(another(release, tmp_path / "second", base="other"))
    registry.promote(first)

    async def scenario(engine: Engine) -> None:
        await asyncio.to_thread(server.kill)
        capsys.readouterr()  # MLflow has named its runs
        said = ""
        while "cannot be seen" not in said:
            assert await ask(engine) == f"docsmith/{first}"
            said += capsys.readouterr().out
        await asyncio.sleep(1)
        assert (said + capsys.readouterr().out).count("\n") == 1
        assert said.startswith(
            f"serve: docsmith/{first} goes on answering; where models:/docsmith@champion points cannot be seen: "
        )
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(registry.promote, second)
        await until(lambda: engine.served.version == f"docsmith/{second}", 60)
        assert capsys.readouterr().out.startswith("serve: models:/docsmith@champion can be seen again\n")

    run("models:/docsmith@champion", scenario, registry.tracking)


def test_a_model_that_is_not_there_is_refused_in_one_line(registry: Registry, release: Path) -> None:
    version = registry.add(release)
    wrong = {
        "models:/docsmith@champion": (BadInput, "the model docsmith has no version champion. Promote one with: make promote"),
        "models:/other@champion": (BadInput, "the model other has no version champion"),
        "models:/docsmith/7": (BadInput, "MLflow at .*"),
        "models:/docsmith": (BadParams, "serve.model is models:/docsmith; give a folder, models:/<name>@<alias> or"),
        "models:/../x@champion": (BadParams, "give a folder"),
    }
    for reference, (kind, words) in wrong.items():
        with pytest.raises(kind, match=words) as refused:
            find_model(serving(reference), registry.tracking)
        assert "\n" not in str(refused.value)
    registry.client.delete_model_version_tag("docsmith", version, "gguf_path")
    with pytest.raises(BadModelFile, match="docsmith/1 has no tag gguf_path; register it with: make promote"):
        find_model(serving("models:/docsmith/1"), registry.tracking)


# ---- vLLM


def test_a_version_without_its_adapter_may_be_tried_again_when_the_adapter_comes(registry: Registry, release: Path) -> None:
    registry.add(release)
    tags = {"gguf_path": str(release), "quant": "f16", "adapter_path": "models/adapter"}
    keys = [_key(Model("docsmith/1", tags))]
    Path("models/adapter").mkdir(parents=True)
    for text in ("damaged", "whole, and longer"):
        Path("models/adapter/adapter_model.safetensors").write_text(text)
        keys.append(_key(Model("docsmith/1", tags)))
    assert len({repr(key) for key in keys}) == 3
    assert repr(_key(Model("docsmith/1", tags))) == repr(keys[-1])


def test_vllm_is_not_started_for_another_base_another_adapter_or_another_template(
    release: Path, base_folder: Path, tiny_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    base = {"base": str(tiny_folder), "base_sha256": sha256_of(tiny_folder), "adapter_sha256": sha256_of(adapter_folder)}
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    wrong = {
        "base": (base | {"base_sha256": "0" * 64}, f"{tiny_folder} is not the one that it was made of"),
        "adapter": (base | {"adapter_sha256": "0" * 64}, f"{adapter_folder} is not the adapter that"),
        "template": (
            base | {"base": str(other), "base_sha256": sha256_of(other)},
            f"the chat template of {other} is not the release's",
        ),
    }
    for name, (values, words) in wrong.items():
        folder = another(release, tmp_path / name, **values)
        with pytest.raises(BadModelFile) as refused, running_adapter(folder, adapter_folder, CHAT, 2, refuse):
            pass
        assert words in str(refused.value)
    right = another(release, tmp_path / "right", **base)
    with pytest.raises(ServerFailed, match="it was started"), running_adapter(right, adapter_folder, CHAT, 2, refuse):
        pass


def refuse(_child: object) -> None:
    raise ServerFailed("it was started")
