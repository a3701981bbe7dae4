"""executor: a real Ray cluster of three nodes gives the bytes of a local run, and loses nothing with a node, a worker or the driver."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from conftest import MODELS
from fake_endpoint import FakeEndpoint, Turn, chosen
from ray_cluster import RayCluster, ray_cluster

from stages.executor import WORKER_ENDED, Executor
from stages.params import convert_section
from stages.program import BadParams
from stages.records import Chunk, Failure, read_records, write_records

REPOSITORY = Path(__file__).parents[2]
OUTPUTS = ("candidates.jsonl", "generate_failures.jsonl")
CHUNKS = 40
SLOW_S = 0.5  # of a call, where a test must catch a run in the middle


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(2, 1, 1) as started:
        yield started


class Project:
    """A folder with CHUNKS chunks, about each of which one call is made, and `stages.generate` as a program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "data").mkdir(parents=True)
        for name in ("curated.jsonl", "review.jsonl"):
            (folder / "data" / name).touch()
        texts = [f"The gearbox of machine {n} needs {n + 3} grams of clean winter oil for a year of work." for n in range(CHUNKS)]
        chunks = [
            Chunk(
                id=f"c{n:03}",
                document_id=f"d{n}",
                section_id=f"s{n}",
                path=f"{n}.md",
                heading_path=(f"Machine {n}",),
                start=0,
                end=len(text),
                text=text,
            )
            for n, text in enumerate(texts)
        ]
        write_records(folder / "data/chunks.jsonl", chunks)

    def set(self, url: str, executor: dict[str, Any], **generate: Any) -> None:
        params = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
        params["generate"] |= {
            "recipe": "quote-first",
            "pairs_per_chunk": 1,
            "wordings": 1,
            "min_similarity": 0.0,
            "concurrency": 1,
        }
        params["generate"] |= {"endpoints": [{"url": url, "model": "fake"}], "timeout_s": 30} | generate
        params["executor"] |= executor
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")

    def start(self, environment: dict[str, str]) -> subprocess.Popen[str]:
        paths = [
            "data/chunks.jsonl",
            "data/curated.jsonl",
            "data/store",
            "data/candidates.jsonl",
            "data/generate_failures.jsonl",
            "m.json",
        ]
        return subprocess.Popen(
            [sys.executable, "-m", "stages.generate", *paths],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, environment: dict[str, str]) -> str:
        child = self.start(environment)
        out, err = child.communicate(timeout=240)
        assert child.returncode == 0, err
        return out

    def outputs(self) -> list[bytes]:
        return [(self.folder / "data" / name).read_bytes() for name in OUTPUTS]


RAY = {"engine": "ray"}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """What the engine `local` writes."""
    project = Project(tmp_path_factory.mktemp("local") / "project")
    with FakeEndpoint(text=chosen) as fake:
        project.set(fake.url, {"engine": "local"})
        project.run({})
    assert len(fake.bodies) == CHUNKS and len(project.outputs()[0].splitlines()) == CHUNKS
    return project.outputs()


def wait_for(is_true: Callable[[], bool], child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not is_true():
        assert child.poll() is None and time.monotonic() < deadline, child.stderr and child.stderr.read()
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_writes_the_bytes_of_a_local_run_and_makes_its_calls(
    workers: int, cluster: RayCluster, local: list[bytes], tmp_path: Path
) -> None:
    def once_all_are_at_work(prompt: str, call: int) -> Turn:
        deadline = time.monotonic() + 20
        while fake.most_at_once < workers and time.monotonic() < deadline:
            time.sleep(0.01)
        return "ok"

    project = Project(tmp_path / "project")
    with FakeEndpoint(text=chosen, turn=once_all_are_at_work) as fake:
        project.set(fake.url, RAY | {"workers": workers})
        said = project.run(cluster.environment)
    assert project.outputs() == local
    assert set(fake.calls.values()) == {1} and len(fake.calls) == CHUNKS
    assert fake.most_at_once == workers
    assert f"{CHUNKS} calls (0 reused, {CHUNKS} generated" in said


def test_a_driver_that_is_killed_asks_for_the_rest_when_it_is_started_again(
    cluster: RayCluster, local: list[bytes], tmp_path: Path
) -> None:
    project = Project(tmp_path / "project")
    with FakeEndpoint(text=chosen, latency_s=SLOW_S) as fake:
        project.set(fake.url, RAY | {"workers": 2})
        child = project.start(cluster.environment)
        wait_for(lambda: len(fake.bodies) >= CHUNKS // 2, child)
        child.kill()
        child.communicate()
        time.sleep(1)
        asked = len(fake.bodies)
        assert asked < CHUNKS  # its workers ended with it
        project.run(cluster.environment)
    assert project.outputs() == local
    assert len(fake.bodies) - CHUNKS <= 6, "only what was at work or on its way to the store is asked twice"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_ends_as_a_local_one_does_and_its_workers_with_it(
    number: signal.Signals, code: int, cluster: RayCluster, tmp_path: Path
) -> None:
    project = Project(tmp_path / "project")
    with FakeEndpoint(text=chosen, latency_s=SLOW_S) as fake:
        project.set(fake.url, RAY | {"workers": 1})
        child = project.start(cluster.environment)
        wait_for(lambda: len(fake.bodies) >= 3, child)
        child.send_signal(number)
        _, err = child.communicate(timeout=240)
        assert child.returncode == code
        assert err == ("generate: interrupted; finished work is kept. Resume with: dvc repro\n" if code == 130 else "")
        time.sleep(1)
        asked = len(fake.bodies)
        time.sleep(1)
        assert len(fake.bodies) == asked < CHUNKS
    assert sorted(path.name for path in (project.folder / "data").iterdir()) == [
        "chunks.jsonl",
        "curated.jsonl",
        "review.jsonl",
        "store",
    ]


def test_a_node_that_is_removed_in_the_middle_costs_the_calls_that_were_at_work_there(local: list[bytes], tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    with ray_cluster(1, 1, 1) as own, FakeEndpoint(text=chosen, latency_s=SLOW_S) as fake:
        project.set(fake.url, RAY | {"workers": 3})
        child = project.start(own.environment)
        wait_for(lambda: len(fake.bodies) >= CHUNKS // 3, child)
        own.remove_node()
        _, err = child.communicate(timeout=240)
        assert child.returncode == 0, err
    assert project.outputs() == local
    assert len(fake.calls) == CHUNKS
    assert len(fake.bodies) - CHUNKS <= 2, "one call was at work on the node, and one waited there"


def test_all_ends_in_one_line_where_the_cluster_cannot_be_used(cluster: RayCluster, tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    project.set("http://127.0.0.1:9/v1", RAY)
    head = cluster.environment["RAY_ADDRESS"]
    elsewhere = "Start one with ray start, set executor.address to its head, or executor.engine to local"
    with FakeEndpoint(text=chosen) as fake, socket.create_server(("127.0.0.1", 0)) as silent:
        no_ray, dumb = fake.url.split("/")[2], f"127.0.0.1:{silent.getsockname()[1]}"
        for environment, start, end in [
            ({"RAY_ADDRESS": ""}, "params.yaml: executor.engine is ray; set executor.address or RAY_ADDRESS", "host:port"),
            *(
                (
                    cluster.environment | {"RAY_ADDRESS": address},
                    f"the Ray cluster at {address} cannot be used (no head of a Ray cluster answers there). ",
                    elsewhere,
                )
                for address in (nobody, no_ray, dumb, "no-such-host.invalid:6379")
            ),
            (
                cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(wrong)},
                f"the Ray cluster at {head} cannot be used (it asks for another token). ",
                "Name the file that holds it in RAY_AUTH_TOKEN_PATH",
            ),
        ]:
            began = time.monotonic()
            child = project.start(environment)
            _, err = child.communicate(timeout=60)
            assert child.returncode == 1 and len(err.splitlines()) == 1, err
            assert err.startswith(f"generate: {start}") and err.endswith(f"{end}\n")
            assert time.monotonic() - began < 45


def test_a_server_that_stops_answering_ends_the_run_with_the_node_s_name_and_keeps_what_came(
    cluster: RayCluster, tmp_path: Path
) -> None:
    project = Project(tmp_path / "project")
    with FakeEndpoint(text=chosen, dies_after=10) as fake:
        project.set(fake.url, RAY | {"workers": 2}, timeout_s=2)
        child = project.start(cluster.environment)
        _, err = child.communicate(timeout=120)
    assert child.returncode == 1
    assert f"generate: on {socket.gethostname()}: the LLM server at {fake.url} stopped answering after " in err
    assert "their replies are kept. Resume with: dvc repro" in err
    assert not (project.folder / "data/candidates.jsonl").exists()


def in_a_driver(cluster: RayCluster, program: str, folder: Path) -> Any:
    """What `program`, run as a process that uses the cluster, prints behind `found: `, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | cluster.environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("found: ")]  # Ray says things there as well
    assert done.returncode == 0 and len(found) == 1, done.stdout + done.stderr
    return json.loads(found[0].removeprefix("found: "))


DRIVER = """
import json, os, signal, time
import msgspec
from stages.executor import LOCAL, Executor, done_on_ray
ray = Executor(engine="ray", address="", workers=2, attempts=2)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_unit_that_ends_its_worker_fails_after_its_attempts_and_takes_no_other_with_it(
    workers: int, cluster: RayCluster, tmp_path: Path
) -> None:
    """With one worker, none is left each time: another must take its place for those that still wait."""
    program = (
        DRIVER
        + f"ray = msgspec.structs.replace(ray, workers={workers})"
        + """
def make():
    def work(unit):
        open(f"done-{unit.decode()}", "a").write("x")
        if unit == b"poison":
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        if unit == b"faulty":
            raise ValueError("cannot be done")
        time.sleep(0.1)
        return unit[::-1]
    return work
units = {name: name.encode() for name in ["poison", "faulty", *(f"u{n}" for n in range(12))]}
found = list(done_on_ray(ray, units, make, (), at_once=4, has_model=False))
print("found:", json.dumps([[one.name, one.result.decode(), one.failed] for one in found]))
"""
    )
    found = in_a_driver(cluster, program, tmp_path)
    ended = {name: (result, failed) for name, result, failed in found}
    assert len(found) == len(ended) == 14
    times = {}
    for name, reason in (("faulty", "ValueError: cannot be done"), ("poison", WORKER_ENDED)):
        said = re.fullmatch(rf"failed (\d) times on the cluster \({reason}\)", ended.pop(name)[1])
        assert said and int(said[1]) >= 2  # more where it was sent to a worker that another unit had ended
        times[name] = int(said[1])
    assert ended == {f"u{n}": (f"u{n}"[::-1], "") for n in range(12)}
    assert 2 <= len((tmp_path / "done-poison").read_text()) <= times["poison"]
    assert 1 <= len((tmp_path / "done-faulty").read_text()) <= times["faulty"]


def test_a_worker_that_ends_while_it_starts_is_started_again_and_in_the_end_no_more(cluster: RayCluster, tmp_path: Path) -> None:
    program = (
        DRIVER
        + """
from stages.program import ServerFailed
def once():
    try:
        open("ended", "x").close()
    except FileExistsError:
        return lambda unit: unit[::-1]
    os.kill(os.getpid(), signal.SIGKILL)
def never():
    with open("tries", "a") as tries:
        tries.write("x")
    os.kill(os.getpid(), signal.SIGKILL)
def faulty():
    raise RuntimeError("no room\\nfor it")
units = {f"u{n}": f"u{n}".encode() for n in range(12)}
said = {one.name: one.result.decode() for one in done_on_ray(ray, units, once, (), at_once=4, has_model=False)}
refusals = []
for make in (never, faulty):
    try:
        list(done_on_ray(ray, units, make, (), at_once=4, has_model=False))
    except ServerFailed as error:
        refusals.append(str(error))
print("found:", json.dumps([said, refusals]))
"""
    )
    results, (refusal, reason) = in_a_driver(cluster, program, tmp_path)
    assert reason == f"on {socket.gethostname()}: the worker could not start (RuntimeError: no room for it)"
    assert results == {f"u{n}": f"u{n}"[::-1] for n in range(12)}
    assert refusal.startswith(f"on {socket.gethostname()}: workers end again and again while they start: ")
    assert len((tmp_path / "tries").read_text()) == 4, "two workers, twice each"


def test_results_that_are_lost_with_their_node_are_made_again(tmp_path: Path) -> None:
    program = (
        DRIVER
        + """
import glob
ray = msgspec.structs.replace(ray, workers=3)
def make():
    open(f"worker-{os.getpid()}", "w").close()
    def work(unit):
        while len(glob.glob("worker-*")) < 3:
            time.sleep(0.05)
        with open("did", "a") as did:
            did.write(unit.decode() + " ")
        return unit * 500_000  # too large to travel before it is asked for
    return work
units = {f"u{n}": f"u{n}".encode() for n in range(12)}
found = []
for one in done_on_ray(ray, units, make, (), at_once=1, has_model=False):
    found.append([one.name, one.result == units[one.name] * 500_000])
    if len(found) == 1:
        while len(open("did").read().split()) < len(units):
            time.sleep(0.1)
        os.rename("did", "lost")
        while os.path.exists("lost"):
            time.sleep(0.1)
print("found:", json.dumps(found))
"""
    )
    with ray_cluster(1, 1, 1) as own, ThreadPoolExecutor() as beside:
        found = beside.submit(in_a_driver, own, program, tmp_path)
        while not (tmp_path / "lost").exists():
            assert not found.done(), found.result()
            time.sleep(0.1)
        own.remove_node()
        (tmp_path / "lost").unlink()
        assert sorted(found.result()) == sorted([f"u{n}", True] for n in range(12))
    assert (tmp_path / "did").read_text(), "none was made again"


def test_embeddings_and_greedy_answers_have_the_same_bits_on_the_cluster(
    cluster: RayCluster, base_folder: Path, tmp_path: Path
) -> None:
    program = (
        DRIVER
        + f"""
from pathlib import Path
from stages.answer import write_with_transformers
from stages.embedding import UNIT, embedding
from stages.files import sha256_of
from stages.llm import Request
from stages.models import load_tokenizer
texts = [f"Machine {{n}} needs oil" + " and a cloth" * (n % 9) for n in range(UNIT + 10)]
here, there = (embedding({MODELS.embedder!r}, where)(texts) for where in (LOCAL, ray))
folder = Path({str(base_folder)!r})
requests = {{str(n): Request("m", (("user", "What is " + "two and " * n + "three?"),), 0.0, 6, 0) for n in range(1, 9)}}
answers = []
for where in (LOCAL, ray):
    kept = {{}}
    write_with_transformers(folder, sha256_of(folder), load_tokenizer(folder), 60, where, "base", requests, kept.__setitem__)
    answers.append([kept[name].text for name in requests])
print("found:", json.dumps([here.shape[0], bool((here == there).all()), len(set(answers[0])), answers[0] == answers[1]]))
"""
    )
    rows, are_equal, different, same_answers = in_a_driver(cluster, program, tmp_path)
    assert (rows, are_equal, same_answers) == (522, True, True) and different > 1


def test_a_worker_with_another_model_is_refused(cluster: RayCluster, tiny_folder: Path, tmp_path: Path) -> None:
    program = (
        DRIVER
        + f"""
from stages.embedding import embedder_of
from stages.llm.caller import Caller
from stages.llm.source import Source
from stages.program import BadModelFile
from stages.systems.greedy import greedy_writer
said = []
source = Source((), {MODELS.teacher!r}, "llama.cpp", 512, 1, 30)
for make, given in [(embedder_of, ({MODELS.embedder!r}, "0" * 64)), (Caller, (source, "0" * 64)), (greedy_writer, ({str(tiny_folder)!r}, "0" * 64))]:
    try:
        list(done_on_ray(ray, {{"a": b"[]"}}, make, given, at_once=1, has_model=True))
    except BadModelFile as error:
        said.append(str(error))
print("found:", json.dumps(said))
"""
    )
    said = in_a_driver(cluster, program, tmp_path)
    assert len(said) == 3 and all(line.startswith(f"on {socket.gethostname()}: ") for line in said)
    assert f"{MODELS.embedder} is another model here" in said[0] and f"{MODELS.teacher} is another model here" in said[1]
    assert f"{tiny_folder} is missing here, or another model than where the run started" in said[2]


def test_a_worker_starts_a_server_of_its_own_where_no_endpoint_is_given(cluster: RayCluster, tmp_path: Path) -> None:
    program = (
        DRIVER
        + f"""
import contextlib
from pathlib import Path
from stages.llm import Request, Source, Store, asking, request_key
source = Source((), {MODELS.teacher!r}, "llama.cpp", 512, 2, 120)
requests = [Request(source.model(), (("user", text),), 0.0, 8, 0) for text in ("Name a colour.", "Say hello.")]
ray = msgspec.structs.replace(ray, workers=1)
with contextlib.closing(Store(Path("store"), "s")) as store, contextlib.ExitStack() as servers:
    replies, tally = asking(source, ray, store, servers)({{request_key(one): one for one in requests}}, label="test")
print("found:", json.dumps([tally.answered, tally.failed, [reply.text for reply in replies.values()]]))
"""
    )
    answered, failed, texts = in_a_driver(cluster, program, tmp_path)
    assert (answered, failed) == (2, 0) and all(texts)


def test_a_call_that_the_server_refuses_is_a_failure_on_the_cluster_as_well(cluster: RayCluster, tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    with FakeEndpoint(text=chosen, turn=lambda prompt, call: "400" if "machine 7 " in prompt else "ok") as fake:
        project.set(fake.url, RAY | {"workers": 2})
        project.run(cluster.environment)
    lost = read_records(project.folder / "data/generate_failures.jsonl", Failure)
    assert ("c007", "call-failed") in {(one.parent_id, one.reason) for one in lost}


@pytest.mark.parametrize("address", ["ray://h:1", "h", "h:x", "user@h:1", "http://h:1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(BadParams, match="executor.address"):
        convert_section("executor", {"engine": "ray", "address": address, "workers": 1, "attempts": 1}, Executor, "params.yaml")
    for good in ("", "auto", "10.0.0.5:6379", "head.example.org:6379", "[::1]:6379"):
        assert convert_section("executor", msgspec.to_builtins(Executor("ray", good, 1, 1)), Executor, "p").address == good


def test_ray_that_is_not_installed_is_one_line(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "from stages.executor import Executor\nfrom stages.executor.cluster import connect\n"
        "try: connect(Executor('ray', 'auto', 1, 1))\nexcept Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "params.yaml: executor.engine is ray, which is not installed. Install it with: make team\n"
