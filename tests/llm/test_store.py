import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from stages.llm import Reply, Request, Store, request_key

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
    store = Store(tmp_path / "store")
    reply = Reply(text="ü 🚀\n\0end", tokens=3, is_whole=False)
    store.keep("k", reply)
    store.close()
    assert Store(tmp_path / "store").find(["k", "other"]) == {"k": reply}


def test_a_kept_reply_survives_a_kill_right_after_it(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from stages.llm import Reply, Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "store.keep('first', Reply('one', 1)); store.keep('last', Reply('two', 2)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = start(program, tmp_path)
    assert killed.wait() == -signal.SIGKILL
    assert Store(tmp_path).find(["first", "last"]) == {"first": Reply("one", 1), "last": Reply("two", 2)}


def test_two_processes_write_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from stages.llm import Reply, Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "for n in range(150): store.keep(f'{sys.argv[2]}-{n}', Reply(sys.argv[2] * n, n)); store.keep('shared', Reply('same'))"
    )
    writers = [start(program, tmp_path, name) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    keys = [f"{name}-{n}" for name in "ab" for n in range(150)]
    found = Store(tmp_path).find([*keys, "shared"])
    assert len(found) == 301
    assert found["b-149"] == Reply("b" * 149, 149)


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
