"""The HTTP interface: /chat, the routes of OpenAI's API, sources, feedback, figures and the page."""

import asyncio
import base64
import contextlib
import functools
import hashlib
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stages.params import Chat
from stages.program.errors import DocsmithError
from stages.records import Message as Turn
from stages.serving.asking import ANSWER_S, Queue, Usage, body_of, pieces, whole
from stages.serving.engine import Served
from stages.serving.figures import Figures
from stages.serving.limits import PROBED, RETRY_AFTER_S, Guard, JsonRoute, Refused, escaped, refusal
from stages.serving.settings import Serve
from stages.serving.turns import alternating, fits, last_turns, surely_fits

PAGE = Path(__file__).with_name("page.html")
MODEL = "docsmith"  # the name that clients may ask for whichever version answers
REMEMBERED = 10_000  # answers that feedback can be about
EVENTS = "text/event-stream"
FIGURES: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
GONE = 499  # what counts and logs say of a client that hung up before its answer was whole
LOG = logging.getLogger("docsmith.serve")
# JSON has one kind of numbers: to its schemas 3.0 is an integer
WHOLE = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
Stop = Annotated[str, Field(min_length=1, max_length=64)]


class Body(BaseModel):
    """What a client sends: no other fields, no other types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Said(Body):
    """One turn of the conversation so far."""

    role: Literal["user", "assistant"]
    content: str


class Asked(Body):
    """The body of POST /chat."""

    question: Annotated[str, Field(pattern=r"\S")]
    history: list[Said] = []
    stream: bool = False


class StreamOptions(Body):
    include_usage: bool = False


class Completion(Body):
    """The body of POST /v1/chat/completions: of OpenAI's fields, those that cannot hurt others."""

    model: str = MODEL
    messages: Annotated[list[Said], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None

    def sampling(self) -> dict[str, Any]:
        """What of it the engine sees beside the messages."""
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        given = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed, "stop": self.stop}
        return {name: value for name, value in given.items() if value is not None} | (
            {"max_tokens": min(limits)} if limits else {}
        )


class Opinion(Body):
    """The body of POST /feedback; `question` and `answer` only of users who agreed to have them kept."""

    answer_id: Annotated[str, Field(min_length=1, max_length=64)]
    rating: Literal["up", "down"]
    comment: Annotated[str, Field(max_length=2_000)] = ""
    question: Annotated[str, Field(max_length=16_000)] | None = None
    answer: Annotated[str, Field(max_length=64_000)] | None = None


class Place(BaseModel):
    """A place in the documentation that is near the question."""

    kind: Literal["trained", "retrieved"]
    passage_id: str
    path: str
    heading_path: list[str]
    start: int
    end: int
    quote: str
    similarity: float


class Answered(BaseModel):
    answer: str
    id: str
    model: str
    sources: list[Place]
    covered: bool


class Shown(BaseModel):
    """A passage of the documentation."""

    id: str
    path: str
    heading_path: list[str]
    start: int
    end: int
    text: str


class Failed(BaseModel):
    error: str


class OpenAIError(BaseModel):
    message: str
    type: str
    code: str | None


class OpenAIFailed(BaseModel):
    error: OpenAIError


class State(BaseModel):
    status: str
    model: str | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


def application(engine: Any, sources: Any, feedback: Any, serve: Serve, chat: Chat, host: str, keys: Sequence[str]) -> FastAPI:
    """The FastAPI application that puts questions to the model of `engine`, for those who have one of `keys`, or for all without any.

    `host` is the address that the server listens on.
    """
    queue = Queue(engine, serve)
    figures = Figures(queue)
    answered_by: OrderedDict[str, str] = OrderedDict()  # id of an answer -> version of the model
    page = PAGE.read_bytes()
    page_headers = {"Content-Security-Policy": policy_of(page)}

    app = FastAPI(title="Docsmith", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Guard, host=host, names=serve.hosts, keys=keys, requests_per_minute=serve.requests_per_minute)
    app.add_middleware(Watched, figures=figures)
    app.router.route_class = JsonRoute
    with_key: dict[str, Any] = {"dependencies": [Security(HTTPBearer(auto_error=False))]} if keys else {}

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return refusal(request.url.path, error)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        reply = refusal(request.url.path, Refused(error.status_code, str(error.detail)))
        reply.headers.update(error.headers or {})
        return reply

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"][1:])[:100]
        if request.url.path == "/chat" and where in ("", "question"):
            return refusal("/chat", Refused(400, "No question provided"))
        return refusal(request.url.path, Refused(422, f"{where or 'body'}: {fault['msg']}", code="invalid_value"))

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=page_headers)

    @app.get("/health", responses=_replies(State))
    async def health() -> Response:
        """200 while the server lives, whether or not a model answers."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready", responses=_replies(State, 503))
    async def ready() -> Response:
        """200 while a model answers."""
        if not engine.ready or engine.served is None:
            raise Refused(503, "The model does not answer yet", RETRY_AFTER_S)
        return JSONResponse({"status": "ready", "model": engine.served.version})

    @app.get("/metrics", response_class=Response, responses=FIGURES | _replies(None, 401), **with_key)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(figures.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/passages/{id}", responses=_replies(Shown, 401, 404), **with_key)
    async def passage(id: str) -> Response:
        """A passage of the documentation that an answer names as a source."""
        found = sources.passage(id)
        if found is None:
            raise Refused(404, "There is no such passage in the documentation of this model")
        return _json({name: getattr(found, name) for name in Shown.model_fields})

    @app.post(
        "/feedback",
        status_code=204,
        response_class=Response,
        responses=_replies(None, 400, 401, 404, 408, 415, 422, 503),
        **with_key,
    )
    async def opinion(said: Opinion) -> Response:
        """What a user thinks of an answer of this server."""
        model = answered_by.get(said.answer_id)
        if model is None:
            raise Refused(404, "This server remembers no such answer")
        try:
            await asyncio.to_thread(feedback.add, said.answer_id, model, said.rating, said.comment, said.question, said.answer)
        except DocsmithError:
            LOG.exception("feedback is lost")
            raise Refused(503, "The feedback could not be stored", RETRY_AFTER_S) from None
        return Response(status_code=204)

    @app.post("/chat", responses=_replies(Answered, 400, 401, 408, 415, 422, 503, events=("delta", "done", "error")), **with_key)
    async def answer(asked: Asked) -> Response:
        """An answer with its sources; with `stream`, server-sent events: `delta` for each piece, then `done`, or `error`."""
        if not asked.question.strip():  # Python takes a few more letters for white space than the pattern does
            raise Refused(400, "No question provided")
        turns = [Turn(said.role, said.content) for said in asked.history] + [Turn("user", asked.question.strip())]
        return Live(lambda send: to_chat(turns, asked.question, asked.stream, send))

    async def to_chat(turns: list[Turn], question: str, stream: bool, send: "Sender") -> None:
        started = time.monotonic()
        find = functools.partial(asyncio.to_thread, sources.find, question, serve.min_similarity)
        async with queue.turn() as served:
            body = body_of(served, await shortened(turns, question, served), chat, {}, stream)
            if stream:
                async with contextlib.aclosing(pieces(served, body)) as events:
                    async for _, event in events:
                        if event.text and not send.has_begun:
                            figures.first_token_s.observe(time.monotonic() - started)
                            await send.event(b"delta", {"text": event.text})
                            finding = asyncio.create_task(find())  # not sooner: it would take a core from the first token
                        elif event.text:
                            await send.event(b"delta", {"text": event.text})
                        figures.count(event.usage)
                finding = finding if send.has_begun else asyncio.create_task(find())
            else:
                finding = asyncio.create_task(find())
                reply = await whole(served, body)
                figures.count(msgspec.convert(reply["usage"], Usage))
        found = await finding
        id = secrets.token_hex(12)
        answered_by[id] = served.version
        if len(answered_by) > REMEMBERED:
            answered_by.popitem(last=False)
        end = {"id": id, "model": served.version, "sources": found.sources, "covered": found.covered}
        if stream:
            await send.event(b"done", end)
        else:
            text = reply["choices"][0]["message"]["content"] or ""
            await send.reply(_json({"answer": text.strip(), **end}))

    @app.get("/v1/models", responses=_replies(ModelList, 401, 503, error=OpenAIFailed), **with_key)
    async def models() -> Response:
        """The names that requests may ask for: that of whichever version answers, and that of the version that answers now."""
        if engine.served is None:
            raise Refused(503, "The model does not answer yet", RETRY_AFTER_S)
        named = [{"id": id, "object": "model", "created": 0, "owned_by": MODEL} for id in (MODEL, engine.served.version)]
        return JSONResponse({"object": "list", "data": named})

    @app.post(
        "/v1/chat/completions",
        responses=_replies(dict[str, Any], 400, 401, 404, 408, 415, 422, 503, events=("message",), error=OpenAIFailed),
        **with_key,
    )
    async def complete(asked: Completion) -> Response:
        """OpenAI's chat completions."""
        if asked.messages[-1].role != "user" or not asked.messages[-1].content.strip():
            raise Refused(400, "messages: the last one must be a user's, with words in it", code="invalid_messages")
        turns = [Turn(said.role, said.content) for said in asked.messages]
        return Live(lambda send: to_completion(turns, asked, send))

    async def to_completion(turns: list[Turn], asked: Completion, send: "Sender") -> None:
        started = time.monotonic()
        async with queue.turn() as served:
            if asked.model not in (MODEL, served.version):
                raise Refused(
                    404,
                    f"The model {escaped(asked.model[:100])!r} is not served; GET /v1/models lists what is",
                    code="model_not_found",
                )
            turns = await shortened(turns, asked.messages[-1].content, served)
            body = body_of(served, turns, chat, asked.sampling(), asked.stream)
            if not asked.stream:
                await send.reply(JSONResponse(public(await whole(served, body), served)))
                return
            theirs, ours = (b'"model":' + msgspec.json.encode(name) for name in (served.endpoint.model, served.version))
            async with contextlib.aclosing(pieces(served, body)) as events:
                async for data, event in events:
                    if not send.has_begun:
                        figures.first_token_s.observe(time.monotonic() - started)
                    if event.usage is None:
                        await send.data(data.replace(theirs, ours, 1))
                        continue
                    told = public(msgspec.json.decode(data), served)
                    if asked.stream_options is not None and asked.stream_options.include_usage:
                        await send.data(msgspec.json.encode(told))
            await send.data(b"[DONE]")

    async def shortened(turns: list[Turn], question: str, served: Served) -> list[Turn]:
        """`turns` with passages of the documentation where there are to be some, without the oldest ones that have no room."""
        tokens = served.release.control_tokens
        turns = alternating(turns, tokens)
        try:
            if serve.passages:

                def has_room(text: str) -> bool:
                    return fits([Turn("user", text)], served.release, served.endpoint, chat)

                prompt = await asyncio.to_thread(sources.prompt, question, serve.passages, has_room)
                turns = alternating([*turns[:-1], Turn("user", prompt)], tokens)
            if surely_fits(turns, served.release, chat):
                return turns
            kept = await asyncio.to_thread(last_turns, turns, served.release, served.endpoint, chat)
        except DocsmithError:
            raise Refused(503, "The model does not answer; ask again", RETRY_AFTER_S, "engine_failed") from None
        if not kept:
            raise Refused(
                413, f"The question is longer than the context of {chat.context_tokens} tokens", code="context_length_exceeded"
            )
        return kept

    def public(reply: dict[str, Any], served: Served) -> dict[str, Any]:
        """The engine's reply without what it says about others: how much of this conversation somebody had asked before."""
        figures.count(msgspec.convert(reply["usage"], Usage))
        reply["usage"].pop("prompt_tokens_details", None)
        return {name: value for name, value in reply.items() if name != "timings"} | {"model": served.version}

    return app


class Watched:
    """ASGI middleware that counts and logs each request, without what was asked."""

    def __init__(self, app: ASGIApp, figures: Figures) -> None:
        self.app, self.figures = app, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, started = GONE, time.monotonic()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception:
            status = 500
            raise
        finally:
            status = scope.get("failed", status)
            route = getattr(scope.get("route"), "path", "none")
            self.figures.requests.labels(route, str(status)).inc()
            if route not in PROBED:
                LOG.info("%s %s %d %.0f ms", scope["method"], escaped(scope["path"]), status, 1000 * (time.monotonic() - started))


class Live(Response):
    """An answer as it is made; the making ends when the client hangs up."""

    def __init__(self, answer: "Callable[[Sender], Awaitable[None]]") -> None:
        super().__init__()
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = Sender(scope, receive, send)
        tasks = [asyncio.create_task(self.made(sender)), asyncio.create_task(hung_up(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                scope["failed"] = GONE
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(ends[0], Exception):
            raise ends[0]

    async def made(self, sender: "Sender") -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                await self.answer(sender)
        except TimeoutError:
            await sender.fail(Refused(503, f"There was no answer within {ANSWER_S} s", RETRY_AFTER_S, "timeout"))
        except Refused as refused:
            await sender.fail(refused)
        await sender.end()


async def hung_up(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Sender:
    """Where an answer goes: one reply, or server-sent events, of which the first sends the headers."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.receive, self.send = scope, receive, send
        self.has_begun = False

    async def reply(self, response: Response) -> None:
        await response(self.scope, self.receive, self.send)

    async def event(self, name: bytes, fields: dict[str, Any]) -> None:
        await self.write(b"event: " + name + b"\ndata: " + msgspec.json.encode(fields) + b"\n\n")

    async def data(self, data: bytes) -> None:
        await self.write(b"data: " + data + b"\n\n")

    async def write(self, body: bytes) -> None:
        if not self.has_begun:
            self.has_begun = True
            headers = [(b"content-type", EVENTS.encode()), (b"x-accel-buffering", b"no")]
            await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        if self.has_begun:
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, refused: Refused) -> None:
        if not self.has_begun:
            await self.reply(refusal(self.scope["path"], refused))
            return
        self.scope["failed"] = refused.status
        if self.scope["path"].startswith("/v1/"):
            await self.data(bytes(refusal(self.scope["path"], refused).body))
        else:
            await self.event(b"error", {"error": str(refused), "retry_after_s": refused.retry_after_s})


def policy_of(page: bytes) -> str:
    """The Content-Security-Policy of a page that runs its own scripts and styles, by their hashes, and asks this server only."""

    def hashes(tag: bytes) -> str:
        inline = re.findall(rb"<%b\b[^>]*>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in inline) or "'none'"

    return (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _replies(
    kind: Any, *statuses: int, error: type[BaseModel] = Failed, events: Sequence[str] = ()
) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI description says that a route answers: `kind`, or one of `statuses`."""
    described: dict[int | str, dict[str, Any]] = {}
    if kind is not None:
        sent = {"event": {"enum": list(events)}, "data": {"type": "string"}}
        schema = {"type": "object", "properties": sent, "required": ["data"]}  # OpenAPI's words for one event
        described[200] = {"model": kind} | ({"content": {EVENTS: {"schema": schema}}} if events else {})
    for status in (403, 413, 429, *statuses):
        described[status] = {"model": error, "description": HTTPStatus(status).phrase}
        if status in (429, 503):
            described[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait"}}
    return described
