"""Calls made on a node of a cluster: to the endpoints that all nodes reach, or to a server of the node's own."""

import asyncio
import contextlib
import threading
from collections.abc import Mapping

import msgspec

from stages.executor import Executor, done_on_ray
from stages.llm.client import Elsewhere, Keep, Line
from stages.llm.source import Source, serve_model
from stages.llm.store import Reply, Request
from stages.models import check_model, model_sha256

# the requests of one group: key, request without its schema, and the schema, which a Request read from JSON cannot hold
Unit = list[tuple[str, Request, str]]
Replies = list[tuple[str, Reply]]


class Caller:
    """The `Work` of a worker: a JSON Unit -> JSON Replies, with at most `source.concurrency` calls at once over all its units.

    Where no endpoints are given, it starts a server of its own, for a model with the hash `model`; it ends with the worker.
    """

    def __init__(self, source: Source, model: str) -> None:
        endpoints = source.endpoints
        if not endpoints:
            check_model(source.reference, model)
            self.servers = contextlib.ExitStack()  # never closed: servers end with the process that started them
            endpoints = (self.servers.enter_context(serve_model(source)),)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        at_once = source.concurrency * len(endpoints)
        self.line, self.turns, self.asked = Line(endpoints, source.timeout_s, at_once), asyncio.Semaphore(at_once), 0

    def __call__(self, unit: bytes) -> bytes:
        requests = msgspec.json.decode(unit, type=Unit)
        return msgspec.json.encode(asyncio.run_coroutine_threadsafe(self.replies(requests), self.loop).result())

    async def replies(self, requests: Unit) -> Replies:
        from stages.llm.pool import AllGone

        async def reply(key: str, request: Request, schema: str) -> tuple[str, Reply]:
            whole = msgspec.structs.replace(request, schema=msgspec.Raw(schema)) if schema else request
            async with self.turns:
                self.asked += 1
                return key, await self.line.reply(whole, requests[0][0])

        try:
            return list(await asyncio.gather(*(reply(*one) for one in requests)))
        except AllGone as gone:
            raise self.line.stopped(self.asked, gone) from None


def asks_on_ray(source: Source, executor: Executor) -> Elsewhere:
    """What asks requests on the cluster of `executor`, those of one group by one worker. Raises ServerFailed and BadModelFile."""

    def ask(requests: Mapping[str, Request], groups: Mapping[str, str], keep: Keep) -> None:
        units: dict[str, Unit] = {}
        for key, request in requests.items():
            schema = bytes(request.schema).decode() if request.schema else ""
            units.setdefault(groups.get(key, key), []).append((key, msgspec.structs.replace(request, schema=None), schema))
        packed = {name: msgspec.json.encode(unit) for name, unit in units.items()}
        model = "" if source.endpoints else model_sha256(source.reference)
        at_once, has_model = source.concurrency * max(1, len(source.endpoints)), not source.endpoints
        for done in done_on_ray(executor, packed, Caller, (source, model), at_once=at_once, has_model=has_model):
            if done.failed:
                for key, *_ in units[done.name]:
                    keep(key, Reply(text="", failed=done.failed))
            else:
                for key, reply in msgspec.json.decode(done.result, type=Replies):
                    keep(key, reply)

    return ask
