"""A conversation put to the engine: it waits for its turn, and is answered whole or piece by piece."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import httpx
import msgspec

from stages.chats import with_system
from stages.params import Chat
from stages.records import Message
from stages.serving.engine import EngineDown, Served
from stages.serving.limits import RETRY_AFTER_S, Refused
from stages.serving.settings import Serve

CONNECT_S = 5
ANSWER_S = 600  # with its time in the queue, which on two cores is minutes
READY_TO_START = 2  # requests that wait in the engine and not here, so that it never waits for the next one


class Delta(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    delta: Delta


class Usage(msgspec.Struct):
    """Tokens of one answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Event(msgspec.Struct):
    """What is needed of an event in the engine's stream."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None

    @property
    def text(self) -> str:
        return (self.choices[0].delta.content or "") if self.choices else ""


EVENT = msgspec.json.Decoder(Event)


class Queue:
    """Lets `serve.parallel` conversations be answered at once, and `serve.max_waiting` wait.

    All but a few wait here, not in the engine: llama.cpp keeps a thread for each of its open requests, of which it has few, and one
    whose client hangs up there while it waits is answered all the same.
    """

    def __init__(self, engine: Any, serve: Serve) -> None:
        self.engine = engine
        self.most = serve.parallel + serve.max_waiting
        self.open = 0
        self.turns = asyncio.Semaphore(serve.parallel + READY_TO_START)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Served]:
        """The model that answers, which stays until the block ends. Raises Refused where the queue is full or no model answers."""
        if self.open >= self.most:
            raise Refused(503, "Too many questions at once; ask again", RETRY_AFTER_S, "overloaded")
        self.open += 1
        try:
            async with self.turns, self.engine.lease() as served:
                yield served
        except EngineDown as down:
            raise Refused(503, f"The model does not answer: {down}", down.retry_after_s, "engine_down") from None
        finally:
            self.open -= 1


def client_of_engines() -> httpx.AsyncClient:
    """Opens a connection for every request: llama.cpp closes used ones at will, and keeps a thread waiting on each."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(trust_env=False, verify=False, limits=limits, timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S))


def body_of(served: Served, turns: Sequence[Message], chat: Chat, sampling: Mapping[str, Any], stream: bool) -> dict[str, Any]:
    """What the engine is asked: `turns` behind the release's system prompt, greedily unless `sampling` says otherwise."""
    body = {"model": served.endpoint.model, "messages": with_system(served.release.system_prompt, turns), "temperature": 0}
    body |= sampling
    body["max_tokens"] = min(sampling.get("max_tokens", chat.max_new_tokens), chat.max_new_tokens)
    return body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


async def whole(client: httpx.AsyncClient, served: Served, body: dict[str, Any]) -> dict[str, Any]:
    """The engine's reply, as OpenAI's. Raises Refused."""
    try:
        reply = await client.post(f"{served.endpoint.url}/chat/completions", json=body)
    except httpx.HTTPError as error:
        raise _failed(error) from None
    if reply.is_error:
        raise _refused(reply)
    return dict(reply.json())


async def pieces(client: httpx.AsyncClient, served: Served, body: dict[str, Any]) -> AsyncGenerator[tuple[bytes, Event], None]:
    """The events of the engine's stream up to [DONE], as they came, without their "data: ", and read. Raises Refused at any time."""
    try:
        async with client.stream("POST", f"{served.endpoint.url}/chat/completions", json=body) as reply:
            if reply.is_error:
                await reply.aread()
                raise _refused(reply)
            rest = b""
            async for arrived in reply.aiter_raw():
                *lines, rest = (rest + arrived).split(b"\n\n")
                for line in lines:
                    if line == b"data: [DONE]":
                        return
                    event = EVENT.decode(line.removeprefix(b"data: ").removeprefix(b"error: "))
                    if event.error is not None or line.startswith(b"error: "):
                        raise Refused(503, "The model failed while it answered; ask again", RETRY_AFTER_S, "engine_failed")
                    yield line[6:], event
    except (httpx.HTTPError, msgspec.DecodeError) as error:
        raise _failed(error) from None
    raise _failed(EOFError())


def _failed(error: Exception) -> Refused:
    return Refused(503, f"The model stopped answering ({type(error).__name__}); ask again", RETRY_AFTER_S, "engine_failed")


def _refused(reply: httpx.Response) -> Refused:
    if reply.status_code == 400 and "exceed_context_size" in reply.text:  # the count before was another model's
        return Refused(413, "The conversation is longer than the model's context", code="context_length_exceeded")
    return Refused(503, f"The model refused the request (status {reply.status_code}); ask again", RETRY_AFTER_S, "engine_failed")
