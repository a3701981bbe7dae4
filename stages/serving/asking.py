"""A conversation put to the engine: it waits for its turn, and is answered whole or piece by piece."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

from stages.chats import with_system
from stages.params import Chat
from stages.records import Message
from stages.serving.engine import EngineDown, Served
from stages.serving.limits import RETRY_AFTER_S, Refused
from stages.serving.settings import Serve
from stages.serving.turns import LONGER

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
    """Lets `serve.parallel` conversations be answered at once by each engine, and `serve.max_waiting` wait.

    All but a few wait here, not in the engine: llama.cpp keeps a thread for each of its open requests, of which it has few, and one
    whose client hangs up there while it waits is answered all the same.
    """

    def __init__(self, engine: Any, serve: Serve) -> None:
        self.engine = engine
        at_once = serve.parallel * serve.engines
        self.most = at_once + serve.max_waiting
        self.open = 0
        self.turns = asyncio.Semaphore(at_once + READY_TO_START)

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


def body_of(served: Served, turns: Sequence[Message], chat: Chat, sampling: Mapping[str, Any], stream: bool) -> dict[str, Any]:
    """What the engine is asked: `turns` behind the release's system prompt, greedily unless `sampling` says otherwise."""
    body = {"model": served.endpoint.model, "messages": with_system(served.release.system_prompt, turns), "temperature": 0}
    body |= sampling
    body["max_tokens"] = min(sampling.get("max_tokens", chat.max_new_tokens), chat.max_new_tokens)
    return body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


async def whole(served: Served, body: dict[str, Any]) -> dict[str, Any]:
    """The engine's reply, as OpenAI's. Raises Refused."""
    async with posted(served.endpoint.url, body) as arriving:
        return dict(msgspec.json.decode(b"".join([piece async for piece in arriving])))


async def pieces(served: Served, body: dict[str, Any]) -> AsyncGenerator[tuple[bytes, Event], None]:
    """The events of the engine's stream up to [DONE], as they came, without their "data: ", and read. Raises Refused at any time."""
    async with posted(served.endpoint.url, body) as arriving:
        rest = b""
        async for piece in arriving:
            *lines, rest = (rest + piece).split(b"\n\n")
            for line in lines:
                if line == b"data: [DONE]":
                    return
                if line.startswith(b":"):
                    continue  # a comment, which llama.cpp sends in silences of half a minute to notice who has hung up
                event = EVENT.decode(line.removeprefix(b"data: ").removeprefix(b"error: "))
                if event.error is not None or line.startswith(b"error: "):
                    raise Refused(503, "The model failed while it answered; ask again", RETRY_AFTER_S, "engine_failed")
                yield line[6:], event
        raise EOFError


class Arrived:
    """What httptools makes of a reply."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.is_whole = False

    def on_body(self, piece: bytes) -> None:
        self.pieces.append(piece)

    def on_message_complete(self) -> None:
        self.is_whole = True


@contextlib.asynccontextmanager
async def posted(url: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
    """The body of the engine's reply to a chat, piece by piece. Raises Refused for whatever goes wrong before the block ends.

    Each request has a connection of its own, which leaving the block closes, and with it the answer: llama.cpp closes used ones at
    will, and keeps a thread waiting on each. This takes 0.3 ms of a core, httpx 2 ms and aiohttp 1 ms, before the first token.
    """
    address = urlsplit(url)
    content = msgspec.json.encode(body)
    head = f"POST {address.path}/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
    head += f"X-Session-ID: {conversation_of(body['messages'])}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    arrived = Arrived()
    parser = httptools.HttpResponseParser(arrived)

    async def arriving(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        while not arrived.is_whole:
            data = await reader.read(65536)
            if not data:
                raise EOFError
            parser.feed_data(data)
            if arrived.pieces and parser.get_status_code() == 200:
                yield b"".join(arrived.pieces)
                arrived.pieces.clear()
        if parser.get_status_code() != 200:
            raise _refused(parser.get_status_code(), b"".join(arrived.pieces))

    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            writer.write(head.encode() + content)
            yield arriving(reader)
        finally:
            writer.close()
    except (OSError, EOFError, httptools.HttpParserError, msgspec.DecodeError) as error:  # TimeoutError is an OSError
        reason = f"The model stopped answering ({type(error).__name__}); ask again"
        raise Refused(503, reason, RETRY_AFTER_S, "engine_failed") from None


def conversation_of(messages: Sequence[Mapping[str, str]]) -> str:
    """What the turns of one conversation have in common, by which the router sends them to one engine: its first question, hashed."""
    first = next((turn["content"] for turn in messages if turn["role"] == "user"), "")
    return hashlib.sha256(first.encode()).hexdigest()[:16]


def _refused(status: int, reply: bytes) -> Refused:
    if status == 400 and (b"exceed_context_size" in reply or LONGER.encode() in reply):  # what was counted was another model's
        return Refused(413, "The conversation is longer than the model's context", code="context_length_exceeded")
    return Refused(503, f"The model refused the request (status {status}); ask again", RETRY_AFTER_S, "engine_failed")
