"""Endpoints that share the calls: which one gets the next, which one rests, and whether each still serves the model it did."""

import asyncio
import ipaddress
import os
import re
import time
from collections.abc import Sequence
from typing import Annotated, Any

import httpx
import msgspec

from stages.llm.endpoint import Endpoint
from stages.program.errors import ServerFailed

REST_AFTER = 5  # failed calls in a row
FIRST_REST_S, MAX_REST_S = 0.5, 10.0  # each rest is twice as long as the one before, until a call succeeds
GONE_AFTER = 4  # rests in a row after which a server could not be reached
PROBE_S = 10.0
MAX_RETRY_AFTER_S = 60.0
MAX_REPLY_BYTES = 4_000_000
VOLATILE = {"created", "permission"}  # vLLM makes them up for each listing


class CallFailed(Exception):
    """A call has no completion; the text is the reason. `may_pass`: another try may go better."""

    def __init__(self, reason: str, may_pass: bool = False) -> None:
        super().__init__(" ".join(reason.split())[:300])
        self.may_pass = may_pass


class AllGone(Exception):
    """No endpoint can be reached; the text is why."""


class Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class Choice(msgspec.Struct):
    message: Message
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    completion_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0


class Completion(msgspec.Struct):
    """The part of an OpenAI-style completion that is used."""

    choices: list[Choice]
    model: str | None = None
    usage: Usage | None = None


class Listing(msgspec.Struct):
    data: list[dict[str, Any]]


class Server:
    """One endpoint: its connections, its load and health, and the model that it says it serves."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.name = f"the LLM server at {endpoint.url}"
        self.key = _api_key(endpoint)
        headers = {"Accept-Encoding": "identity"}  # a packed reply could unpack to far more than MAX_REPLY_BYTES at once
        self.client = httpx.AsyncClient(
            headers=headers | ({"Authorization": f"Bearer {self.key}"} if self.key else {}),
            timeout=httpx.Timeout(None, connect=PROBE_S),  # the whole call has a limit, not each read
            limits=httpx.Limits(keepalive_expiry=2),  # before servers close idle connections, commonly after 5 s
            trust_env=not _is_loopback(endpoint.url),
        )
        self.lock = asyncio.Lock()
        self.load = self.failures = self.lost_probes = 0
        self.rests_until = 0.0
        self.rest_s = FIRST_REST_S
        self.reason = ""
        self.is_known = False
        self.listed: dict[str, Any] | None = None
        self.answered_as: str | None = None

    async def complete(self, body: dict[str, Any], timeout_s: float) -> Completion:
        """The completion for `body`. Raises CallFailed, and ServerFailed when another model answered."""
        try:
            async with asyncio.timeout(timeout_s):
                response, content = await self.send("POST", "/chat/completions", json={"model": self.endpoint.model, **body})
        except (TimeoutError, httpx.RequestError) as error:
            reason = self.reason_of(error)
            self.is_known = False
            self.stumble(reason, is_refused=isinstance(error, httpx.ConnectError | httpx.ConnectTimeout))
            raise CallFailed(reason, may_pass=True) from None
        self.check_key(response)
        if response.status_code != 200:
            reason = f"status {response.status_code}: {self.without_key(_error_in(content))}"
            asked_s = response.headers.get("Retry-After", "")
            if re.fullmatch(r"\d+(\.\d+)?", asked_s):
                self.rests_until = time.monotonic() + min(float(asked_s), MAX_RETRY_AFTER_S)
            if response.status_code >= 500:
                self.stumble(reason)
            raise CallFailed(reason, may_pass=response.status_code in (408, 409, 425, 429) or response.status_code >= 500)
        self.failures, self.rest_s = 0, FIRST_REST_S
        try:
            completion = msgspec.json.decode(content, type=Completion)
        except (ValueError, RecursionError) as error:
            raise CallFailed(f"unreadable reply: {error}") from None
        if completion.model and completion.model != (self.answered_as or completion.model):
            raise ServerFailed(
                f"{self.name} answered as model {completion.model}, and as {self.answered_as} before: give each model its own "
                "server and its own entry in params.yaml. The replies from before are kept. Resume with: dvc repro"
            )
        self.answered_as = self.answered_as or completion.model
        return completion

    async def is_ready(self) -> bool:
        """Whether calls may go to it; one that was never called, or that broke off, is looked at first."""
        async with self.lock:
            if not self.is_known and self.rests_until <= time.monotonic():
                await self.look()
            return self.is_known

    async def look(self) -> None:
        """Reads the server's list of models. Raises ServerFailed when its model is not there, or not as it was before."""
        try:
            async with asyncio.timeout(PROBE_S):
                response, content = await self.send("GET", "/models")
            if response.status_code >= 500:
                raise CallFailed(f"status {response.status_code}")
        except (TimeoutError, httpx.RequestError, CallFailed) as error:
            self.lost_probes += 1
            return self.stumble(self.reason_of(error), is_refused=True)
        self.lost_probes = self.failures = 0
        self.check_key(response)
        self.is_known = True
        if response.status_code != 200:  # no such route
            return
        try:
            listing = msgspec.json.decode(content, type=Listing | list[dict[str, Any]])
        except (ValueError, RecursionError):
            raise ServerFailed(f"{self.name} has no OpenAI-style list at /models; check the url in params.yaml") from None
        models = {str(entry.get("id")): entry for entry in (listing.data if isinstance(listing, Listing) else listing)}
        name = self.endpoint.model
        entry = models.get(name, models.get(f"{name}:latest"))  # Ollama's name for it
        if entry is None:
            ids = ", ".join(sorted(models)[:8]) + (" …" if len(models) > 8 else "")
            raise ServerFailed(
                f"{self.name} has no model {name}; it has {ids or 'none'}. Set the endpoint's model in params.yaml"
            )
        entry = {field: value for field, value in entry.items() if field not in VOLATILE}
        before = self.listed or entry
        if changed := sorted(field for field in {*entry, *before} if entry.get(field) != before.get(field)):
            raise ServerFailed(
                f"{self.name} came back with another model under the name {name} ({', '.join(changed)} changed): give each model "
                "a name of its own. The replies from before are kept. Resume with: dvc repro"
            )
        self.listed = entry

    def check_key(self, response: httpx.Response) -> None:
        if response.status_code == 401:
            name = self.endpoint.api_key_env
            advice = f"check the one in {name}" if name else "name the environment variable that holds it in api_key_env"
            raise ServerFailed(f"{self.name} asks for another key (status 401); {advice}")

    async def send(self, method: str, path: str, **options: Any) -> tuple[httpx.Response, bytes]:
        content = bytearray()
        async with self.client.stream(method, self.endpoint.url + path, **options) as response:
            async for part in response.aiter_bytes():
                content += part
                if len(content) > MAX_REPLY_BYTES:
                    raise CallFailed(f"unreadable reply: more than {MAX_REPLY_BYTES // 1_000_000} MB")
        return response, bytes(content)

    def stumble(self, reason: str, is_refused: bool = False) -> None:
        """Counts a failure; after REST_AFTER in a row, or when nobody is there, the server rests."""
        self.failures += 1
        self.reason = reason
        now = time.monotonic()
        if self.rests_until <= now and (is_refused or self.failures >= REST_AFTER):
            self.rests_until = now + self.rest_s
            self.rest_s = min(2 * self.rest_s, MAX_REST_S)
            self.is_known = False

    def reason_of(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return "timed out"
        return self.without_key(f"unreachable: {str(error) or type(error).__name__}")

    def without_key(self, text: str) -> str:
        return text.replace(self.key, "…") if self.key else text


class Pool:
    """Servers that calls are shared among; an asynchronous context manager."""

    def __init__(self, endpoints: Sequence[Endpoint], timeout_s: float) -> None:
        self.servers = [Server(endpoint) for endpoint in endpoints]
        self.timeout_s = timeout_s
        self.homes: dict[str, Server] = {}  # group -> the server that has its prefix cached

    async def __aenter__(self) -> "Pool":
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self.servers:
            await server.client.aclose()

    async def complete(self, body: dict[str, Any], group: str, tried: set[Server]) -> Completion:
        """The completion for `body` by the group's server, or the least loaded; by one that is not in `tried`, if it can be.

        Adds the server to `tried`. Raises CallFailed, AllGone and ServerFailed.
        """
        server = await self._chosen(group, tried)
        tried.add(server)
        try:
            return await server.complete(body, self.timeout_s)
        finally:
            server.load -= 1

    async def _chosen(self, group: str, tried: set[Server]) -> Server:
        """A server that may be called now, its load counted up; waits while all of them rest."""
        while True:
            now = time.monotonic()
            awake = [server for server in self.servers if server.rests_until <= now]
            if not awake:
                if all(server.lost_probes >= GONE_AFTER for server in self.servers):
                    raise AllGone(self.servers[0].reason)
                await asyncio.sleep(min(server.rests_until for server in self.servers) - now)
                continue
            home = self.homes.get(group)
            untried = [server for server in awake if server not in tried] or awake
            server = home if home in untried else min(untried, key=lambda server: server.load)
            if group and home not in awake:
                self.homes[group] = server
            server.load += 1
            is_ready = False
            try:
                is_ready = await server.is_ready()
            finally:
                server.load -= not is_ready
            if is_ready:
                return server


def _api_key(endpoint: Endpoint) -> str:
    if not endpoint.api_key_env:
        return ""
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ServerFailed(f"{endpoint.url} needs a key, and the environment variable {endpoint.api_key_env} holds none; set it")
    return key


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _error_in(content: bytes) -> str:
    """What an error body says, in any of the forms in use; else its start."""
    try:
        body = msgspec.json.decode(content)
        error = body.get("error", body)
        return str(error if isinstance(error, str) else error["message"])
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return content[:200].decode(errors="replace")
