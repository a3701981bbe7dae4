"""vLLM's router, which shares requests among engines: the least loaded gets a new conversation, and keeps it."""

import contextlib
import secrets
import sys
from collections.abc import Iterator, Set

import httpx

from stages.llm.child import Started, running_server
from stages.llm.endpoint import free_port

START_S = 60  # it takes one second on an idle core
CALL_S = 10
# else it asks the proxy of this machine for the engines; it does not understand no_proxy=*
NO_PROXY = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"), "")
OPEN = 4096  # requests at once, far more than ours; it would turn away what is beyond


def own_address() -> str:
    """An address of this machine alone that nobody guesses: the router obeys whoever reaches it."""
    host = f"127.{secrets.randbelow(254) + 1}.{secrets.randbelow(256)}.{secrets.randbelow(254) + 1}"
    return f"http://{host}:{free_port(host)}"


@contextlib.contextmanager
def running_router(address: str, started: Started) -> Iterator[None]:
    """A router at `address` until the block ends, which knows no engine yet. Raises ServerFailed when it does not start.

    A request whose engine ends before the answer has begun is sent to another one.
    """
    host, _, port = address.removeprefix("http://").rpartition(":")
    command = [sys.executable, "-m", "vllm_router.launch_router", "--host", host, "--port", port]
    # not cache_aware: with a system prompt that all conversations begin with, second turns often went to another engine
    command += ["--policy", "sticky_least_loaded", "--max-concurrent-requests", str(OPEN)]
    # for the half second in which a dead engine looks the least loaded
    command += ["--retry-max-retries", "10", "--retry-max-backoff-ms", "1000", "--disable-circuit-breaker"]
    command += ["--prometheus-host", host]  # else a second router finds its port taken
    command += ["--cors-allowed-origins", address, "--log-level", "error"]
    with running_server("vllm-router", command, NO_PROXY, f"{address}/liveness", START_S, started):
        yield


class Workers:
    """The engines that the router at `address` knows, kept to those that answer."""

    def __init__(self, address: str) -> None:
        self._known: set[str] | None = None  # None: to be asked for
        self._client = httpx.AsyncClient(base_url=address, trust_env=False, verify=False, timeout=CALL_S)

    async def become(self, engines: Set[str]) -> None:
        """Makes the router know `engines`, by their addresses, and no others. Raises httpx.HTTPError."""
        known, self._known = self._known, None
        if known is None:
            known = set((await self._call("GET", "/list_workers")).json()["urls"])
        for engine in sorted(known - engines):
            await self._call("POST", "/remove_worker", url=engine)
        for engine in sorted(engines - known):
            await self._call("POST", "/add_worker", url=engine)
        self._known = set(engines)

    def forget(self) -> None:
        """The router has been started again."""
        self._known = None

    async def close(self) -> None:
        await self._client.aclose()

    async def _call(self, method: str, path: str, **query: str) -> httpx.Response:
        return (await self._client.request(method, path, params=query)).raise_for_status()
