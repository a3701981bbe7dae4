"""How fast questions are made: rows P1, P2, P3 and P16 -> bench/results.json and a section of bench/RESULTS.md.

    python -m bench.generation --docs FOLDER [--chunks 40] [--pairs 3]

P1: accepted pairs a minute, against synthetic-data-kit as shipped, through one vLLM server. P2: new tokens a second, against vLLM
without a server. P3: calls after an edit in 1000 pages. P16: one worker against four. Costs up to 9 minutes a pair on two cores, and 5
more; each row is written as soon as it is known. P3 and P16 count and time calls to a fake endpoint; only P1 and P2 run a model.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.rows import REPOSITORY, machine, publish, row, section

sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

CONTEXT_TOKENS = 8192  # the kit asks for replies of up to 4096
PARALLEL = 64
KIT_CHARS = 4_000  # of the same text, one chunk of the kit: it asks one by one, so its pace does not depend on how much there is
SPEED_CHUNKS = 120  # for P2: enough to keep the engine full for a while
KIT_S = 240  # after which a run of the kit is ended
PAGES, EDITED, RENAMED = 1000, 500, 600
LATENCY_S, LATENCY_CALLS = 0.05, 400
HEADING = "## Question generation"
TARGETS = {"P1": ">= 50", "P2": ">= 0.9", "P3": "<= 0.0015", "P16": ">= 3.6"}


def page(number: int) -> str:
    """A page of P3 and P16 with one fact; page 0 has a second section."""
    oil = f"The gearbox of machine {number} needs {number + 3} grams of clean winter oil for a year of work in the northern hall."
    paint = "The frame of machine 0 needs two coats of bright green paint and a thin layer of varnish."
    return f"# Machine {number}\n\n## Oil\n\n{oil}\n" + (f"\n## Paint\n\n{paint}\n" if number == 0 else "")


def set_params(project: Path, docs: Path, endpoints: Sequence[Any] = (), **generate: Any) -> None:
    """params.yaml of `project`: the repository's, with `docs` as the one source and `generate` changed."""
    import msgspec
    import yaml

    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    params["collect"] = {"sources": {"pages": {"path": str(docs)}}, "remotes": {}}
    params["generate"] |= {"endpoints": msgspec.to_builtins(endpoints), "recipe": "quote-first", **generate}
    params["validate"]["max_rejected_share"] = 1.0
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    (project / "data").mkdir(exist_ok=True)
    for name in ("curated.jsonl", "judgements.jsonl", "review.jsonl"):
        (project / "data" / name).touch()


def run_stages(project: Path, *stages: str) -> float:
    """Runs `stages` as dvc.yaml does; the seconds that they took."""
    import yaml

    commands = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    started = time.monotonic()
    for name in stages:
        command = (commands[name].get("do") or commands[name])["cmd"].replace("${key}", "pages").split()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]), "CI": "true"}
        done = subprocess.run(
            [sys.executable, *command[1:]], cwd=project, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{name} ended with code {done.returncode}: {done.stderr.strip()[-2000:]}")
    return time.monotonic() - started


def lines_in(path: Path) -> int:
    return len(path.read_bytes().splitlines())


def accepted(project: Path, docs: Path, endpoint: Any) -> dict[str, float]:
    """Docsmith's accepted pairs a minute, with a new store, and where its time went."""
    from stages.llm import Store

    shutil.rmtree(project / "data/store", ignore_errors=True)
    set_params(project, docs, [endpoint], concurrency=PARALLEL)
    generate_s, validate_s = run_stages(project, "generate"), run_stages(project, "measure", "validate")
    store = Store(project / "data/store", "generate")
    rate = store.rate(endpoint.model)
    calls = json.loads((project / "reports/metrics/generate.json").read_text())["calls"]
    store.close()
    assert rate is not None
    return {
        "pairs": (pairs := lines_in(project / "data/pairs.jsonl")),
        "per_min": pairs / (generate_s + validate_s) * 60,
        "asking_s": calls / rate.calls_per_s,
        "generate_s": generate_s,
        "validate_s": validate_s,
    }


def of_the_kit(folder: Path, text: str, endpoint: Any) -> dict[str, float]:
    """The pairs a minute of `synthetic-data-kit create`, each one that it parses, for at most KIT_S seconds.

    A run without any counts as one pair, which makes its pace the most that it can have been.
    """
    import synthetic_data_kit
    import yaml

    config = yaml.safe_load(Path(synthetic_data_kit.__file__).with_name("config.yaml").read_text(encoding="utf-8"))
    config["llm"]["provider"] = "vllm"
    config["vllm"] |= {"api_base": endpoint.url, "model": endpoint.model}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "text.txt").write_text(text, encoding="utf-8")
    kit = Path(sys.executable).with_name("synthetic-data-kit")
    started = time.monotonic()
    command = [str(kit), "-c", "config.yaml", "create", "text.txt", "--output-dir", "out"]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=KIT_S)
    seconds = time.monotonic() - started
    found = folder / "out/text_qa_pairs.json"
    pairs = len(json.loads(found.read_text(encoding="utf-8"))["qa_pairs"]) if found.is_file() else 0
    return {"pairs": pairs, "seconds": seconds, "per_min": max(pairs, 1) / seconds * 60}


def through_the_server(folder: Path, requests: Any, endpoint: Any) -> float:
    """New tokens a second of Docsmith's client."""
    from stages.llm import Store, ask_all

    shutil.rmtree(folder, ignore_errors=True)
    store = Store(folder, "speed")
    _, tally = ask_all(requests, store, lambda: [endpoint], PARALLEL, 600, "P2")
    store.close()
    assert tally.failed == 0
    return tally.new_tokens / tally.seconds


def cpu_seconds() -> dict[str, float]:
    """Processor time so far of this process, the client, and of its children by what they do."""
    import psutil

    found = {"client": sum(psutil.Process().cpu_times()[:2]), "HTTP server": 0.0, "engine's scheduler": 0.0, "model": 0.0}
    roles = {"VLLM::EngineCor": "engine's scheduler", "VLLM::Worker": "model"}
    for child in psutil.Process().children(recursive=True):
        found[roles.get(child.name()[:15], "HTTP server")] += sum(child.cpu_times()[:2])
    return found


def without_a_server(model: str, messages: list[Any], schemas: list[Any], sampling: dict[str, Any]) -> tuple[float, float]:
    """New tokens a second of vLLM's `LLM.chat`, and its passes through the weights for each new token. To be called in a process of its own."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "2"}  # as stages.llm.vllm
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = LLM(
        model,
        dtype="bfloat16",
        max_model_len=CONTEXT_TOKENS,
        max_num_seqs=PARALLEL,
        enforce_eager=True,
        disable_log_stats=False,  # which count the passes
    )

    def chat(some: slice) -> list[Any]:
        each = [SamplingParams(**sampling, structured_outputs=StructuredOutputsParams(json=schema)) for schema in schemas[some]]
        return llm.chat(messages[some], each, use_tqdm=False)

    def passes() -> int:
        return sum(metric.count for metric in llm.get_metrics() if metric.name == "vllm:iteration_tokens_total")

    chat(slice(0, 1))
    before, started = passes(), time.monotonic()
    outputs = chat(slice(1, None))
    seconds = time.monotonic() - started
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    counted = passes() - before
    llm.llm_engine.engine_core.shutdown()  # else this process waits for the engine's, and that for this one
    return tokens / seconds, counted / tokens


def bandwidth(size: int) -> float:
    """Bytes a second at which all cores read a buffer of `size` bytes, best of 10."""
    import torch

    buffer = torch.ones(size // 4)
    buffer.sum()
    times = []
    for _ in range(10):
        started = time.perf_counter()
        buffer.sum()
        times.append(time.perf_counter() - started)
    return size / min(times)


def with_a_model(folder: Path, docs: Path, chunks: int, pairs: int) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """Rows P1 and P2, and where Docsmith's time went, after each pair. Each has a server of its own, so that none finds a warm cache."""
    import yaml

    from stages.generate import Params, spread
    from stages.llm.vllm import vllm_server
    from stages.models import as_hf_folder
    from stages.params import convert_section
    from stages.recipes import asks_about
    from stages.records import Chunk, read_records, write_records

    set_params(folder, docs)
    os.chdir(folder)
    run_stages(folder, "collect", "ingest", "chunk")
    params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    every = read_records(folder / "data/chunks.jsonl", Chunk)
    mine = spread(every, chunks)
    others = spread([chunk for chunk in every if chunk not in mine], SPEED_CHUNKS)
    if len(mine) < chunks or len(others) < SPEED_CHUNKS:
        raise SystemExit(f"{docs} gives {len(every)} chunks; {chunks} are needed for P1 and {SPEED_CHUNKS} for P2")
    write_records(folder / "data/chunks.jsonl", mine)
    text = "\n\n".join(chunk.text for chunk in mine)[:KIT_CHARS]
    model = as_hf_folder(params["models"]["teacher"]).resolve()
    generate = convert_section("generate", params["generate"], Params, "params.yaml")
    asks = [ask for chunk in others for ask in asks_about(chunk, generate, model.name)]
    requests = {ask.key: ask.request for ask in asks}
    first, *rest = requests
    messages = [[{"role": role, "content": content} for role, content in request.messages] for request in requests.values()]
    schemas = [json.loads(bytes(request.schema)) for request in requests.values()]
    sampling = {"temperature": generate.temperature, "max_tokens": generate.max_tokens}
    print(f"P1: {chunks} chunks, the kit gets {len(text)} characters of them; P2: {len(rest)} prompts", flush=True)

    p1: list[float] = []
    p2: list[float] = []
    ours: list[dict[str, float]] = []
    kits: list[dict[str, float]] = []
    speeds: list[tuple[float, float, float]] = []
    for turn in range(pairs):

        def offline() -> tuple[float, float]:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                return alone.submit(without_a_server, str(model), messages, schemas, sampling).result()

        raw = offline() if turn % 2 else None
        with vllm_server(model, CONTEXT_TOKENS, PARALLEL) as endpoint:
            through_the_server(folder / "speed", {first: requests[first]}, endpoint)
            before = cpu_seconds()
            speed = through_the_server(folder / "speed", {key: requests[key] for key in rest}, endpoint)
            spent = {name: seconds - before[name] for name, seconds in cpu_seconds().items()}
            for peer in (True, False) if turn % 2 else (False, True):
                if peer:
                    kits.append(of_the_kit(folder / "kit", text, endpoint))
                else:
                    ours.append(accepted(folder, docs, endpoint))
        raw = raw or offline()
        speeds.append((speed, *raw))
        p1.append(ours[-1]["per_min"] / kits[-1]["per_min"])
        p2.append(speed / raw[0])
        print(
            f"P1 {turn + 1}/{pairs}: {ours[-1]['pairs']:.0f} accepted at {ours[-1]['per_min']:.1f}/min, kit {kits[-1]['pairs']:.0f} at "
            f"{kits[-1]['per_min']:.1f}/min in {kits[-1]['seconds']:.0f} s; P2: {speed:.0f} and {raw[0]:.0f} tokens/s",
            flush=True,
        )
        size = sum(part.stat().st_size for part in model.glob("*.safetensors"))
        read = bandwidth(size)
        limit = statistics.median(speed * passes * size / read for speed, _, passes in speeds)
        share = statistics.median(one["asking_s"] / (one["generate_s"] + one["validate_s"]) for one in ours)
        middle = {name: statistics.median(one[name] for one in ours) for name in ours[0]}
        where = (
            f"P1: in {sum(not one['pairs'] for one in kits)} of {len(kits)} runs the kit had no pair after {KIT_S} s, which counts as one. Median: {middle['pairs']:.0f} pairs at {middle['per_min']:.1f} a minute against {statistics.median(one['pairs'] for one in kits):.0f} at "
            f"{statistics.median(one['per_min'] for one in kits):.1f}. Of Docsmith's {middle['generate_s'] + middle['validate_s']:.0f} s, {middle['asking_s']:.0f} s are asking, "
            f"{middle['generate_s'] - middle['asking_s']:.0f} s start-up, embedding and ranking in `generate`, and {middle['validate_s']:.0f} s `measure` and `validate`. "
            f"P2, median: {statistics.median(one[0] for one in speeds):.0f} tokens/s through the server, {statistics.median(one[1] for one in speeds):.0f} without it. "
            f"Processor time through the server: {', '.join(f'{name} {seconds / sum(spent.values()):.0%}' for name, seconds in spent.items())}. "
            f"The memory was read at {read / 1e9:.1f} GB/s in blocks of the weights' {size / 1e6:.0f} MB, and vLLM went through the weights "
            f"{statistics.median(one[2] for one in speeds):.3f} times for each new token, prompts included."
        )
        yield row(p1, share), row(p2, limit), where


def after_edits(folder: Path) -> tuple[dict[str, Any], str]:
    """Row P3."""
    from fake_endpoint import FakeEndpoint, chosen

    docs = folder / "docs"
    docs.mkdir()
    names = [f"machine-{number:04}.md" for number in range(PAGES)]
    for number, name in enumerate(names):
        (docs / name).write_text(page(number), encoding="utf-8")

    with FakeEndpoint(text=chosen) as fake:
        endpoint = {"url": fake.url, "model": "fake"}
        set_params(folder, docs, [endpoint], pairs_per_chunk=1, wordings=1, min_similarity=0.0, concurrency=PARALLEL)

        def calls(what: str) -> int:
            before = len(fake.bodies)
            run_stages(folder, "collect", "ingest", "chunk", "generate")
            print(f"P3: {what}: {len(fake.bodies) - before} calls", flush=True)
            return len(fake.bodies) - before

        full = calls(f"{PAGES} pages")
        (docs / names[EDITED]).write_text(page(EDITED).replace("winter", "summer"), encoding="utf-8")
        edit = calls("one sentence edited")
        for name in names:
            text = (docs / name).read_text(encoding="utf-8")
            (docs / name).write_text(re.sub(" of ", "\nof ", text).replace("\n\n", "\n \n\n"), encoding="utf-8")
        wrapped = calls("white space changed on every page")
        (docs / names[RENAMED]).rename(docs / "renamed.md")
        renamed = calls("a page renamed")
        (docs / names[0]).write_text(page(0).partition("## Paint")[0], encoding="utf-8")
        deleted = calls("a section deleted")
        run_stages(folder, "measure", "validate")
    left = sum("Paint" in line for line in (folder / "data/pairs.jsonl").read_text(encoding="utf-8").splitlines())
    counts = {"full": full, "edit": edit, "white_space": wrapped, "rename": renamed, "deletion": deleted, "pairs_left": left}
    said = f"P3, calls to a fake endpoint: {full} for {PAGES} pages, {edit} after one edited sentence, {wrapped} after white space was changed on every page, "
    said += f"{renamed} after a rename, {deleted} after a section was deleted, of which {left} pairs are left."
    return row([edit / full], None) | {"calls": counts}, said


def with_workers(folder: Path, pairs: int) -> tuple[dict[str, Any], str]:
    """Row P16, on the chunks that `after_edits` left in `folder`."""
    from fake_endpoint import FakeEndpoint, chosen

    from stages.llm import Store

    written = set()
    ratios: list[float] = []
    servers: list[float] = []
    fractions: list[float] = []
    with ExitStack() as stack:
        fakes = [stack.enter_context(FakeEndpoint(text=chosen, latency_s=LATENCY_S)) for _ in range(4)]
        endpoints = [{"url": fake.url, "model": "fake"} for fake in fakes]
        settings = {"pairs_per_chunk": 1, "wordings": 1, "min_similarity": 0.0, "max_chunks": LATENCY_CALLS}

        def pace(workers: int, count: int) -> float:
            shutil.rmtree(folder / "data/store", ignore_errors=True)
            set_params(folder, folder / "docs", endpoints[:count], concurrency=workers, **settings)
            run_stages(folder, "generate")
            written.add(
                b"".join((folder / "data" / name).read_bytes() for name in ("candidates.jsonl", "generate_failures.jsonl"))
            )
            store = Store(folder / "data/store", "generate")
            rate = store.rate("fake")
            store.close()
            assert rate is not None
            return rate.calls_per_s

        for turn in range(pairs):
            one, _, four, spread_out = pace(1, 1), pace(2, 1), pace(4, 1), pace(1, 4)
            ratios.append(four / one)
            servers.append(spread_out / one)
            fractions.append(four * LATENCY_S / 4)
            print(f"P16 {turn + 1}/{pairs}: {one:.1f} calls/s, 4 workers {four:.1f}, 4 endpoints {spread_out:.1f}", flush=True)
    said = (
        f"P16, a fake endpoint that takes {1000 * LATENCY_S:.0f} ms a call, {LATENCY_CALLS} calls: 4 workers make {statistics.median(ratios):.2f} times the calls of one, "
        f"4 endpoints with a worker each {statistics.median(servers):.2f} times. The outputs of 1, 2 and 4 workers and of 4 endpoints are "
        + ("equal byte for byte." if len(written) == 1 else f"NOT equal: {len(written)} versions.")
    )
    return row(ratios, statistics.median(fractions)) | {
        "is_equal": len(written) == 1,
        "endpoints_ratio": round(statistics.median(servers), 3),
    }, said


def opening(chunks: int) -> list[str]:
    """How the section begins."""
    return [
        HEADING,
        "",
        f"`python -m bench.generation --docs <folder> --chunks {chunks}` on {machine()}.",
        "The ratio is the median of interleaved pairs. The fraction of the limit is, for P1, the share of the time that is spent asking;",
        "for P2, the bytes of the weights times passes a second over the memory's bandwidth; for P16, of 4 workers that never wait in between.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=40, help="for P1")
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    docs = arguments.docs.resolve()
    rows: dict[str, Any] = {}
    remarks: dict[str, str] = {}

    def keep(remark: str, **fresh: dict[str, Any]) -> None:
        rows.update(fresh)
        remarks["".join(fresh)] = remark
        publish(fresh, section(opening(arguments.chunks), rows, TARGETS, list(remarks.values())))

    with tempfile.TemporaryDirectory(prefix="docsmith-bench-") as scratch:
        project = Path(scratch)
        p3, calls = after_edits(project)
        keep(calls, P3=p3)
        p16, workers = with_workers(project, arguments.pairs)
        keep(workers, P16=p16)
        for p1, p2, where in with_a_model(project, docs, arguments.chunks, arguments.pairs):
            keep(where, P1=p1, P2=p2)
        os.chdir(REPOSITORY)
    print(section(opening(arguments.chunks), rows, TARGETS, list(remarks.values())))


if __name__ == "__main__":
    main()
