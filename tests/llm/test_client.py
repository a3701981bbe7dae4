import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import stamina
from fake_endpoint import FakeEndpoint, Turn

from stages.llm import Endpoint, Reply, Request, Store, Tally, ask_all, request_key
from stages.program import ServerFailed


@pytest.fixture(autouse=True)
def without_waits() -> Iterator[None]:
    """Four attempts as always, but at once."""
    stamina.set_testing(True, attempts=4)
    yield
    stamina.set_testing(False)


def ask_about(*prompts: str, schema: bytes | None = None) -> dict[str, Request]:
    import msgspec

    raw = msgspec.Raw(schema) if schema else None
    requests = [Request("m", (("system", "be brief"), ("user", prompt)), 0.7, 20, 1, raw) for prompt in prompts]
    return {request_key(request): request for request in requests}


def ask(
    fake: FakeEndpoint, requests: Mapping[str, Request], folder: Path, timeout_s: float = 10, concurrency: int = 4
) -> tuple[dict[str, Reply], Tally]:
    """`ask_all` against `fake`; replies by prompt."""
    store = Store(folder)
    try:
        replies, tally = ask_all(
            requests, store, lambda: contextlib.nullcontext(Endpoint(fake.url, "fake")), concurrency, timeout_s, "test"
        )
    finally:
        store.close()
    assert tally.requests == tally.reused + tally.answered + tally.failed
    return {requests[key].messages[-1][1]: reply for key, reply in replies.items()}, tally


def never() -> contextlib.AbstractContextManager[Endpoint]:
    raise AssertionError("no server is needed")


def always(turn: Turn) -> Callable[[str, int], Turn]:
    return lambda prompt, call: turn


def test_a_reply_is_what_the_server_said_and_the_call_is_what_the_request_says(tmp_path: Path) -> None:
    with FakeEndpoint() as fake:
        replies, tally = ask(fake, ask_about("tea", schema=b'{"type":"object"}'), tmp_path)
    assert replies == {"tea": Reply("echo tea", tokens=7)}
    assert (tally.requests, tally.reused, tally.answered, tally.failed, tally.new_tokens) == (1, 0, 1, 0, 7)
    assert fake.bodies == [
        {
            "model": "fake",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "tea"}],
            "temperature": 0.7,
            "max_tokens": 20,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "reply", "schema": {"type": "object"}, "strict": True},
            },
        }
    ]


@pytest.mark.parametrize("passing", ["429", "500", "reset", "slow"])
def test_what_may_pass_is_tried_again(passing: Turn, tmp_path: Path) -> None:
    with FakeEndpoint(lambda prompt, call: passing if call == 0 else "ok") as fake:
        replies, tally = ask(fake, ask_about("tea"), tmp_path, timeout_s=1.0)
    assert replies == {"tea": Reply("echo tea", tokens=7)}
    assert (tally.answered, tally.failed) == (1, 0)
    assert fake.calls == {"tea": 2}


@pytest.mark.parametrize(
    ("turn", "calls", "failed"),
    [
        ("429", 4, "status 429: Error code: 429 - fake 429"),
        ("500", 4, "status 500: Error code: 500 - fake 500"),
        ("slow", 4, "timed out"),
        ("400", 1, "status 400: Error code: 400 - fake 400"),
        ("no choices", 1, "empty reply"),
        ("null", 1, "empty reply"),
        ("not json", 1, "unreadable reply"),
        ("html", 1, "empty reply"),
    ],
)
def test_what_does_not_pass_is_a_failed_reply_with_its_reason_and_the_others_are_answered(
    turn: Turn, calls: int, failed: str, tmp_path: Path
) -> None:
    requests = ask_about("bad", "good", "better")
    with FakeEndpoint(lambda prompt, call: turn if prompt == "bad" else "ok") as fake:
        replies, tally = ask(fake, requests, tmp_path, timeout_s=1.0)
    assert failed in replies["bad"].failed
    assert "\n" not in replies["bad"].failed
    assert replies["good"] == Reply("echo good", tokens=7)
    assert (tally.requests, tally.reused, tally.answered, tally.failed, tally.new_tokens) == (3, 0, 2, 1, 14)
    assert fake.calls == {"bad": calls, "good": 1, "better": 1}


def test_a_failed_reply_is_never_kept_and_asked_again_by_the_next_run(tmp_path: Path) -> None:
    requests = ask_about("bad", "good")
    with FakeEndpoint(lambda prompt, call: "500" if prompt == "bad" else "ok") as fake:
        ask(fake, requests, tmp_path)
    assert len(Store(tmp_path).find(requests)) == 1
    with FakeEndpoint() as fake:
        replies, tally = ask(fake, requests, tmp_path)
    assert fake.calls == {"bad": 1}
    assert (tally.reused, tally.answered, tally.failed) == (1, 1, 0)
    assert replies == {"bad": Reply("echo bad", 7), "good": Reply("echo good", 7)}


def test_a_reply_cut_at_the_limit_says_so_and_is_kept(tmp_path: Path) -> None:
    with FakeEndpoint(always("length")) as fake:
        replies, tally = ask(fake, ask_about("tea"), tmp_path)
    assert replies == {"tea": Reply("echo tea", tokens=7, is_whole=False)}
    assert tally.answered == 1
    assert list(Store(tmp_path).find(ask_about("tea")).values()) == [Reply("echo tea", tokens=7, is_whole=False)]


def test_a_second_run_reuses_every_reply_and_starts_no_server(tmp_path: Path) -> None:
    requests = ask_about("tea", "coffee", "milk")
    with FakeEndpoint() as fake:
        first, _ = ask(fake, requests, tmp_path)
    replies, tally = ask_all(requests, Store(tmp_path), never, 4, 10, "test")
    assert {requests[key].messages[-1][1]: reply for key, reply in replies.items()} == first
    assert tally == Tally(requests=3, reused=3, answered=0, failed=0, new_tokens=0, seconds=0.0)


def test_no_request_gives_no_reply_and_no_server(tmp_path: Path) -> None:
    replies, tally = ask_all({}, Store(tmp_path), never, 4, 10, "test")
    assert (replies, tally.requests) == ({}, 0)


def test_a_server_that_dies_fails_the_run_with_what_was_kept_and_a_rerun_asks_the_rest(tmp_path: Path) -> None:
    requests = ask_about(*(f"prompt {n}" for n in range(30)))
    with FakeEndpoint(dies_after=11) as fake, pytest.raises(ServerFailed) as failed:
        ask(fake, requests, tmp_path)
    assert f"{fake.url} stopped answering after 11 of 30 calls" in str(failed.value)
    assert "\n" not in str(failed.value)
    kept = Store(tmp_path).find(requests)
    assert len(kept) == 11

    with FakeEndpoint() as fake:
        replies, tally = ask(fake, requests, tmp_path)
    assert (tally.requests, tally.reused, tally.answered, tally.failed) == (30, 11, 19, 0)
    assert sorted(fake.calls) == sorted(requests[key].messages[-1][1] for key in requests if key not in kept)
    assert set(fake.calls.values()) == {1}
    assert replies["prompt 29"] == Reply("echo prompt 29", 7)


def test_a_server_that_dies_near_the_end_fails_the_run_as_well(tmp_path: Path) -> None:
    requests = ask_about(*(f"prompt {n}" for n in range(12)))
    with FakeEndpoint(dies_after=9) as fake, pytest.raises(ServerFailed, match="after 9 of 12 calls"):
        ask(fake, requests, tmp_path)
    assert len(Store(tmp_path).find(requests)) == 9


def test_one_broken_connection_among_answers_is_one_failed_reply(tmp_path: Path) -> None:
    requests = ask_about("bad", *(f"prompt {n}" for n in range(20)))
    with FakeEndpoint(lambda prompt, call: "reset" if prompt == "bad" else "ok") as fake:
        replies, tally = ask(fake, requests, tmp_path, concurrency=1)
    assert replies["bad"].failed.startswith("unreachable")
    assert (tally.answered, tally.failed) == (20, 1)
    assert fake.calls["bad"] == 4


def test_tries_wait_longer_each_time(tmp_path: Path) -> None:
    stamina.set_testing(False)
    started = time.monotonic()
    with FakeEndpoint(lambda prompt, call: "429" if call < 2 else "ok") as fake:
        _, tally = ask(fake, ask_about("tea"), tmp_path)
    assert tally.answered == 1
    assert time.monotonic() - started >= 1.4  # 0.5 s and 1 s at least, and chance adds to them


def test_concurrency_is_the_number_of_calls_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    with FakeEndpoint(always("slow")) as fake:
        _, tally = ask(fake, ask_about(*"abcdef"), tmp_path, concurrency=6)
    at_once = time.monotonic() - started
    assert tally.answered == 6
    assert at_once < 12  # one after the other would take 18 s
