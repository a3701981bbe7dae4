"""Language models behind HTTP: servers that Docsmith starts and stops, one client, and a store of every reply."""

import contextlib
import functools
from collections.abc import Callable

from stages.executor import Executor
from stages.llm.client import Keep, Tally, ask_all, ask_missing
from stages.llm.endpoint import Endpoint
from stages.llm.source import Engine, Source, serve_model
from stages.llm.store import Rate, Reply, Request, Store, request_key

__all__ = [
    "Ask",
    "Endpoint",
    "Engine",
    "Keep",
    "Rate",
    "Reply",
    "Request",
    "Source",
    "Store",
    "Tally",
    "ask_all",
    "ask_missing",
    "asking",
    "request_key",
]

Ask = Callable[..., tuple[dict[str, Reply], Tally]]  # requests, label, and what else ask_all takes by name


def asking(source: Source, executor: Executor, store: Store, servers: contextlib.ExitStack) -> Ask:
    """`ask_all` of `source`, where `executor` says, with `store`. A server of ours starts when it is first needed, and ends with `servers`."""

    @functools.cache
    def endpoints() -> tuple[Endpoint, ...]:
        return source.endpoints or (servers.enter_context(serve_model(source)),)

    elsewhere = None
    if executor.engine == "ray":
        from stages.llm.caller import asks_on_ray

        elsewhere = asks_on_ray(source, executor)
    return functools.partial(
        ask_all,
        store=store,
        endpoints=endpoints,
        concurrency=source.concurrency,
        timeout_s=source.timeout_s,
        elsewhere=elsewhere,
    )
