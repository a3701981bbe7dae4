"""What stands between the network and the routes: who may ask, by which name, how much, how often, and how slowly."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import math
import re
import socket
import time
from asyncio import TimerHandle
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

PUBLIC = frozenset({"/", "/health", "/ready"})  # answered without a key
PROBED = frozenset({"/health", "/ready"})  # by programs that watch the server, as often as they like
MAX_BODY_BYTES = 256_000  # a conversation of 40 pages
BODY_S = 10  # for the whole of it
MAX_HEAD_BYTES = 64_000
HEAD_S = 10  # for request line and headers
TAKE_S = 30  # without a byte of its reply taken by the client
MAX_CONNECTIONS = 512  # below the 1024 files that a process may have open on most systems
MAX_CALLERS = 10_000  # whose rates are remembered
RETRY_AFTER_S = 5
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d+)?")  # a name or an address, and a port
SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Refused(Exception):
    """A request that is answered with a status and one line."""

    def __init__(self, status: int, line: str, retry_after_s: int | None = None, code: str | None = None) -> None:
        super().__init__(line)
        self.status, self.retry_after_s, self.code = status, retry_after_s, code


class Gone(Exception):
    """The client hung up before it had said what it wants."""


def refusal(path: str, refused: Refused) -> JSONResponse:
    """The reply to a refused request, in OpenAI's form below /v1 and in ours elsewhere."""
    headers = {} if refused.retry_after_s is None else {"Retry-After": str(refused.retry_after_s)}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refused.status in (408, 413):
        headers["Connection"] = "close"  # what is left of the body is not read
    if not path.startswith("/v1/"):
        return JSONResponse({"error": str(refused)}, refused.status, headers)
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        429: "rate_limit_error",
        503: "server_error",
        500: "server_error",
    }
    error = {"message": str(refused), "type": kinds.get(refused.status, "invalid_request_error"), "code": refused.code}
    return JSONResponse({"error": error}, refused.status, headers)


class Guard:
    """ASGI middleware that answers what must not reach the routes, and hands them each body whole.

    `host` is the address that the server listens on, `names` the host names that it may be asked by beside that, `keys` the
    keys of which a caller must have one; without any, everyone who reaches the server may ask.
    """

    def __init__(self, app: ASGIApp, host: str, names: Sequence[str], keys: Sequence[str], requests_per_minute: int) -> None:
        self.app = app
        self.host, self.names = host, {name.lower() for name in names}
        self.keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.rates = Rates(requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            body = await self.admit(scope, Headers(scope=scope), receive)
        except Refused as refused:
            await refusal(scope["path"], refused)(scope, receive, secured)
            return
        except Gone:
            return
        await self.app(scope, replaying(body, receive), secured)

    async def admit(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        """The body of a request that may reach the routes. Raises Refused, and Gone."""
        check_host(headers, self.host, self.names)
        address = address_of(scope)
        key = key_of(headers, self.keys)
        if self.keys and key is None and scope["path"] not in PUBLIC:
            self.check_rate(address)  # so that nobody tries many
            raise Refused(401, "This server asks for a key, sent as: Authorization: Bearer <key>", code="invalid_api_key")
        if scope["path"] not in PROBED:
            self.check_rate(address if key is None else f"key {key}")
        return await whole_body(headers, receive)

    def check_rate(self, caller: str) -> None:
        wait_s = self.rates.wait_s(caller, time.monotonic())
        if wait_s:
            raise Refused(429, "Too many requests; ask more slowly", math.ceil(wait_s), "rate_limit_exceeded")


class JsonRoute(APIRoute):
    """A route that gets nothing but proper JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's, behind the checks of type and text."""
        handler = super().get_route_handler()

        async def checked(request: Request) -> Response:
            if self.body_field is not None:
                check_json_type(request.headers)
                check_json(await request.body())
            return await handler(request)

        return checked


class Rates:
    """Lets each caller through `per_minute` times a minute, all of them at once if it likes. The last MAX_CALLERS are remembered."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self.left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller -> requests left, and when

    def wait_s(self, caller: str, now: float) -> float:
        """0 where `caller` may ask at `now`, which counts as a request; else the seconds until it may."""
        left, at = self.left.pop(caller, (self.per_minute, now))
        left = min(self.per_minute, left + (now - at) * self.per_minute / 60)
        may = left >= 1
        self.left[caller] = (left - may, now)
        if len(self.left) > MAX_CALLERS:
            self.left.popitem(last=False)
        return 0 if may else (1 - left) * 60 / self.per_minute


def check_host(headers: Headers, host: str, names: set[str]) -> None:
    """Raises Refused unless the request names this server, and comes from a program or from a page of this server.

    A page whose name an attacker points at this machine shares its origin with the server, but has its own name in `Host`.
    """
    asked = [host.lower() for host in headers.getlist("host")]
    named = HOST.fullmatch(asked[0]) if len(asked) == 1 else None
    if named is None or not is_ours(named[1].strip("[]"), host, names):
        raise Refused(403, "The Host header does not name this server; serve.hosts lists the names that do")
    if headers.get("origin", f"http://{asked[0]}").lower() not in (f"http://{asked[0]}", f"https://{asked[0]}"):
        raise Refused(403, "Pages of other origins may not use this server")


def is_ours(name: str, host: str, names: set[str]) -> bool:
    """Whether a server that listens on `host` goes by `name`."""
    if name == "localhost" or name in names:
        return True
    try:
        address = ipaddress.ip_address(name)  # which, unlike a name, points nowhere else
    except ValueError:
        return False
    return address.is_loopback or not is_loopback(host)


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address_of(scope: Scope) -> str:
    """Whose rate counts where there is no key: the address, of which an IPv6 user has a whole /64."""
    address = (scope.get("client") or ("unknown", 0))[0]
    return address if ":" not in address else str(ipaddress.ip_network(f"{address.partition('%')[0]}/64", strict=False))


def key_of(headers: Headers, keys: Sequence[bytes]) -> int | None:
    """Which of `keys`, which are SHA-256 hashes, the request carries; its time says nothing about them."""
    kind, _, given = headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(given.strip().encode()).digest()
    found = [number for number, key in enumerate(keys) if hmac.compare_digest(key, digest)]
    return found[0] if found and kind.lower() == "bearer" else None


def check_json_type(headers: Headers) -> None:
    """Raises Refused for a body that is not announced as JSON in UTF-8, which also keeps simple forms of other pages out."""
    kind, *options = headers.get("content-type", "").lower().replace(" ", "").split(";")
    charset = [
        option
        for option in options
        if option.startswith("charset=") and option.strip('"') not in ("charset=utf-8", 'charset="utf-8')
    ]
    if kind != "application/json" or charset or headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "Send JSON in UTF-8, uncompressed, with the header Content-Type: application/json")


async def whole_body(headers: Headers, receive: Receive) -> bytes:
    """Raises Refused as soon as it is larger than MAX_BODY_BYTES, says that it is, or takes longer than BODY_S. Raises Gone."""
    too_large = Refused(413, f"The body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
    if int(headers.get("content-length", "0")) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise Refused(408, f"The body took longer than {BODY_S} s") from None


def check_json(body: bytes) -> None:
    """Raises Refused for what two JSON parsers could read in two ways, or not at all."""
    try:
        msgspec.json.decode(body)  # strict about UTF-8, surrogates and the size of numbers, which json.loads is not
        json.loads(body, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refused(400, f"The body is not proper JSON: {reason}", code="invalid_json") from None


def _unique(pairs: list[tuple[str, Any]]) -> None:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("an object has a name twice")


def replaying(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body`, and then what `receive` gives."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


def escaped(text: str) -> str:
    """`text` on one line for a log, its control characters and what else does not print as escapes."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape", "replace").decode() for letter in text)


class Connection(HttpToolsProtocol):
    """uvicorn's connection, closed when it is one too many, when its headers are too slow or too large, and when its replies are not read.

    uvicorn itself waits for a request, and for a client that reads nothing, for ever.
    """

    head_timer: TimerHandle | None = None
    head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * TAKE_S)
        if len(self.connections) > MAX_CONNECTIONS:
            self.close_with(b"503 Service Unavailable\r\nretry-after: %d" % RETRY_AFTER_S)
        else:
            self.expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self.head_arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.head_timer is None and self.is_idle():  # line feeds before a request begin none
            self.expect_head()
        self.head_bytes += len(data)
        super().data_received(data)
        if self.head_timer and self.head_bytes > MAX_HEAD_BYTES:
            self.close_with(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        if self.head_timer is None:  # a request behind one that is being answered
            self.expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.head_arrived()
        super().on_headers_complete()

    def is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def expect_head(self) -> None:
        self.head_bytes = 0
        self.head_timer = self.loop.call_later(HEAD_S, self.close_with, b"408 Request Timeout")

    def head_arrived(self) -> None:
        if self.head_timer:
            self.head_timer.cancel()
            self.head_timer = None

    def close_with(self, status: bytes) -> None:
        if self.is_idle():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()
