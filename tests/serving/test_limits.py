import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from small_api import listening
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from stages.serving import limits
from stages.serving.limits import (
    MAX_BODY_BYTES,
    Guard,
    Rates,
    Refused,
    address_of,
    check_json,
    check_json_type,
    escaped,
    is_ours,
    key_of,
)

KEYS = ("first-key-of-sixteen", "other-key-of-sixteen")


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the length of the body."""
    if scope["type"] == "http":
        body = (await receive())["body"]
        await PlainTextResponse(f"{scope['path']} {len(body)}")(scope, receive, send)


@contextlib.contextmanager
def guarded(names: tuple[str, ...] = (), keys: tuple[str, ...] = (), per_minute: int = 100_000) -> Iterator[str]:
    with listening(Guard(echo, "127.0.0.1", names, keys, per_minute), lifespan="off") as address:
        yield address


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with guarded(("docs.example",)) as address:
        yield address


def raw(address: str, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """What the server answers to `parts`, sent as they are, until it closes the connection."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause_s)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                answer += piece
        return answer


def memory_kb() -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:1", "127.0.0.1", "127.0.0.2", "[::1]:80", "docs.example", "DOCS.example:1"]
)
def test_the_names_of_this_server_are_answered(address: str, host: str) -> None:
    assert httpx.get(address, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.0.1", "0.0.0.0", "", "evil@", "[::1", "docs.example.",
     "127.0.0.1, evil.example", "2130706433", "localhost\\"],
)  # fmt: skip
def test_a_name_that_an_attacker_points_at_this_machine_is_refused(address: str, host: str) -> None:
    assert httpx.get(address, headers={"Host": host}).status_code == 403


def test_a_request_with_two_hosts_or_none_is_refused(address: str) -> None:
    for head in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
        assert raw(address, b"GET / HTTP/1.1\r\n" + head + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 403 ")


def test_a_server_for_other_machines_is_asked_by_address_or_by_a_listed_name() -> None:
    assert is_ours("192.168.0.1", "0.0.0.0", set()) and is_ours("fe80::1", "::", set())
    assert is_ours("docs.example", "0.0.0.0", {"docs.example"})
    assert not is_ours("evil.example", "0.0.0.0", {"docs.example"})


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://127.0.0.1", "http://localhost:{port}", "file://"])
def test_pages_of_other_origins_are_refused_and_no_reply_lets_them_read(address: str, origin: str) -> None:
    port = address.rpartition(":")[2]
    for method in ("GET", "POST", "OPTIONS"):
        reply = httpx.request(method, f"{address}/chat", headers={"Origin": origin.format(port=port)})
        assert reply.status_code == 403
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_pages_of_this_server_are_answered_also_behind_a_proxy_with_encryption(address: str) -> None:
    assert httpx.get(address, headers={"Origin": address}).status_code == 200
    assert httpx.get(address, headers={"Host": "docs.example", "Origin": "https://docs.example"}).status_code == 200


def test_every_reply_carries_the_headers_that_browsers_heed(address: str) -> None:
    for reply in (httpx.get(address), httpx.get(address, headers={"Host": "evil.example"})):
        assert reply.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer wrong", 401),
        (f"Basic {KEYS[0]}", 401),
        (f"Bearer {KEYS[0]}x", 401),
        (f"Bearer {KEYS[0]},{KEYS[1]}", 401),
        (f"Bearer {KEYS[0]}", 200),
        (f"bearer  {KEYS[1]}", 200),
    ],
)
def test_a_key_is_needed_where_there_are_keys(authorization: str | None, status: int) -> None:
    with guarded(keys=KEYS) as address:
        headers = {} if authorization is None else {"Authorization": authorization}
        reply = httpx.get(f"{address}/chat", headers=headers)
        public = [httpx.get(f"{address}{path}").status_code for path in ("/", "/health", "/ready")]
    assert (reply.status_code, public) == (status, [200, 200, 200])
    assert (reply.headers.get("www-authenticate") == "Bearer") == (status == 401)


@pytest.mark.parametrize(
    "path", ["//", "/health/", "/ready/x", "/HEALTH", "/%2e%2e/chat", "/health/../chat", "//health", "/health%00", "/\\health"]
)
def test_no_other_spelling_of_a_public_path_is_public(path: str) -> None:
    with guarded(keys=KEYS) as address:
        line = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        assert raw(address, line).split(b" ")[1] in (b"400", b"401")


def test_a_key_is_found_whichever_it_is_and_keys_are_kept_as_hashes() -> None:
    guard = Guard(echo, "127.0.0.1", (), KEYS, 1)
    assert [key_of(Headers({"authorization": f"Bearer {key}"}), guard.keys) for key in (*KEYS, "none")] == [0, 1, None]
    assert not [key for key in KEYS if key.encode() in b"".join(guard.keys)]


def test_a_caller_above_its_rate_waits_and_others_do_not() -> None:
    rates = Rates(per_minute=2)
    assert [rates.wait_s("one", now=0.0) for _ in range(2)] == [0, 0]
    assert rates.wait_s("one", now=0.0) == 30
    assert rates.wait_s("other", now=0.0) == 0
    assert rates.wait_s("one", now=15.0) == 15
    assert rates.wait_s("one", now=30.0) == 0
    assert rates.wait_s("one", now=30.0) == 30


def test_only_the_last_callers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CALLERS", 3)
    rates = Rates(per_minute=1)
    for caller in "abcd":
        rates.wait_s(caller, now=0.0)
    assert list(rates.left) == ["b", "c", "d"]


def test_the_rate_is_that_of_a_key_or_else_of_an_address_and_probes_have_none() -> None:
    with guarded(keys=KEYS, per_minute=2) as address:
        statuses = [httpx.get(f"{address}/x", headers={"Authorization": f"Bearer {KEYS[0]}"}).status_code for _ in range(3)]
        other = httpx.get(f"{address}/x", headers={"Authorization": f"Bearer {KEYS[1]}"})
        guesses = [httpx.get(f"{address}/x", headers={"X-Forwarded-For": f"10.0.0.{n}"}) for n in range(3)]
        probes = [httpx.get(f"{address}/health").status_code for _ in range(5)]
    assert statuses == [200, 200, 429]
    assert other.status_code == 200
    assert [reply.status_code for reply in guesses] == [401, 401, 429]
    assert 25 <= int(guesses[-1].headers["retry-after"]) <= 30
    assert probes == [200] * 5


def test_a_user_of_ipv6_is_a_network() -> None:
    assert address_of({"client": ("2001:db8::1:2:3:4", 1)}) == address_of({"client": ("2001:db8::9", 1)}) == "2001:db8::/64"
    assert address_of({"client": ("10.0.0.1", 1)}) == "10.0.0.1"


@pytest.mark.parametrize(
    ("kind", "is_taken"),
    [
        ("application/json", True),
        ("Application/JSON; charset=UTF-8", True),
        ('application/json;charset="utf-8"', True),
        ("", False),
        ("text/plain", False),
        ("application/x-www-form-urlencoded", False),
        ("application/json; charset=utf-16", False),
        ("application/jsonx", False),
    ],
)
def test_only_json_in_utf8_is_taken(kind: str, is_taken: bool) -> None:
    with contextlib.nullcontext() if is_taken else pytest.raises(Refused, match="Send JSON"):
        check_json_type(Headers({"content-type": kind}))


def test_compressed_json_is_not_taken() -> None:
    with pytest.raises(Refused, match="uncompressed"):
        check_json_type(Headers({"content-type": "application/json", "content-encoding": "gzip"}))


@pytest.mark.parametrize(
    "body",
    [b"", b"question", b"\xff", b'"\xff"', b'{"a": "\\ud800"}', b"NaN", b"1e400", b"1" * 5000, b'{"a": 1, "a": 1}', b'[{"b": {"a": 1, "a": 2}}]',
     b"[" * 100_000, b'{"a":' * 40_000, b"\xef\xbb\xbf{}", b'"\x00"', b"{} {}", '{"a": 1}'.encode("utf-16")],
)  # fmt: skip
def test_json_that_could_be_read_in_two_ways_is_refused(body: bytes) -> None:
    with pytest.raises(Refused, match="The body is not proper JSON") as refused:
        check_json(body)
    assert refused.value.status == 400
    assert len(str(refused.value)) < 200


def test_proper_json_is_taken() -> None:
    check_json('{"a": [{"b": "\\u0000é🚀"}, {"b": 1e30}], "b": {"a": null}}'.encode())


@pytest.mark.parametrize("length", [MAX_BODY_BYTES + 1, 6_000_000_000])
def test_a_body_that_says_it_is_too_large_is_not_waited_for(address: str, length: int) -> None:
    head = f"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()
    assert raw(address, head).startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_without_an_end_is_cut_off_and_memory_stays_flat(address: str) -> None:
    head = b"POST /chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    before = memory_kb()
    answer = raw(address, head, *[b"10000\r\n" + b"x" * 65536 + b"\r\n"] * 3200)  # 200 MB
    assert answer.startswith(b"HTTP/1.1 413 ") or answer == b""  # closed while it was sent
    assert memory_kb() - before < 50_000
    assert httpx.get(address).status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: -1\r\n",
        b"Content-Length: 1e3\r\n",
        b"Content-Length: 3\r\nContent-Length: 4\r\n",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
    ],
)
def test_a_length_that_is_none_is_refused(address: str, head: bytes) -> None:
    assert raw(address, b"POST /chat HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_body_of_the_largest_size_arrives_whole_however_it_is_sent(address: str) -> None:
    body = b"x" * MAX_BODY_BYTES

    def pieces() -> Iterator[bytes]:
        yield from (body[at : at + 10_000] for at in range(0, len(body), 10_000))

    assert httpx.post(f"{address}/chat", content=body).text == f"/chat {MAX_BODY_BYTES}"
    assert httpx.post(f"{address}/chat", content=pieces()).text == f"/chat {MAX_BODY_BYTES}"


def test_a_slow_body_and_slow_headers_get_408_and_others_are_answered_meanwhile(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_S", 0.5)
    monkeypatch.setattr(limits, "HEAD_S", 0.5)
    started = time.monotonic()
    slow_body = b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    for parts in (
        [slow_body, b"x", b"x", b"x"],
        [b"GET / HTTP/1.1\r\n", b"A: b\r\n", b"C: d\r\n", b"E: f\r\n"],
        [b"\r\n"] * 4,
        [],
    ):
        assert raw(address, *parts, pause_s=0.2).startswith(b"HTTP/1.1 408 "), parts
        assert httpx.get(address).status_code == 200
    assert time.monotonic() - started < 8


def test_headers_without_an_end_are_cut_off(address: str) -> None:
    before = memory_kb()
    answer = raw(address, b"GET / HTTP/1.1\r\n", *[b"A: " + b"x" * 16_000 + b"\r\n"] * 3000)
    assert answer.startswith(b"HTTP/1.1 431 ") or answer == b""
    assert memory_kb() - before < 50_000


def test_headers_behind_a_request_that_is_being_answered_are_cut_off_too() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(3)

    with listening(slow, lifespan="off") as address:
        before, started = memory_kb(), time.monotonic()
        raw(address, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTTP/1.1\r\n", *[b"A: " + b"x" * 16_000 + b"\r\n"] * 3000)
        assert time.monotonic() - started < 2
        assert memory_kb() - before < 50_000


def test_a_client_that_reads_nothing_of_its_reply_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TAKE_S", 1)

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("x" * 20_000_000)(scope, receive, send)

    with listening(large, lifespan="off") as address, socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = address.removeprefix("http://").split(":")
        lazy.settimeout(10)
        lazy.connect((host, int(port)))
        lazy.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(4)
        with pytest.raises(ConnectionResetError):
            while lazy.recv(65536):
                pass
        assert len(httpx.get(address).content) == 20_000_000


def test_connections_above_the_cap_are_turned_away_and_later_ones_are_not(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 20)
    host, port = address.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection((host, int(port))))
        time.sleep(0.2)
        answer = raw(address)
    assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 5\r\n" in answer
    time.sleep(0.2)
    assert httpx.get(address).status_code == 200


def test_thousands_of_connections_leave_memory_flat_and_the_server_alive(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    before = memory_kb()
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            for _ in range(300):
                with contextlib.suppress(OSError):
                    opened = socket.create_connection((host, int(port)), timeout=1)
                    stack.callback(opened.close)
            time.sleep(0.05)
            stack.pop_all().close()
    assert memory_kb() - before < 50_000
    time.sleep(0.5)
    assert httpx.get(address).status_code == 200


def test_a_hundred_ranges_get_the_whole_reply(address: str) -> None:
    ranges = ",".join(f"{n}-{n}" for n in range(100))
    reply = httpx.get(address, headers={"Range": f"bytes={ranges}"})
    assert (reply.status_code, reply.text) == (200, "/ 0")


def test_a_client_that_hangs_up_before_its_body_is_whole_is_not_answered() -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/chat", "client": None, "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(echo, "127.0.0.1", (), (), 5)(scope, receive, send))
    assert sent == []


def test_a_log_line_cannot_be_forged() -> None:
    assert escaped("/a\r\n2026 GET /b\x1b[2J\u202e\u2028é\ud800") == "/a\\r\\n2026 GET /b\\x1b[2J\\u202e\\u2028é\\ud800"
