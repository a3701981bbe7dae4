"""The one way Docsmith talks to a language model: OpenAI-style HTTP, many requests at once, each with a terminal status."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from stages.llm.endpoint import Endpoint
from stages.llm.store import Reply, Request, Store
from stages.program.errors import ServerFailed
from stages.program.progress import progress

ATTEMPTS = 4
LOST_IN_A_ROW = 32  # calls, at least; then the servers are taken for broken
SERVER_FAULTS = ("timed out", "unreachable", "status 5")

Keep = Callable[[str, Reply], None]
# asks requests with their groups, and keeps each reply
Elsewhere = Callable[[Mapping[str, Request], Mapping[str, str], Keep], None]


class Tally(msgspec.Struct, frozen=True):
    """How many requests there were, and how they ended: requests = reused + answered + failed. Tokens are those of new replies."""

    requests: int
    reused: int
    answered: int
    failed: int
    new_tokens: int
    seconds: float  # spent asking, without the server's start
    prompt_tokens: int = 0


def ask_missing(
    requests: Mapping[str, Request], store: Store, ask: Callable[[dict[str, Request], Keep], float]
) -> tuple[dict[str, Reply], Tally]:
    """A reply for each key of `requests`, and the tally. What the store has is reused.

    `ask` gets the missing requests, if any, and a function to keep each reply with; it returns the seconds that it took.
    """
    replies = store.find(requests)
    missing = {key: request for key, request in requests.items() if key not in replies}
    fresh: dict[str, Reply] = {}

    def keep(key: str, reply: Reply) -> None:
        if not reply.failed:
            store.keep(key, reply)
        fresh[key] = reply

    seconds = ask(missing, keep) if missing else 0.0
    answered = [reply for reply in fresh.values() if not reply.failed]
    tally = Tally(
        requests=len(requests),
        reused=len(replies),
        answered=len(answered),
        failed=len(fresh) - len(answered),
        new_tokens=sum(reply.tokens for reply in answered),
        seconds=round(seconds, 2),
        prompt_tokens=sum(reply.prompt_tokens for reply in answered),
    )
    if answered:
        model = next(iter(missing.values())).model_sha256
        store.keep_rate(model, tally.answered, tally.prompt_tokens, tally.new_tokens, seconds)
    return replies | fresh, tally


def ask_all(
    requests: Mapping[str, Request],
    store: Store,
    endpoints: Callable[[], Sequence[Endpoint]],
    concurrency: int,
    timeout_s: float,
    label: str,
    *,
    groups: Mapping[str, str] | None = None,
    pairs_in: Callable[[str, Reply], int] | None = None,
    elsewhere: Elsewhere | None = None,
) -> tuple[dict[str, Reply], Tally]:
    """A reply for each key of `requests`, and the tally.

    Kept replies are reused; `endpoints` is called only when some are missing. Each endpoint gets `concurrency` calls at once, and
    each new reply is kept as it comes. Requests of one group (`groups`: key -> group) go to one endpoint while it lives, since it
    has their common start cached. `pairs_in` says how many pairs a new reply holds, for the progress line. `elsewhere`, where given,
    asks the missing requests in place of this process, and `endpoints` is not called.
    Raises ServerFailed when no endpoint answers any more, or one serves another model; what came before is kept.
    """

    def ask(missing: dict[str, Request], keep: Keep) -> float:
        import asyncio  # here, since a stage's --help should not wait for it; and before the clock starts

        import stages.llm.pool  # noqa: F401

        servers = [] if elsewhere else endpoints()
        reused = len(requests) - len(missing)
        bar = progress(None, label, total=len(requests), unit="call")
        bar.initial = bar.n = reused
        started = time.monotonic()
        tokens = pairs = 0

        def keep_and_show(key: str, reply: Reply) -> None:
            nonlocal tokens, pairs
            keep(key, reply)
            tokens += reply.tokens
            pairs += pairs_in(key, reply) if pairs_in and not reply.failed else 0
            seconds = max(time.monotonic() - started, 1e-3)
            pace = f"{pairs / seconds * 60:.0f} pairs/min, " if pairs_in else ""
            bar.set_postfix_str(f"{pace}{tokens / seconds:.0f} tokens/s, {reused / len(requests):.0%} reused", refresh=False)
            bar.update()

        try:
            if elsewhere:
                elsewhere(missing, groups or {}, keep_and_show)
            else:
                asyncio.run(_ask(missing, keep_and_show, servers, concurrency, timeout_s, groups or {}))
        finally:
            bar.close()
        return time.monotonic() - started

    return ask_missing(requests, store, ask)


class Line:
    """Calls to endpoints, to be made in one event loop, that end when no endpoint answers any more."""

    def __init__(self, endpoints: Sequence[Endpoint], timeout_s: float, at_once: int) -> None:
        import stamina.instrumentation

        from stages.llm.pool import Pool

        stamina.instrumentation.set_on_retry_hooks([])  # retries show in the tally, not as log lines
        self.pool = Pool(endpoints, timeout_s)
        self.endpoints = endpoints
        self.answered = self.lost_in_a_row = 0
        self.most_lost = max(LOST_IN_A_ROW, 2 * at_once)

    async def reply(self, request: Request, group: str) -> Reply:
        """The reply to `request`, which may be a failed one. Raises AllGone, and ServerFailed when another model answers."""
        from stages.llm.pool import AllGone

        reply = await _ask_one(self.pool, request, group)
        self.answered += not reply.failed
        self.lost_in_a_row = self.lost_in_a_row + 1 if reply.failed.startswith(SERVER_FAULTS) else 0
        if self.lost_in_a_row >= self.most_lost:
            raise AllGone(reply.failed)
        return reply

    def stopped(self, wanted: int, reason: Exception) -> ServerFailed:
        """The error that says so, `wanted` calls having been asked for."""
        servers = f"server{'s' if len(self.endpoints) > 1 else ''} at {', '.join(one.url for one in self.endpoints)}"
        return ServerFailed(
            f"the LLM {servers} stopped answering after {self.answered} of {wanted} calls ({reason}); "
            "their replies are kept. Resume with: dvc repro"
        )


async def _ask(
    requests: Mapping[str, Request],
    keep: Keep,
    endpoints: Sequence[Endpoint],
    concurrency: int,
    timeout_s: float,
    groups: Mapping[str, str],
) -> None:
    import asyncio

    from stages.llm.pool import AllGone

    workers = min(concurrency * len(endpoints), len(requests))
    waiting = iter(requests.items())
    line = Line(endpoints, timeout_s, workers)

    async def work() -> None:
        for key, request in waiting:
            keep(key, await line.reply(request, groups.get(key, "")))

    try:
        async with line.pool, asyncio.TaskGroup() as tasks:
            for _ in range(workers):
                tasks.create_task(work())
    except BaseExceptionGroup as errors:
        error = errors.exceptions[0]
        if not isinstance(error, AllGone):
            raise error from None
        raise line.stopped(len(requests), error) from None


async def _ask_one(pool: Any, request: Request, group: str) -> Reply:
    import stamina

    from stages.llm.pool import CallFailed, Server

    tried: set[Server] = set()
    body: dict[str, Any] = {
        "messages": [{"role": role, "content": content} for role, content in request.messages],
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
    }
    if request.schema is not None:
        schema = {"name": "reply", "schema": msgspec.json.decode(request.schema), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}

    def may_pass(error: Exception) -> bool:
        return isinstance(error, CallFailed) and error.may_pass

    @stamina.retry(on=may_pass, attempts=ATTEMPTS, wait_initial=0.5, wait_max=10, timeout=None)
    async def complete() -> Any:
        return await pool.complete(body, group, tried)

    try:
        completion = await complete()
    except CallFailed as error:
        return Reply(text="", failed=str(error))
    choice = completion.choices[0] if completion.choices else None
    if choice is None or choice.message.content is None:
        refusal = choice.message.refusal if choice else None
        return Reply(text="", failed=f"refused: {' '.join(refusal.split())[:200]}" if refusal else "empty reply")
    usage = completion.usage
    return Reply(
        text=choice.message.content,
        tokens=usage.completion_tokens if usage else 0,
        is_whole=choice.finish_reason != "length",
        prompt_tokens=usage.prompt_tokens if usage else 0,
    )
