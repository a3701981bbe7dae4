"""The model that answers: loaded, checked, supervised, and replaced when another version becomes champion.

A thread starts each engine, watches over it and ends it; all that it must tell reaches the event loop by two futures.
"""

import asyncio
import contextlib
import math
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.chats import chat_sha256, with_system
from stages.files import sha256_of, sha256_of_file
from stages.llm.child import Child, Started
from stages.llm.endpoint import Endpoint
from stages.params import Chat, Tracking
from stages.program import BadModelFile, BadParams, ServerFailed, say
from stages.records import Message
from stages.release import (
    RELEASE_FILE,
    REQUEST_S,
    SUMS_FILE,
    Release,
    ask,
    gguf_name,
    release_for,
    running_release,
    server_address,
    stamp_of,
)
from stages.serving.settings import Serve

if TYPE_CHECKING:
    from stages.serving.replicas import Replicas

POLL_S = 0.1  # between two looks at the child
PROBE_S, PROBE_TIMEOUT_S, PROBES = 2.0, 5.0, 3  # so many health checks in a row without an answer: it hangs
LOOK_S = 3.0  # between two looks at the alias
AGAIN_S = 30.0  # after which engines elsewhere may serve the version that they did not
MLFLOW_TIMEOUT_S = 10
STABLE_S = 60.0  # an engine that ends sooner counts as one that crashed at once
CRASHES = 3  # at once, in a row, from which on there is a pause
FIRST_PAUSE_S, MAX_PAUSE_S = 5.0, 300.0  # each pause is twice as long as the one before
DRAIN_S = REQUEST_S  # for answers that have begun; a lease that is never given back must not keep two models in memory
STOP_S = 20.0
QUESTION = "What is this about?"
REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<number>\d+))")
NEEDED_TAGS = {
    "llama.cpp": {"gguf_path", "sha256sums", "quant"},
    "vllm": {"gguf_path", "sha256sums", "quant", "adapter_path", "adapter_sha256"},
}


class Served(NamedTuple):
    """A model that answers at `endpoint`."""

    endpoint: Endpoint
    release: Release
    folder: Path  # of the release
    version: str  # in the registry, as "docsmith/3"; of a folder, the first 12 digits of the SHA-256 of its SHA256SUMS


class EngineDown(Exception):
    """No model answers now; `retry_after_s` says when to ask again."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the engine is being restarted; ask again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Model(NamedTuple):
    """What is to be served: a folder, or a version in the registry, whose tags say where its files are."""

    name: str  # the folder's path, or as "docsmith/3"
    tags: Mapping[str, str] = {}


class Leases:
    """How many answers an engine has been asked for and not finished."""

    def __init__(self) -> None:
        self.count = 0
        self._none = asyncio.Event()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1
            if not self.count:
                self._none.set()

    async def drained(self) -> None:
        """Returns when nobody has a lease."""
        while self.count:
            self._none.clear()
            await self._none.wait()


class Engine:
    """What answers: begun by `begin`, watched over, and begun again when it ends by itself."""

    def __init__(self, begin: "Callable[[Model], Running | Replicas]") -> None:
        self._begin = begin
        self._restarts = 0
        self._running: Running | Replicas | None = None  # None: it is being restarted
        self._all: set[Running | Replicas] = set()  # this one, one that starts, one whose last answers are being written
        self._tasks: set[asyncio.Task[None]] = set()
        self._crashes = 0  # in a row
        self._back_at = 0.0  # when it answers again, by the monotonic clock

    @property
    def ready(self) -> bool:
        return self._running is not None and self._running.ready

    @property
    def served(self) -> Served | None:
        return self._running.up.result() if self._running and self.ready else None

    @property
    def replicas(self) -> int:
        """How many engines answer now."""
        return self._running.replicas if self._running else 0

    @property
    def restarts(self) -> int:
        """How often something that had ended by itself was started again."""
        return self._restarts + (self._running.restarts if self._running else 0)

    @property
    def back_at(self) -> float:
        """When it answers again, by the monotonic clock."""
        return self._running.back_at if self._running else self._back_at

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[Served]:
        """The model that answers, which stays up until the block ends, whatever becomes champion. Raises EngineDown."""
        running, served = self._running, self.served
        if running is None or served is None:
            raise EngineDown(max(1, math.ceil(self.back_at - time.monotonic())))
        with running.leases.taken():
            yield served

    def begin(self, model: Model) -> "Running | Replicas":
        """An engine with `model` that starts, beside what runs already."""
        running = self._begin(model)
        self._all.add(running)
        running.ended.add_done_callback(lambda _: self._all.discard(running))
        return running

    async def start(self, model: Model) -> "Running | Replicas":
        """An engine with `model` that is ready to answer, beside what runs already. Raises what is wrong with it."""
        running = self.begin(model)
        await running.up
        return running

    def install(self, running: "Running | Replicas") -> None:
        """From here on, `running` answers; where it has failed to start, it is started again."""
        self._restarts = self.restarts
        self._running = running
        self.spawn(self._watch(running))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` until it returns or the engine is closed."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, running: "Running | Replicas") -> None:
        """Restarts `running` when it dies or hangs, unless another one has taken its place."""
        await running.watched()
        if self._running is running:
            self._restarts, self._running = self.restarts, None
            await self._restart(running)

    async def _restart(self, last: "Running | Replicas") -> None:
        lived_s, reason = time.monotonic() - last.up_since if last.up_since else 0.0, last.ended.result()
        while self._running is None:
            self._crashes = self._crashes + 1 if lived_s < STABLE_S else 1
            pause_s = min(FIRST_PAUSE_S * 2 ** min(self._crashes - CRASHES, 10), MAX_PAUSE_S) if self._crashes >= CRASHES else 0
            self._back_at = time.monotonic() + pause_s + last.took_s
            when = f"in {pause_s:.0f} s, since it has failed {self._crashes} times in a row" if pause_s else "now"
            say(f"serve: {last.name} ended: {reason}. It is restarted {when}")
            await asyncio.sleep(pause_s)
            if self._running is not None:
                return  # another version has taken its place
            try:
                fresh = await self.start(last.model)
            except Exception as error:  # whatever it is, it may have passed the next time
                lived_s, reason = 0.0, str(error)
                continue
            if self._running is not None:
                fresh.stop()
                return
            self._restarts += 1
            self.install(fresh)
            say(f"serve: {last.name} answers again")

    async def follow(self, serve: Serve, find: Callable[[], Model], current: Model) -> None:
        """Replaces the model by what `find` gives for `serve.model`, whenever that is another one."""
        reference, failed, trouble, said, again_at = serve.model, None, "", "", math.inf
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                found = await asyncio.to_thread(find)
            except Exception as error:  # MLflow's, the network's, SQLite's: the model that answers needs none of them
                if not trouble:
                    say(f"serve: {current.name} goes on answering; where {reference} points cannot be seen: {error}")
                trouble = str(error)
                continue
            if trouble:
                say(f"serve: {reference} can be seen again")
                trouble = ""
            if found.name == current.name:
                failed = None
                continue
            if (key := _key(found)) == failed and time.monotonic() < again_at:
                continue
            if key != failed:
                say(f"serve: {reference} is {found.name} now, which is started beside {current.name}")
            try:
                fresh = await self.start(found)
            except Exception as error:  # whatever it is, the old one can answer
                if (key, str(error)) != (failed, said):
                    say(f"serve: {found.name} cannot answer: {error}. {current.name} goes on answering")
                failed, said = key, str(error)
                again_at = time.monotonic() + AGAIN_S if serve.endpoints else math.inf  # ours change by their files alone
                continue
            old, current = self._running, found
            self.install(fresh)
            self._crashes = 0
            say(f"serve: {found.name} answers now")
            if old:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(old.leases.drained(), DRAIN_S)
                old.stop()
                await asyncio.wait({old.ended})  # not `await`, which would cancel it when this task is cancelled

    async def close(self) -> None:
        """Ends every engine and everything that watches over one."""
        for task in self._tasks:
            task.cancel()
        for running in self._all:
            running.stop()
        if waiting := {one.ended for one in self._all} | self._tasks:
            await asyncio.wait(waiting, timeout=STOP_S)


class Running:
    """An engine from its start to its end. `serving` starts it, and gives its process to what it is called with."""

    restarts, back_at = 0, 0.0

    def __init__(
        self, model: Model, serving: Callable[[Started], AbstractContextManager[Served]], name: str = "", health: str = "/health"
    ) -> None:
        self.model, self.name = model, name or model.name
        self.began = time.monotonic()
        self.up_since = self.took_s = 0.0
        self.leases = Leases()
        self._loop = asyncio.get_running_loop()
        self.up: asyncio.Future[Served] = self._loop.create_future()  # done when it can answer, or has failed to start
        self.ended: asyncio.Future[str] = self._loop.create_future()  # the reason
        self._stop, self._hangs = threading.Event(), threading.Event()
        self._serving, self._health = serving, health
        self._child: Child | None = None  # one that runs elsewhere is not a child of ours
        # not one of a pool: the engine gets a signal when the thread that started it ends
        threading.Thread(target=self._run, daemon=True, name=f"engine {self.name}").start()

    @property
    def ready(self) -> bool:
        return not self.ended.done()

    @property
    def replicas(self) -> int:
        return int(self.ready)

    def stop(self) -> None:
        """Ends the engine soon, also one that has not begun to answer."""
        self._stop.set()
        if self._child:
            self._child.terminate()

    async def watched(self) -> None:
        """Returns when it has ended; ends it at once, as if it had died, when it does not answer its health check."""
        import httpx

        if self.ended.done():
            return  # it has failed to start
        health, unanswered = server_address(self.up.result().endpoint) + self._health, 0
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=PROBE_TIMEOUT_S) as client:
            while not (await asyncio.wait({self.ended}, timeout=PROBE_S))[0]:
                try:
                    answers = (await client.get(health)).is_success
                except httpx.HTTPError:
                    answers = False
                unanswered = 0 if answers else unanswered + 1
                if unanswered == PROBES and not self.ended.done():
                    say(f"serve: {self.name} does not answer its health check; it is ended")
                    self._hangs.set()
                    if self._child:
                        self._child.kill()

    def _run(self) -> None:
        failure: Exception | None = None
        try:
            with self._serving(self._started) as served:
                self._tell(self._is_up, served)
                while not self._stop.wait(POLL_S):
                    if self._hangs.is_set() or (self._child and self._child.poll() is not None):
                        raise ServerFailed("it stopped answering")
        except Exception as error:  # the loop's to judge
            failure = error
        self._tell(self._is_over, failure)

    def _started(self, child: Child) -> None:
        self._child = child
        if self._stop.is_set():
            raise ServerFailed("it was stopped")

    def _tell(self, hear: Callable[..., None], what: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know any more
            self._loop.call_soon_threadsafe(hear, what)

    def _is_up(self, served: Served) -> None:
        self.up_since = time.monotonic()
        self.took_s = self.up_since - self.began
        if not self.up.done():
            self.up.set_result(served)

    def _is_over(self, failure: Exception | None) -> None:
        if not self.up.done():
            self.up.set_exception(failure or ServerFailed("it was stopped"))
            self.up.exception()  # who waited for it may be gone
        self.ended.set_result(str(failure or "it was stopped"))


@contextlib.asynccontextmanager
async def running_engine(serve: Serve, chat: Chat, tracking: Tracking) -> AsyncIterator[Engine]:
    """The model `serve.model`, checked and ready to answer; while the block lasts it is restarted, and replaced as its alias moves.

    Costs the memory of the model and of `serve.parallel` contexts for each replica; twice that while a new version starts beside
    the old one.
    Raises BadInput where the registry has no such version, BadModelFile, BadParams and ServerFailed as `running_release` does.
    """
    model = await asyncio.to_thread(find_model, serve, tracking)
    if serve.replicas == 1 and not serve.endpoints:
        engine = Engine(lambda model: Running(model, lambda started: answering(model, serve, chat, started)))
    else:
        from stages.serving.replicas import Replicas, check_replicas

        check_replicas(serve)
        engine = Engine(lambda model: Replicas(model, serve, chat))
    try:
        engine.install(await engine.start(model))
        if "@" in serve.model and model.tags:
            engine.spawn(engine.follow(serve, lambda: find_model(serve, tracking), model))
        yield engine
    finally:
        await engine.close()


def find_model(serve: Serve, tracking: Tracking) -> Model:
    """What `serve.model` names now. Raises BadParams for what is no reference, BadInput where the registry has no such version."""
    if not serve.model.startswith("models:"):
        return Model(serve.model)
    parts = REFERENCE.fullmatch(serve.model)
    if not parts:
        raise BadParams(
            f"params.yaml: serve.model is {serve.model}; give a folder, models:/<name>@<alias> or models:/<name>/<version>"
        )
    from stages.registry import find_version

    name = parts["name"]
    version = find_version(tracking, name, parts["alias"] or "", parts["number"] or "", MLFLOW_TIMEOUT_S)
    if missing := sorted(NEEDED_TAGS[serve.engine] - version.tags.keys()):
        raise BadModelFile(f"{name}/{version.version} has no tag {missing[0]}; register it with: make promote")
    return Model(f"{name}/{version.version}", version.tags)


def _key(model: Model) -> object:
    """What changes when a version that could not answer may be tried again: its tags, and its files."""
    from stages.tracking import project_root

    folder = project_root() / model.tags["gguf_path"]
    files = [folder / name for name in (RELEASE_FILE, SUMS_FILE, gguf_name(model.tags["quant"]))]
    if adapter := model.tags.get("adapter_path"):
        files += sorted((project_root() / adapter).glob("*"))
    return model.name, sorted(model.tags.items()), [stamp_of(file) for file in files]


@contextlib.contextmanager
def answering(model: Model, serve: Serve, chat: Chat, started: Started, replica: int | None = None) -> Iterator[Served]:
    """An engine with `model` until the block ends, after every check and one answer. Raises what `running_release` raises."""
    with contextlib.ExitStack() as stack:
        folder, adapter = Path(model.name), Path(model.name).parent / "adapter"
        if model.tags:
            from stages.registry.release import adapter_of, release_of

            folder = stack.enter_context(release_of(model.tags))
            if serve.engine == "vllm":
                adapter = stack.enter_context(adapter_of(model.tags))
        if serve.engine == "vllm":
            running = running_adapter(folder, adapter, chat, serve.parallel, started, replica)
        else:
            running = running_release(folder, chat, serve.parallel, started)
        release, endpoint = stack.enter_context(running)
        served = Served(endpoint, release, folder, version_of(model, folder))
        warm_up(served)
        yield served


def version_of(model: Model, folder: Path) -> str:
    """What users see as the version of `model`, whose release is in `folder`."""
    return model.name if model.tags else sha256_of_file(folder / SUMS_FILE)[:12]


@contextlib.contextmanager
def running_adapter(
    folder: Path, adapter: Path, chat: Chat, parallel: int, started: Started, replica: int | None = None
) -> Iterator[tuple[Release, Endpoint]]:
    """The release in `folder`, and a vLLM server for the base and the adapter that it was made of. Raises as `running_release`."""
    from stages.llm.vllm import has_vllm, vllm_server
    from stages.models import as_hf_folder, load_tokenizer, model_sha256

    if not has_vllm():
        raise BadParams("params.yaml: serve.engine is vllm, which is not installed here. Set it to llama.cpp")
    release = release_for(folder, chat)
    if model_sha256(release.base) != release.base_sha256:
        raise BadModelFile(f"{folder}: the model {release.base} is not the one that it was made of")
    if not adapter.is_dir() or sha256_of(adapter) != release.adapter_sha256:
        raise BadModelFile(f"{adapter} is not the adapter that {folder} was made of; restore it with: dvc checkout")
    base = as_hf_folder(release.base)
    if chat_sha256(load_tokenizer(base).chat_template, chat.system_prompt) != release.chat_sha256:
        raise BadModelFile(f"{folder}: the chat template of {release.base} is not the release's")
    with vllm_server(base, chat.context_tokens, parallel, adapter, started, replica) as endpoint:
        yield release, endpoint


def warm_up(served: Served) -> None:
    """One answer. Raises BadModelFile when it is empty, ServerFailed when there is none."""
    messages = with_system(served.release.system_prompt, [Message("user", QUESTION)])
    body: dict[str, Any] = {"model": served.endpoint.model, "messages": messages, "max_tokens": 8, "temperature": 0}
    reply = ask(served.endpoint, "/v1/chat/completions", body)
    if not (reply["choices"][0]["message"]["content"] or "").strip():
        raise BadModelFile(f"{served.version} has nothing to say to {QUESTION!r}")
