"""The one way Docsmith talks to a language model: OpenAI-style HTTP, many requests at once, each with a terminal status."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from stages.llm.endpoint import Endpoint
from stages.llm.store import Reply, Request, Store
from stages.program.errors import ServerFailed
from stages.program.progress import progress

ATTEMPTS = 4
DEAD_AFTER = 8  # requests in a row that could not reach the server


class Tally(msgspec.Struct, frozen=True):
    """How many requests there were, and how they ended: requests = reused + answered + failed."""

    requests: int
    reused: int
    answered: int
    failed: int
    new_tokens: int
    seconds: float  # spent asking, without the server's start


def ask_all(
    requests: Mapping[str, Request],
    store: Store,
    connect: Callable[[], AbstractContextManager[Endpoint]],
    concurrency: int,
    timeout_s: float,
    label: str,
) -> tuple[dict[str, Reply], Tally]:
    """A reply for each key of `requests`, and the tally.

    Kept replies are reused; the server is started (`connect`) only when some are missing. Each new reply is kept as it comes.
    Raises ServerFailed when the server stops answering; what came before is kept.
    """
    replies = store.find(requests)
    reused = len(replies)
    missing = {key: request for key, request in requests.items() if key not in replies}
    seconds = 0.0
    if missing:
        import asyncio  # here, since a stage's --help should not wait for it

        with connect() as endpoint:
            started = time.monotonic()
            fresh = asyncio.run(_ask(missing, store, endpoint, concurrency, timeout_s, label))
            seconds = time.monotonic() - started
        replies.update(fresh)
    new = [replies[key] for key in missing]
    failed = sum(1 for reply in new if reply.failed)
    tally = Tally(
        requests=len(requests),
        reused=reused,
        answered=len(new) - failed,
        failed=failed,
        new_tokens=sum(reply.tokens for reply in new),
        seconds=round(seconds, 2),
    )
    return replies, tally


async def _ask(
    requests: Mapping[str, Request], store: Store, endpoint: Endpoint, concurrency: int, timeout_s: float, label: str
) -> dict[str, Reply]:
    import asyncio

    import httpx
    import openai
    import stamina.instrumentation

    stamina.instrumentation.set_on_retry_hooks([])  # retries show in the tally, not as log lines
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    client = openai.AsyncOpenAI(
        base_url=endpoint.url,
        api_key=_api_key(),
        timeout=timeout_s,
        max_retries=0,  # retries are counted here
        http_client=openai.DefaultAsyncHttpxClient(limits=limits),
    )
    waiting = iter(requests.items())
    replies: dict[str, Reply] = {}
    unreachable, last_reason = 0, ""
    bar = progress(None, label, total=len(requests), unit="call")

    async def work() -> None:
        nonlocal unreachable, last_reason
        for key, request in waiting:
            if unreachable >= DEAD_AFTER:
                return
            reply = await _ask_one(client, endpoint.model, request)
            if reply.failed.startswith("unreachable"):
                unreachable, last_reason = unreachable + 1, reply.failed
                if unreachable >= DEAD_AFTER:
                    return
            else:
                unreachable = 0
            if not reply.failed:
                store.keep(key, reply)
            replies[key] = reply
            bar.update()

    async with client:
        await asyncio.gather(*(work() for _ in range(min(concurrency, len(requests)))))
        is_gone = unreachable >= DEAD_AFTER or (unreachable > 0 and not await _is_there(client))
    bar.close()
    if is_gone:
        kept = sum(1 for reply in replies.values() if not reply.failed)
        raise ServerFailed(
            f"the LLM server at {endpoint.url} stopped answering after {kept} of {len(requests)} calls ({last_reason}); "
            "their replies are kept. Resume with: dvc repro"
        )
    return replies


async def _ask_one(client: Any, model: str, request: Request) -> Reply:
    import openai
    import stamina

    options: dict[str, Any] = {}
    if request.schema is not None:
        schema = {"name": "reply", "schema": msgspec.json.decode(request.schema), "strict": True}
        options["response_format"] = {"type": "json_schema", "json_schema": schema}

    @stamina.retry(on=_is_passing, attempts=ATTEMPTS, wait_initial=0.5, wait_max=10, timeout=None)
    async def complete() -> Any:
        return await client.chat.completions.create(
            model=model,
            messages=[{"role": role, "content": content} for role, content in request.messages],
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            **options,
        )

    try:
        completion = await complete()
    except openai.APITimeoutError:
        return Reply(text="", failed="timed out")
    except openai.APIConnectionError as error:
        return Reply(text="", failed=f"unreachable: {error.__cause__ or error}")
    except openai.APIStatusError as error:
        return Reply(text="", failed=f"status {error.status_code}: {' '.join(str(error.message).split())[:200]}")
    except ValueError as error:  # a body that is not JSON
        return Reply(text="", failed=f"unreadable reply: {' '.join(str(error).split())[:200]}")
    choice = completion.choices[0] if getattr(completion, "choices", None) else None
    if choice is None or choice.message is None or choice.message.content is None:
        return Reply(text="", failed="empty reply")
    tokens = completion.usage.completion_tokens if completion.usage else 0
    return Reply(text=choice.message.content, tokens=tokens, is_whole=choice.finish_reason != "length")


async def _is_there(client: Any) -> bool:
    """Whether the server says anything at all, be it an error."""
    import openai

    try:
        await client.models.list()
    except openai.APIConnectionError:
        return False
    except openai.APIError:
        return True
    return True


def _is_passing(error: Exception) -> bool:
    """Whether a second try may go better: too many requests, a server error, a timeout, a broken connection."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError)


def _api_key() -> str:
    import os

    return os.environ.get("DOCSMITH_API_KEY", "none")  # local servers take any
