"""Several engines with one model behind a router: each is watched over by itself, and the others answer while one is down."""

import asyncio
import contextlib
import functools
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from stages.files import sha256_of_file
from stages.llm.child import Started
from stages.llm.endpoint import Endpoint
from stages.params import Chat
from stages.program import BadParams, ServerFailed
from stages.release import SUMS_FILE, gguf_name, release_for, server_address
from stages.serving.engine import POLL_S, Engine, Leases, Model, Running, Served, answering, version_of
from stages.serving.remote import Fingerprint, check_remote, fingerprint
from stages.serving.router import Workers, own_address, running_router
from stages.serving.settings import Serve

_fingerprints: dict[str, Fingerprint] = {}  # by the SHA-256 of SHA256SUMS: a model is loaded once to be compared with others


def check_replicas(serve: Serve) -> None:
    """Raises BadParams where the settings ask for what cannot be had."""
    asked = "serve.endpoints" if serve.endpoints else f"serve.replicas {serve.replicas}"
    if importlib.util.find_spec("vllm_router") is None:
        raise BadParams(f"params.yaml: {asked} needs the package vllm-router. Install it with: make team")
    if serve.endpoints and serve.engine != "llama.cpp":
        raise BadParams("params.yaml: serve.endpoints are llama.cpp servers; set serve.engine to llama.cpp")


class Replicas:
    """Engines with one model and their router, from their start to their end, as `Running` is one engine."""

    def __init__(self, model: Model, serve: Serve, chat: Chat) -> None:
        self.model = model
        self.name = model.name
        self.up_since = self.took_s = 0.0
        self.leases = Leases()
        self.up: asyncio.Future[Served] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._serve, self._chat = serve, chat
        self._engines: list[Engine] = []
        self._one: Served | None = None  # what one of them serves
        self._router = Engine(self._route)
        self._address = own_address()
        self._is_stopped = False
        self._life = asyncio.create_task(self._live())
        self._life.add_done_callback(self._is_over)

    @property
    def ready(self) -> bool:
        return self._router.ready and self.replicas > 0 and not self.ended.done()

    @property
    def replicas(self) -> int:
        return sum(engine.ready for engine in self._engines)

    @property
    def restarts(self) -> int:
        return sum(engine.restarts for engine in [*self._engines, self._router])

    @property
    def back_at(self) -> float:
        return max(self._router.back_at, min((engine.back_at for engine in self._engines), default=0.0))

    def stop(self) -> None:
        """Ends the engines and the router soon."""
        if not self._is_stopped:
            self._is_stopped = True
            self._life.cancel()

    async def watched(self) -> None:
        """Returns when all of it has ended; each part is watched over by itself."""
        await asyncio.wait({self.ended})

    async def _live(self) -> None:
        began = time.monotonic()
        workers = Workers(self._address)
        try:
            await self._begin()
            self._router.install(await self._router.start(self.model))
            try:
                await workers.become(self._answering())
            except httpx.HTTPError as error:
                raise ServerFailed(f"the router does not take the engines: {error!r}") from None
            self.up_since = time.monotonic()
            self.took_s = self.up_since - began
            if (served := self._router.served) is None:
                raise ServerFailed("its router ended at once")
            self.up.set_result(served)
            routers = self._router.restarts
            while True:
                await asyncio.sleep(POLL_S)
                if routers != self._router.restarts:
                    routers = self._router.restarts
                    workers.forget()
                with contextlib.suppress(httpx.HTTPError):  # the router is down or busy: the next look repeats it
                    await workers.become(self._answering())
        finally:
            await asyncio.gather(workers.close(), *(engine.close() for engine in [*self._engines, self._router]))

    def _answering(self) -> set[str]:
        return {server_address(engine.served.endpoint) for engine in self._engines if engine.served is not None}

    async def _begin(self) -> None:
        """Starts the engines. One that fails is tried again while another one answers. Raises what is wrong with the model."""
        if self._serve.endpoints:
            await self._load_once()
        count = self._serve.engines
        self._engines = [Engine(functools.partial(self._engine, number)) for number in range(count)]
        begun = [engine.begin(self.model) for engine in self._engines]
        await asyncio.wait([one.up for one in begun])
        failures = [failure for one in begun if (failure := one.up.exception())]
        for failure in failures:
            if len(failures) == count or not isinstance(failure, ServerFailed):
                raise failure
        for engine, one in zip(self._engines, begun, strict=True):
            engine.install(one)
        self._one = next(one.up.result() for one in begun if not one.up.exception())

    async def _load_once(self) -> None:
        """Starts the model here for a moment, unless that was done before, to know how those elsewhere must answer."""
        if _sums(self.model) in _fingerprints:
            return
        loader = Engine(lambda model: Running(model, lambda started: self._fingerprinted(model, started)))
        try:
            await loader.start(self.model)
        finally:
            await loader.close()

    @contextlib.contextmanager
    def _fingerprinted(self, model: Model, started: Started) -> Iterator[Served]:
        with answering(model, self._serve, self._chat, started) as served:
            _fingerprints[_sums(model)] = fingerprint(served.endpoint, served.release)
            yield served

    def _engine(self, number: int, model: Model) -> Running:
        if not self._serve.endpoints:
            name = f"replica {number + 1} of {model.name}"
            return Running(model, lambda started: answering(model, self._serve, self._chat, started, number), name)
        url = self._serve.endpoints[number]
        return Running(model, lambda started: self._remote(model, url), f"the engine at {url}")

    @contextlib.contextmanager
    def _remote(self, model: Model, url: str) -> Iterator[Served]:
        with contextlib.ExitStack() as stack:
            folder = Path(model.name)
            if model.tags:
                from stages.registry.release import release_of

                folder = stack.enter_context(release_of(model.tags))
            release = release_for(folder, self._chat)
            endpoint = Endpoint(url=url, model=Path(gguf_name(release.serve)).stem)
            check_remote(endpoint, release, self._chat, _fingerprints[_sums(model)])
            yield Served(endpoint, release, folder, version_of(model, folder))

    def _route(self, model: Model) -> Running:
        """The router, at the address that it has while the engines last."""
        one = self._one
        if one is None:
            raise ServerFailed("no engine answers")

        @contextlib.contextmanager
        def routing(started: Started) -> Iterator[Served]:
            with running_router(self._address, started):
                yield one._replace(endpoint=Endpoint(url=f"{self._address}/v1", model=one.endpoint.model))

        return Running(model, routing, f"the router of {model.name}", "/liveness")

    def _is_over(self, life: "asyncio.Task[None]") -> None:
        failure = (None if life.cancelled() else life.exception()) or ServerFailed("it was stopped")
        if not self.up.done():
            self.up.set_exception(failure)
            self.up.exception()  # who waited for it may be gone
        self.ended.set_result(str(failure))


def _sums(model: Model) -> str:
    """The SHA-256 of the SHA256SUMS of `model`; empty where there are none."""
    sums = Path(model.name) / SUMS_FILE
    return model.tags["sha256sums"] if model.tags else sha256_of_file(sums) if sums.is_file() else ""
