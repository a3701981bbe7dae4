"""models/gguf -> POST /chat {"question": ...} -> {"answer": ...}, and GET /health, until Ctrl-C.

The file is checked against its checksum, and its chat against params.yaml, before the first answer.
Costs the memory of the GGUF file and of 4 contexts; answers 4 questions at once, lets 32 wait, and sends the rest away with 503.
"""

import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from stages.chats import with_system
from stages.llm.endpoint import Endpoint
from stages.params import Chat
from stages.program import ServerFailed, run, say
from stages.records import Message
from stages.release import REQUEST_S, Release, plain_text, running_release, server_address
from stages.serving.settings import Serve

PARALLEL = 4
MAX_WAITING = 32
RETRY_AFTER_S = 5
MAX_BODY_BYTES = 64_000


class Asked(msgspec.Struct):
    """The body of POST /chat; other fields in it are ignored."""

    question: str


class TooLarge(Exception):
    """A body of more than MAX_BODY_BYTES."""


def main(serve: Serve, chat: Chat, gguf: Path = Path("models/gguf")) -> None:
    import uvicorn

    with (
        contextlib.suppress(KeyboardInterrupt),  # uvicorn raises it again once the open questions are answered
        listen(serve) as listener,
        running_release(gguf, chat, PARALLEL) as (release, endpoint),
    ):
        host, port = listener.getsockname()[:2]
        say(f"serve: http://{host}:{port}/chat answers questions (Ctrl-C stops)")
        app = application(release, endpoint, chat, host)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
    say("serve: stopped")


def listen(serve: Serve) -> socket.socket:
    """A socket that listens on the address in params.yaml. Raises ServerFailed when it cannot be had."""
    try:
        return socket.create_server((serve.host, serve.port))
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise ServerFailed(f"params.yaml: cannot listen on serve.host {serve.host}, serve.port {serve.port}: {reason}") from None


def application(release: Release, endpoint: Endpoint, chat: Chat, host: str) -> Any:
    """The FastAPI application that puts questions to the llama.cpp server at `endpoint`."""
    import httpx
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    client = httpx.AsyncClient(base_url=server_address(endpoint), trust_env=False, timeout=REQUEST_S)
    open_questions = 0

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    app = FastAPI(title="Docsmith", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    if host.startswith("127."):
        # a page whose name an attacker points at this machine would else be same-origin with the API
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[host, "localhost"])

    def failure(status: int, error: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": error}, status, headers=headers)

    @app.get("/health")
    async def health() -> JSONResponse:
        try:
            reply = await client.get("/health")
        except httpx.HTTPError as error:
            return failure(503, f"the engine does not answer: {type(error).__name__}")
        return JSONResponse({"status": "ok"}) if reply.is_success else failure(503, f"the engine answers {reply.status_code}")

    @app.post("/chat")
    async def answer(request: Request) -> JSONResponse:
        nonlocal open_questions
        try:
            question = read_question(await read_body(request.stream()))
        except TooLarge:
            return failure(413, f"The question is larger than {MAX_BODY_BYTES} bytes")
        if not question:
            return failure(400, "No question provided")
        if open_questions >= PARALLEL + MAX_WAITING:
            return failure(503, "Too many questions at once; try again", **{"Retry-After": str(RETRY_AFTER_S)})
        asked = Message(role="user", content=plain_text(question, release.control_tokens))
        body = {
            "messages": with_system(release.system_prompt, [asked]),
            "max_tokens": chat.max_new_tokens,
            "temperature": 0,  # greedy, as it was scored
        }
        open_questions += 1
        try:
            reply = await client.post("/v1/chat/completions", json=body)
        except httpx.HTTPError as error:
            return failure(503, f"The engine failed: {type(error).__name__}")
        finally:
            open_questions -= 1
        if "exceed_context_size" in reply.text and reply.status_code == 400:
            return failure(413, f"The question is longer than the context of {chat.context_tokens} tokens")
        if reply.is_error:
            return failure(503, f"The engine failed: status {reply.status_code}")
        return JSONResponse({"answer": reply.json()["choices"][0]["message"]["content"].strip()})

    return app


async def read_body(stream: AsyncIterator[bytes]) -> bytes:
    """The whole body. Raises TooLarge as soon as it has more than MAX_BODY_BYTES."""
    body = bytearray()
    async for piece in stream:
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise TooLarge
    return bytes(body)


def read_question(body: bytes) -> str:
    """The question in `body`, without the space around it; "" when there is none to be found."""
    try:
        return msgspec.json.decode(body, type=Asked).question.strip()
    except (msgspec.DecodeError, RecursionError):  # deep nesting in a field that is ignored
        return ""


if __name__ == "__main__":
    run(main)
