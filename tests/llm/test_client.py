"""ask_all: every request ends as reused, answered or failed, whatever the server does; what came is kept."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest
import stamina
from fake_endpoint import HUGE_PARTS, TEXTS, FakeEndpoint, Turn

from stages.llm import Endpoint, Rate, Reply, Request, Store, Tally, ask_all, ask_missing, request_key
from stages.program import DocsmithError, ServerFailed


@pytest.fixture(autouse=True)
def without_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four attempts as always, but at once; a server rests for 20 ms at first."""
    monkeypatch.setattr("stages.llm.pool.FIRST_REST_S", 0.02)
    stamina.set_testing(True, attempts=4)
    yield
    stamina.set_testing(False)


def ask_about(*prompts: str, schema: bytes | None = None) -> dict[str, Request]:
    raw = msgspec.Raw(schema) if schema else None
    requests = [Request("m", (("system", "be brief"), ("user", prompt)), 0.7, 20, 1, raw) for prompt in prompts]
    return {request_key(request): request for request in requests}


def ask(
    fakes: FakeEndpoint | Sequence[FakeEndpoint],
    requests: Mapping[str, Request],
    folder: Path,
    timeout_s: float = 10,
    concurrency: int = 4,
    api_key_env: str = "",
    groups: Mapping[str, str] | None = None,
) -> tuple[dict[str, Reply], Tally]:
    """`ask_all` against `fakes`; replies by prompt."""
    several = [fakes] if isinstance(fakes, FakeEndpoint) else fakes
    endpoints = [Endpoint(fake.url, "fake", api_key_env) for fake in several]
    store = Store(folder, "s")
    try:
        replies, tally = ask_all(requests, store, lambda: endpoints, concurrency, timeout_s, "test", groups=groups)
    finally:
        store.close()
    assert tally.requests == len(requests) == len(replies) == tally.reused + tally.answered + tally.failed
    return {requests[key].messages[-1][1]: reply for key, reply in replies.items()}, tally


def never() -> list[Endpoint]:
    raise AssertionError("no server is needed")


def only(prompt: str, turn: Turn) -> Callable[[str, int], Turn]:
    return lambda asked, call: turn if asked == prompt else "ok"


def test_a_reply_is_what_the_server_said_and_the_call_is_what_the_request_says(tmp_path: Path) -> None:
    with FakeEndpoint() as fake:
        replies, tally = ask(fake, ask_about("two\n  teas", schema=b'{"type":"object"}'), tmp_path)
    assert replies == {"two\n  teas": Reply("echo two\n  teas", tokens=7, prompt_tokens=5)}
    assert msgspec.structs.replace(tally, seconds=0) == Tally(1, 0, 1, 0, new_tokens=7, seconds=0, prompt_tokens=5)
    assert fake.bodies == [
        {
            "model": "fake",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two\n  teas"}],
            "temperature": 0.7,
            "max_tokens": 20,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "reply", "schema": {"type": "object"}, "strict": True},
            },
        }
    ]


@pytest.mark.parametrize("passing", ["429", "500", "reset", "slow", "drip"])
def test_what_may_pass_is_tried_again(passing: Turn, tmp_path: Path) -> None:
    with FakeEndpoint(lambda prompt, call: passing if call == 0 else "ok") as fake:
        replies, tally = ask(fake, ask_about("tea"), tmp_path, timeout_s=1.0)
    assert replies["tea"].text == "echo tea"
    assert (tally.answered, tally.failed) == (1, 0)
    assert fake.calls == {"tea": 2}


@pytest.mark.parametrize(
    ("turn", "calls", "failed"),
    [
        ("429", 4, "status 429: fake 429"),
        ("500", 4, "status 500: fake 500"),
        ("reset", 4, "unreachable: "),
        ("slow", 4, "timed out"),
        ("drip", 4, "timed out"),
        ("400", 1, "status 400: fake 400"),
        ("no choices", 1, "empty reply"),
        ("null", 1, "empty reply"),
        ("declined", 1, "refused: I can't help with that."),
        ("empty", 1, "unreadable reply: Input data was truncated"),
        ("half json", 1, "unreadable reply: Input data was truncated"),
        ("huge", 1, "unreadable reply: more than 4 MB"),
        ("wrong keys", 1, "unreadable reply: Object missing required field `choices`"),
        ("wrong types", 1, "unreadable reply: Expected `str | null`, got `array`"),
        ("nan", 1, "unreadable reply: JSON is malformed"),
        ("nested", 1, "unreadable reply: "),
        ("html", 1, "unreadable reply: JSON is malformed"),
    ],
)
def test_what_does_not_pass_is_a_failed_reply_with_its_reason_and_the_others_are_answered(
    turn: Turn, calls: int, failed: str, tmp_path: Path
) -> None:
    with FakeEndpoint(only("bad", turn)) as fake:
        replies, tally = ask(fake, ask_about("bad", "good", "better"), tmp_path, timeout_s=0.5)
    assert replies["bad"].failed.startswith(failed)
    assert "\n" not in replies["bad"].failed and len(replies["bad"].failed) <= 300
    assert replies["good"] == Reply("echo good", tokens=7, prompt_tokens=5)
    assert (tally.requests, tally.reused, tally.answered, tally.failed, tally.new_tokens) == (3, 0, 2, 1, 14)
    assert fake.calls["bad"] == calls


@pytest.mark.parametrize("turn", ["refusal", "wrong language"])
def test_a_text_that_is_of_no_use_is_a_reply_all_the_same_and_for_the_stage_to_judge(turn: Turn, tmp_path: Path) -> None:
    with FakeEndpoint(only("bad", turn)) as fake:
        replies, tally = ask(fake, ask_about("bad", "good"), tmp_path)
    assert replies["bad"].text == TEXTS[turn]
    assert (tally.answered, tally.failed) == (2, 0)


def test_every_fault_at_once_leaves_no_request_without_an_end(tmp_path: Path) -> None:
    faults: list[Turn] = ["429", "500", "reset", "empty", "half json", "huge", "wrong keys", "nan", "declined", "ok", "length"]
    requests = ask_about(*(f"{fault}/{n}" for fault in faults for n in range(3)))
    with FakeEndpoint(lambda prompt, call: prompt.split("/")[0]) as fake:  # type: ignore[arg-type, return-value]
        replies, tally = ask(fake, requests, tmp_path, concurrency=8)
    assert (tally.requests, tally.answered, tally.failed) == (33, 6, 27)
    assert all(bool(reply.failed) == (prompt[:2] not in ("ok", "le")) for prompt, reply in replies.items())
    assert len(fake.bodies) == 3 * (3 * 4 + 8)  # 429, 500 and reset are tried four times


def test_a_failed_reply_is_never_kept_and_asked_again_by_the_next_run(tmp_path: Path) -> None:
    requests = ask_about("bad", "good")
    with FakeEndpoint(only("bad", "500")) as fake:
        ask(fake, requests, tmp_path)
    assert len(Store(tmp_path, "s").find(requests)) == 1
    with FakeEndpoint() as fake:
        replies, tally = ask(fake, requests, tmp_path)
    assert fake.calls == {"bad": 1}
    assert (tally.reused, tally.answered, tally.failed) == (1, 1, 0)
    assert {prompt: reply.text for prompt, reply in replies.items()} == {"bad": "echo bad", "good": "echo good"}


def test_a_reply_cut_at_the_limit_says_so_and_is_kept(tmp_path: Path) -> None:
    with FakeEndpoint(only("tea", "length")) as fake:
        replies, tally = ask(fake, ask_about("tea"), tmp_path)
    assert replies == {"tea": Reply("echo tea", tokens=7, is_whole=False, prompt_tokens=5)}
    assert tally.answered == 1
    assert list(Store(tmp_path, "s").find(ask_about("tea")).values()) == list(replies.values())


def test_a_second_run_reuses_every_reply_and_starts_no_server(tmp_path: Path) -> None:
    requests = ask_about("tea", "coffee", "milk")
    with FakeEndpoint() as fake:
        first, _ = ask(fake, requests, tmp_path)
    replies, tally = ask_all(requests, Store(tmp_path, "s"), never, 4, 10, "test")
    assert {requests[key].messages[-1][1]: reply for key, reply in replies.items()} == first
    assert tally == Tally(requests=3, reused=3, answered=0, failed=0, new_tokens=0, seconds=0.0)


def test_no_request_gives_no_reply_and_no_server(tmp_path: Path) -> None:
    replies, tally = ask_all({}, Store(tmp_path, "s"), never, 4, 10, "test")
    assert (replies, tally.requests) == ({}, 0)


def test_whoever_answers_the_missing_ones_gets_only_these_and_each_is_kept_as_it_comes(tmp_path: Path) -> None:
    requests = ask_about("tea", "coffee")
    store = Store(tmp_path, "s")
    first, second = requests
    store.keep(first, Reply("kept"))

    def answer(missing: dict[str, Request], keep: Callable[[str, Reply], None]) -> float:
        assert list(missing) == [second]
        keep(second, Reply("new", tokens=3))
        assert Store(tmp_path, "s").find([second]) == {second: Reply("new", tokens=3)}
        return 2.0

    replies, tally = ask_missing(requests, store, answer)
    assert replies == {first: Reply("kept"), second: Reply("new", tokens=3)}
    assert tally == Tally(2, reused=1, answered=1, failed=0, new_tokens=3, seconds=2.0)
    assert store.rate("m") == Rate(prompt_tokens=0, new_tokens=3, calls_per_s=0.5)


def test_a_server_that_dies_fails_the_run_with_what_was_kept_and_a_rerun_asks_the_rest(tmp_path: Path) -> None:
    requests = ask_about(*(f"prompt {n}" for n in range(30)))
    with FakeEndpoint(dies_after=11) as fake, pytest.raises(ServerFailed) as failed:
        ask(fake, requests, tmp_path)
    assert f"the LLM server at {fake.url} stopped answering after 11 of 30 calls (unreachable: " in str(failed.value)
    assert str(failed.value).endswith("their replies are kept. Resume with: dvc repro")
    assert "\n" not in str(failed.value)
    kept = Store(tmp_path, "s").find(requests)
    assert len(kept) == 11

    with FakeEndpoint() as fake:
        replies, tally = ask(fake, requests, tmp_path)
    assert (tally.requests, tally.reused, tally.answered, tally.failed) == (30, 11, 19, 0)
    assert sorted(fake.calls) == sorted(requests[key].messages[-1][1] for key in requests if key not in kept)
    assert set(fake.calls.values()) == {1}
    assert replies["prompt 29"].text == "echo prompt 29"


def test_a_server_that_dies_before_the_last_call_fails_the_run_as_well(tmp_path: Path) -> None:
    requests = ask_about(*(f"prompt {n}" for n in range(12)))
    with FakeEndpoint(dies_after=11) as fake, pytest.raises(ServerFailed, match="after 11 of 12 calls"):
        ask(fake, requests, tmp_path)
    assert len(Store(tmp_path, "s").find(requests)) == 11


def test_a_server_that_breaks_every_call_fails_the_run_instead_of_trying_them_all(tmp_path: Path) -> None:
    requests = ask_about(*(f"prompt {n}" for n in range(200)))
    with (
        FakeEndpoint(lambda prompt, call: "500") as fake,
        pytest.raises(ServerFailed, match=r"0 of 200 calls \(status 500: fake"),
    ):
        ask(fake, requests, tmp_path, concurrency=16)
    assert len(fake.calls) < 100


def test_too_many_requests_is_not_the_death_of_a_server(tmp_path: Path) -> None:
    requests = ask_about(*(f"prompt {n}" for n in range(100)))
    with FakeEndpoint(lambda prompt, call: "429" if call < 3 else "ok") as fake:
        _, tally = ask(fake, requests, tmp_path, concurrency=16)
    assert (tally.answered, tally.failed) == (100, 0)


def test_a_server_is_left_alone_for_as_long_as_it_asks(tmp_path: Path) -> None:
    requests = ask_about("first", "second", "third")
    started = time.monotonic()
    with FakeEndpoint(lambda prompt, call: "429 wait" if (prompt, call) == ("first", 0) else "ok") as fake:
        _, tally = ask(fake, requests, tmp_path, concurrency=1)
    assert tally.answered == 3
    assert fake.calls == {"first": 2, "second": 1, "third": 1}
    assert time.monotonic() - started >= 1.0


def test_tries_wait_longer_each_time(tmp_path: Path) -> None:
    stamina.set_testing(False)
    started = time.monotonic()
    with FakeEndpoint(lambda prompt, call: "429" if call < 2 else "ok") as fake:
        _, tally = ask(fake, ask_about("tea"), tmp_path)
    assert tally.answered == 1
    assert time.monotonic() - started >= 1.4  # 0.5 s and 1 s at least, and chance adds to them


@pytest.mark.parametrize("concurrency", [1, 4])
def test_concurrency_is_the_number_of_calls_at_once_to_each_endpoint(concurrency: int, tmp_path: Path) -> None:
    with FakeEndpoint(latency_s=0.1) as one, FakeEndpoint(latency_s=0.1) as two:
        _, tally = ask([one, two], ask_about(*"abcdefghijklmnop"), tmp_path, concurrency=concurrency)
    assert tally.answered == 16
    assert (one.most_at_once, two.most_at_once) == (concurrency, concurrency)
    assert len(one.bodies) and len(two.bodies)


def test_the_requests_of_a_group_go_to_one_endpoint(tmp_path: Path) -> None:
    requests = ask_about(*(f"{group} {n}" for group in "abcd" for n in range(6)))
    groups = {key: request.messages[-1][1][0] for key, request in requests.items()}
    with FakeEndpoint(latency_s=0.02) as one, FakeEndpoint(latency_s=0.02) as two:
        _, tally = ask([one, two], requests, tmp_path, concurrency=3, groups=groups)
    assert tally.answered == 24
    seen = [{prompt[0] for prompt in fake.calls} for fake in (one, two)]
    assert len(seen[0]) + len(seen[1]) == 4 and all(seen)


def test_an_endpoint_that_dies_leaves_its_calls_to_the_other_and_nothing_fails(tmp_path: Path) -> None:
    requests = ask_about(*(f"{group} {n}" for group in "abcd" for n in range(10)))
    groups = {key: request.messages[-1][1][0] for key, request in requests.items()}
    with FakeEndpoint(dies_after=5) as one, FakeEndpoint() as two:
        _, tally = ask([one, two], requests, tmp_path, groups=groups)
    assert (tally.answered, tally.failed) == (40, 0)
    assert (len(one.bodies), len(two.bodies)) == (5, 35)


def test_an_endpoint_that_fails_in_a_row_is_left_alone_and_comes_back_when_it_has_rested(tmp_path: Path) -> None:
    requests = ask_about(*(f"prompt {n}" for n in range(300)))
    bad_calls = 0

    def broken_at_first(prompt: str, call: int) -> Turn:
        nonlocal bad_calls
        bad_calls += 1
        return "500" if bad_calls <= 5 else "ok"

    with FakeEndpoint(broken_at_first) as one, FakeEndpoint(latency_s=0.005) as two:
        _, tally = ask([one, two], requests, tmp_path, concurrency=1)
    assert (tally.answered, tally.failed) == (300, 0)
    assert len(two.bodies) > 5
    assert one.listings == 2  # before the first call, and after the rest
    assert len(one.bodies) > 20


def test_failures_between_answers_do_not_make_an_endpoint_rest(tmp_path: Path) -> None:
    with FakeEndpoint(lambda prompt, call: "500" if call == 0 else "ok") as fake:
        _, tally = ask(fake, ask_about(*"abcdefgh"), tmp_path, concurrency=1)
    assert (tally.answered, len(fake.bodies)) == (8, 16)
    assert fake.listings == 1  # a rest ends with another look


def test_a_model_that_the_server_does_not_have_is_named_with_those_it_has_before_any_call(tmp_path: Path) -> None:
    with FakeEndpoint(models=[{"id": "smol"}, {"id": "qwen"}]) as fake, pytest.raises(ServerFailed) as failed:
        ask(fake, ask_about("tea"), tmp_path)
    assert str(failed.value) == (
        f"the LLM server at {fake.url} has no model fake; it has qwen, smol. Set the endpoint's model in params.yaml"
    )
    assert fake.bodies == []


def test_a_server_that_never_gets_ready_fails_the_run_and_gets_no_call(tmp_path: Path) -> None:
    with FakeEndpoint(models=[{"id": "fake"}]) as fake:
        fake.listing_status = 503
        with pytest.raises(ServerFailed, match=r"after 0 of 2 calls \(unreachable: status 503\)"):
            ask(fake, ask_about("a", "b"), tmp_path)
    assert (fake.listings, fake.bodies) == (4, [])


@pytest.mark.parametrize("listed", ["fake", "fake:latest"])
def test_a_listed_model_is_looked_up_once(listed: str, tmp_path: Path) -> None:
    with FakeEndpoint(models=[{"id": "other"}, {"id": listed}]) as fake:
        _, tally = ask(fake, ask_about(*"abcdefgh"), tmp_path)
    assert tally.answered == 8
    assert fake.listings == 1


def test_a_model_swapped_in_mid_run_stops_it_and_its_replies_are_not_kept(tmp_path: Path) -> None:
    requests = ask_about("a", "b", "c", "d")
    with FakeEndpoint(lambda prompt, call: "swapped" if prompt in "cd" else "ok") as fake, pytest.raises(ServerFailed) as failed:
        ask(fake, requests, tmp_path, concurrency=1)
    assert f"the LLM server at {fake.url} answered as model someone-else, and as fake before: " in str(failed.value)
    kept = Store(tmp_path, "s").find(requests)
    assert [reply.text for reply in kept.values()] == ["echo a", "echo b"]


@pytest.mark.parametrize(("size", "is_another"), [(135, False), (360, True)])
def test_a_server_that_comes_back_must_list_the_model_as_before(size: int, is_another: bool, tmp_path: Path) -> None:
    fake = FakeEndpoint(models=[{"id": "fake", "created": 1, "permission": [{"id": "x"}], "meta": {"n_params": 135}}])

    def restarted(prompt: str, call: int) -> Turn:
        if (prompt, call) != ("b", 0):
            return "ok"
        fake.models = [{"id": "fake", "created": 2, "permission": [{"id": "y"}], "meta": {"n_params": size}}]
        return "reset"

    fake.turn = restarted
    requests = ask_about("a", "b", "c")
    with fake:
        if is_another:
            with pytest.raises(ServerFailed, match=r"another model under the name fake \(meta changed\)"):
                ask(fake, requests, tmp_path, concurrency=1)
        else:
            assert ask(fake, requests, tmp_path, concurrency=1)[1].answered == 3
    assert fake.listings == 2
    assert len(Store(tmp_path, "s").find(requests)) == (1 if is_another else 3)


def test_a_key_goes_to_the_endpoint_that_names_its_variable_and_to_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THEIR_KEY", "k-123\n")
    requests = ask_about("a", "b", "c", "d")
    with FakeEndpoint(latency_s=0.05) as ours, FakeEndpoint(latency_s=0.05) as theirs:
        endpoints = [Endpoint(ours.url, "fake"), Endpoint(theirs.url, "fake", "THEIR_KEY")]
        ask_all(requests, Store(tmp_path, "s"), lambda: endpoints, 2, 10, "test")
    assert set(ours.keys) == {None}
    assert set(theirs.keys) == {"Bearer k-123"}


def test_a_variable_that_holds_no_key_is_named_before_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THEIR_KEY", raising=False)
    with FakeEndpoint() as fake, pytest.raises(ServerFailed, match="the environment variable THEIR_KEY holds none; set it"):
        ask(fake, ask_about("a"), tmp_path, api_key_env="THEIR_KEY")
    assert fake.keys == []


@pytest.mark.parametrize(("variable", "advice"), [("", "in api_key_env"), ("THEIR_KEY", "check the one in THEIR_KEY")])
def test_a_server_that_asks_for_another_key_stops_the_run_at_once(
    variable: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THEIR_KEY", "k-123")
    with FakeEndpoint(lambda prompt, call: "401") as fake, pytest.raises(ServerFailed, match=advice) as failed:
        ask(fake, ask_about(*"abcdefgh"), tmp_path, concurrency=1, api_key_env=variable)
    assert len(fake.bodies) == 1
    assert "k-123" not in str(failed.value)


@pytest.mark.parametrize(
    ("url", "is_one"),
    [
        ("http://127.0.0.1:65535/v1", True),
        ("http://127.0.0.1:65536/v1", False),
        ("http://127.0.0.1:8000/v1", True),
        ("https://api.example.com/openai/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://127.0.0.1:8000", False),
        ("http://127.0.0.1:8000/v1/", False),
        ("http://127.0.0.1:port/v1", False),
        ("https://name:password@example.com/v1", False),
        ("ftp://example.com/v1", False),
    ],
)
def test_an_endpoint_in_params_is_an_address_that_ends_with_v1_and_holds_no_password(url: str, is_one: bool) -> None:
    with contextlib.nullcontext() if is_one else pytest.raises(msgspec.ValidationError):
        assert msgspec.convert({"url": url, "model": "m"}, Endpoint) == Endpoint(url, "m")


def test_a_key_that_a_server_repeats_in_its_error_is_not_repeated_to_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THEIR_KEY", "fake")
    with FakeEndpoint(only("a", "400")) as fake:
        replies, _ = ask(fake, ask_about("a"), tmp_path, api_key_env="THEIR_KEY")
    assert replies["a"].failed == "status 400: … 400"


def test_a_proxy_in_the_environment_is_not_used_for_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with FakeEndpoint() as fake:
        assert ask(fake, ask_about("tea"), tmp_path)[1].answered == 1


def test_a_huge_reply_is_not_read_to_its_end(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from stages.llm import Endpoint, Request, Store, ask_all\n"
        "ask = lambda prompt: ask_all({prompt: Request('m', (('user', prompt),), 0, 9, 0)}, Store(Path(sys.argv[2]), 's'),"
        " lambda: [Endpoint(sys.argv[1], 'fake')], 1, 30, 'test')[0][prompt]\n"
        "ask('small'); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; print(ask('bad').failed)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with FakeEndpoint(only("bad", "huge")) as fake:
        arguments = [sys.executable, "-c", program, fake.url, str(tmp_path)]
        lines = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == "unreadable reply: more than 4 MB"
    assert int(lines[1]) < HUGE_PARTS / 2  # MB


def test_a_full_disk_ends_the_run_with_one_line_and_a_rerun_asks_the_rest(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from stages.llm import Endpoint, Request, Store, ask_all\n"
        "from stages.program import DocsmithError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "requests = {f'p{n}': Request('m', (('user', f'p{n}'),), 0, 9, 0) for n in range(200)}\n"
        "try: ask_all(requests, Store(Path(sys.argv[2]), 's'), lambda: [Endpoint(sys.argv[1], 'fake')], 4, 30, 'test')\n"
        "except DocsmithError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TQDM_DISABLE": "1"}
    with FakeEndpoint(text=lambda body: "long " * 400) as fake:
        arguments = [sys.executable, "-c", program, fake.url, str(tmp_path)]
        said = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.startswith(f"{tmp_path}/s.sqlite: disk I/O error; free disk space.")
    assert said.stdout.count("\n") == 1 and said.stderr == ""
    keys = [f"p{n}" for n in range(200)]
    kept = Store(tmp_path, "s").find(keys)
    assert 5 < len(kept) < 100
    with FakeEndpoint() as fake:
        requests = {key: Request("m", (("user", key),), 0, 9, 0) for key in keys}
        _, tally = ask(fake, requests, tmp_path)
    assert (tally.reused, tally.answered) == (len(kept), 200 - len(kept))


def test_a_damaged_store_is_named_before_any_call(tmp_path: Path) -> None:
    (tmp_path / "s.sqlite").write_bytes(b"no database at all" * 100)
    with (
        FakeEndpoint() as fake,
        pytest.raises(DocsmithError, match=r"s\.sqlite: file is not a database; it is damaged\. Delete it"),
    ):
        ask(fake, ask_about("tea"), tmp_path)
    assert fake.bodies == []


def test_the_progress_line_tells_done_pairs_tokens_and_reuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = ask_about("a", "b", "c", "d")
    store = Store(tmp_path, "s")
    store.keep(next(iter(requests)), Reply("kept"))
    with FakeEndpoint(latency_s=0.2) as fake:
        endpoints = [Endpoint(fake.url, "fake")]
        ask_all(requests, store, lambda: endpoints, 1, 10, "generate", pairs_in=lambda key, reply: len(reply.text))
    last = capsys.readouterr().err.rpartition("\r")[2]
    assert re.fullmatch(r"generate: 100%.* 4/4 \[.*, \d+ pairs/min, \d+ tokens/s, 25% reused\]\n", last)


def test_a_finished_asking_leaves_its_rate(tmp_path: Path) -> None:
    with FakeEndpoint(latency_s=0.1) as fake:
        _, tally = ask(fake, ask_about(*"abcdefgh"), tmp_path, concurrency=2)
    rate = Store(tmp_path, "s").rate("m")
    assert rate is not None
    assert (rate.prompt_tokens, rate.new_tokens) == (5, 7)
    assert rate.calls_per_s == pytest.approx(8 / tally.seconds, rel=0.05)
    assert Store(tmp_path, "s").rate("another") is None
