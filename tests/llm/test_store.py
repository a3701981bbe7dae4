import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from stages.llm import Rate, Reply, Request, Store, request_key
from stages.program import DocsmithError

REQUEST = Request(model_sha256="ab", messages=(("system", "s"), ("user", "u")), temperature=0.5, max_tokens=9, seed=1)
OTHER = {
    "model_sha256": "ac",
    "messages": (("system", "s"), ("user", "v")),
    "temperature": 0.6,
    "max_tokens": 10,
    "seed": 2,
    "schema": msgspec.Raw(b'{"type":"object"}'),
}


def start(program: str, *arguments: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], env=environment)


def test_a_kept_reply_comes_back_whole_and_an_unknown_key_gives_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", "s")
    reply = Reply(text="ü 🚀\n\0end", tokens=3, is_whole=False)
    store.keep("k", reply)
    store.close()
    assert Store(tmp_path / "store", "s").find(["k", "other"]) == {"k": reply}


def test_a_kept_reply_survives_a_kill_right_after_it(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from stages.llm import Reply, Store\n"
        "store = Store(Path(sys.argv[1]), 's')\n"
        "store.keep('first', Reply('one', 1)); store.keep('last', Reply('two', 2)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = start(program, tmp_path)
    assert killed.wait() == -signal.SIGKILL
    assert Store(tmp_path, "s").find(["first", "last"]) == {"first": Reply("one", 1), "last": Reply("two", 2)}


def test_two_processes_write_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from stages.llm import Reply, Store\n"
        "store = Store(Path(sys.argv[1]), 's')\n"
        "for n in range(150): store.keep(f'{sys.argv[2]}-{n}', Reply(sys.argv[2] * n, n)); store.keep('shared', Reply('same'))"
    )
    writers = [start(program, tmp_path, name) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    keys = [f"{name}-{n}" for name in "ab" for n in range(150)]
    found = Store(tmp_path, "s").find([*keys, "shared"])
    assert len(found) == 301
    assert found["b-149"] == Reply("b" * 149, 149)


def test_many_processes_that_open_a_new_store_at_the_same_moment_all_get_it(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from stages.llm import Store\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "for n in range(20): Store(Path(sys.argv[1]), f's{n}').close()"
    )
    openers = [start(program, tmp_path, str(time.time() + 3)) for _ in range(4)]
    assert [opener.wait() for opener in openers] == [0, 0, 0, 0]


def test_the_key_changes_with_every_field_of_a_request() -> None:
    assert sorted(OTHER) == sorted(field.name for field in msgspec.structs.fields(Request))
    keys = {request_key(msgspec.structs.replace(REQUEST, **{name: value})) for name, value in OTHER.items()}
    assert len(keys | {request_key(REQUEST)}) == 7


def test_equal_requests_have_one_key_in_every_process() -> None:
    assert request_key(REQUEST) == request_key(msgspec.structs.replace(REQUEST))
    # sha256sum of {"model_sha256":"ab","messages":[["system","s"],["user","u"]],
    # "temperature":0.5,"max_tokens":9,"seed":1,"schema":null} on one line without blanks
    assert request_key(REQUEST).startswith("36558a301115fd0a")


def test_the_roles_of_the_messages_are_part_of_the_key() -> None:
    swapped = msgspec.structs.replace(REQUEST, messages=(("user", "s"), ("system", "u")))
    assert request_key(swapped) != request_key(REQUEST)


def test_white_space_in_a_message_is_not_part_of_the_key_and_its_words_are() -> None:
    wrapped = msgspec.structs.replace(REQUEST, messages=(("system", " s\n"), ("user", "a b  c")))
    assert request_key(wrapped) == request_key(
        msgspec.structs.replace(wrapped, messages=(("system", "s"), ("user", "a\n\n\tb c")))
    )
    assert request_key(wrapped) != request_key(msgspec.structs.replace(wrapped, messages=(("system", "s"), ("user", "ab c"))))


def test_pruning_drops_what_is_not_wanted_and_gives_its_space_back(tmp_path: Path) -> None:
    store = Store(tmp_path, "s")
    for n in range(100):
        store.keep(f"k{n}", Reply(f"{n} " * 5_000))
    before = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert store.prune(["k3", "k7", "unknown"]) == 98
    assert sorted(store.find([f"k{n}" for n in range(100)])) == ["k3", "k7"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < before / 10
    assert store.prune(["k3", "k7"]) == 0
    assert store.prune([]) == 2


def test_pruning_one_store_leaves_the_store_beside_it_alone(tmp_path: Path) -> None:
    ours, theirs = Store(tmp_path, "generate"), Store(tmp_path, "answer")
    ours.keep("k", Reply("ours"))
    theirs.keep("k", Reply("theirs"))
    assert ours.prune([]) == 1
    assert (ours.find(["k"]), theirs.find(["k"])) == ({}, {"k": Reply("theirs")})


def test_a_rate_is_that_of_the_last_five_askings_of_the_model(tmp_path: Path) -> None:
    store = Store(tmp_path, "s")
    assert store.rate("m") is None
    store.keep_rate("m", calls=1000, prompt_tokens=0, new_tokens=0, seconds=1)  # the sixth from the end
    for calls in (10, 10, 10, 10):
        store.keep_rate("m", calls, prompt_tokens=3000, new_tokens=200, seconds=4)
    store.keep_rate("m", calls=40, prompt_tokens=4000, new_tokens=0, seconds=4)
    store.keep_rate("other", calls=1, prompt_tokens=1, new_tokens=1, seconds=1)
    assert store.rate("m") == Rate(prompt_tokens=200, new_tokens=10, calls_per_s=4)


def test_a_store_whose_pages_were_overwritten_is_named_with_what_to_do(tmp_path: Path) -> None:
    store = Store(tmp_path, "s")
    for n in range(200):
        store.keep(f"k{n}", Reply("x" * 400))
    store.close()
    path = tmp_path / "s.sqlite"
    content = path.read_bytes()
    path.write_bytes(content[:8192] + b"\xff" * (len(content) - 8192))
    with pytest.raises(DocsmithError) as failed:
        Store(tmp_path, "s").find([f"k{n}" for n in range(200)])
    assert str(failed.value).startswith(f"{path}: database disk image is malformed; it is damaged. Delete it")
    assert "\n" not in str(failed.value)
