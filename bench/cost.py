"""What a documentation of a given size costs -> tables for docs/team/cost.md, worked out from the rates in bench/results.json.

    python -m bench.cost [--gpu-tokens-per-s 5000] [--gpu-price-per-hour 2] [--latency-s 1] [--concurrency 64]
    python -m bench.cost --measure    the rates that only this page needs, with a model: minutes on two cores
    python -m bench.cost --check      the model against calls to a fake endpoint: two minutes

Everything grows with the pages; what the handbook's demo took says how. Rates of GPUs and prices are the reader's: nothing here
was measured on a GPU. `--measure` and `--check` write rows of bench/results.json and the section of bench/RESULTS.md.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.rows import REPOSITORY, machine, publish, row

sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

HEADING = "## Cost on paper"
PAGES = (1_000, 100_000, 10_000_000)
TOKENS_PER_S, PRICE_PER_HOUR = 5_000.0, 2.0  # of the worked example: assumed, not measured
LATENCY_S, CONCURRENCY = 1.0, 64
WIDTH = 384  # of the embedder's vectors
CHUNKS_ASKED = 40  # for --measure
STORED = (10_000, 100_000)  # replies
COMPARED, QUESTIONS = 50_000, 200  # passages that a question is compared with, and questions
FAKE_LATENCY_S, FAKE_CONCURRENCY = 0.05, (1, 2, 4, 8)


class Work(NamedTuple):
    """What a documentation gives and takes."""

    pages: int
    chunks: float
    calls: float
    candidates: float
    passages: float
    pairs: float  # that are trained on
    prompt_tokens: float
    new_tokens: float


def work_of(pages: int, results: Mapping[str, Any]) -> Work:
    """The work of `pages` like the handbook's, by what the demo and the teacher took."""
    demo, teacher = results["demo"], results["teacher"]
    share = pages / demo["pages"]
    calls = share * demo["calls"]
    return Work(
        pages,
        share * demo["chunks"],
        calls,
        share * demo["candidates"],
        share * demo["chunks"] * teacher["passages_per_chunk"],
        share * demo["trained"],
        calls * teacher["prompt_tokens_per_call"],
        calls * teacher["new_tokens_per_call"],
    )


def waiting_s(calls: float, latency_s: float, concurrency: int, overhead_s: float = 0.0) -> float:
    """Seconds for `calls` to an endpoint that takes `latency_s` for each of `concurrency` at once, and the client `overhead_s` a call."""
    return calls * (latency_s + overhead_s) / concurrency


def validate_s(candidates: float, results: Mapping[str, Any]) -> float:
    """Seconds of the stage `validate`: the straight line through the two largest runs of P10."""
    (fewer, short), (more, long) = sorted((int(rows), seconds) for rows, seconds in results["P10"]["seconds"].items())[-2:]
    return max(0.0, short + (candidates - fewer) * (long - short) / (more - fewer))


def clusters_s(candidates: float, results: Mapping[str, Any]) -> float:
    """Seconds to find near-duplicates: the power law through the two largest runs of P11."""
    small, large = sorted(results["P11"]["checks"], key=lambda one: one["rows"])[-2:]
    power = math.log(large["clusters_s"] / small["clusters_s"]) / math.log(large["rows"] / small["rows"])
    return float(large["clusters_s"] * (candidates / large["rows"]) ** power)


def round_trips_s(work: Work, results: Mapping[str, Any]) -> float:
    """Seconds in which `generate` compares every question with every passage, one question after the other."""
    return work.candidates * work.passages * float(results["round_trips"]["seconds_per_product"])


def embedding_s(work: Work, results: Mapping[str, Any]) -> float:
    """Seconds in which `generate` embeds every question and every passage once."""
    return (work.candidates + work.passages) * float(results["embedding"]["seconds_per_text"])


def number(value: float) -> str:
    """`value` in three digits, as 1,840 or 1.84 million."""
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:,.0f} {unit}"
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def span(seconds: float) -> str:
    """`seconds` in the unit that a person would use."""
    for unit, size in (("years", 31_557_600), ("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds)} s"


def size(of_bytes: float) -> str:
    for unit, large in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if of_bytes >= large:
            return f"{number(of_bytes / large)} {unit}"
    return f"{number(of_bytes / 1e3)} kB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def tables(
    results: Mapping[str, Any],
    tokens_per_s: float = TOKENS_PER_S,
    price_per_hour: float = PRICE_PER_HOUR,
    latency_s: float = LATENCY_S,
    concurrency: int = CONCURRENCY,
) -> list[str]:
    """The tables of docs/team/cost.md: the work, the cost of asking, and the times and sizes of what does not run on the GPU."""
    demo, teacher, cpu = results["demo"], results["teacher"], results["demo"]["cpu_tokens_per_s"]
    every = [work_of(pages, results) for pages in PAGES]
    head = [f"{work.pages:,} pages" for work in every]

    def line(name: str, show: Any, of: Any) -> list[str]:
        return [name, *(show(of(work)) for work in every)]

    store, per_candidate = results["reply_store"], teacher["bytes_per_candidate"]
    return [
        table(
            ["work", *head],
            [
                line("chunks", number, lambda work: work.chunks),
                line("calls to the teacher", number, lambda work: work.calls),
                line("candidates", number, lambda work: work.candidates),
                line("pairs to train on", number, lambda work: work.pairs),
                line("prompt tokens", number, lambda work: work.prompt_tokens),
                line("new tokens", number, lambda work: work.new_tokens),
            ],
        ),
        table(
            ["asking", *head],
            [
                line(f"two cores, {cpu} tokens/s, measured", span, lambda work: work.new_tokens / cpu),
                line(
                    f"GPU hours at {number(tokens_per_s)} tokens/s, assumed",
                    number,
                    lambda work: work.new_tokens / tokens_per_s / 3600,
                ),
                line(
                    f"money at {price_per_hour:.2f} an hour, assumed",
                    number,
                    lambda work: work.new_tokens / tokens_per_s / 3600 * price_per_hour,
                ),
                line(
                    f"an endpoint of {number(latency_s)} s a call, {concurrency} calls at once, assumed",
                    span,
                    lambda work: waiting_s(work.calls, latency_s, concurrency),
                ),
            ],
        ),
        table(
            ["beside asking", *head],
            [
                line("embedding questions and passages, one core", span, lambda work: embedding_s(work, results)),
                line("round trips in `generate`, one core", span, lambda work: round_trips_s(work, results)),
                line("near-duplicates in `measure`", span, lambda work: clusters_s(work.candidates, results)),
                line("`validate`", span, lambda work: validate_s(work.candidates, results)),
                line("`train` in the CPU profile", span, lambda work: work.pairs * demo["train_s"] / demo["trained"]),
                line("vectors of all passages in memory", size, lambda work: work.passages * WIDTH * 4),
                line("the store of replies on disk", size, lambda work: work.calls * store["bytes_per_reply"]),
                line("writing it, reply by reply, one core", span, lambda work: work.calls * store["seconds_per_reply"]),
                line("`data/candidates.jsonl`", size, lambda work: work.candidates * per_candidate),
            ],
        ),
    ]


def kept(folder: Path, replies: int) -> dict[str, float]:
    """Seconds of a core and bytes that the store takes for a reply, when it gets `replies` of the length that the teacher's have."""
    from stages.llm import Reply, Store, request_key
    from stages.llm.store import Request

    store = Store(folder, f"of-{replies}")
    keys = [request_key(Request("m", (("user", str(one)),), 0.0, 1, 0)) for one in range(replies)]
    questions = {f"question_{place}": "How long does the gearbox run on one filling?" for place in range(1, 5)}
    reply = Reply(json.dumps(questions), tokens=58, prompt_tokens=356)
    started = time.process_time()
    for key in keys:
        store.keep(key, reply)
    seconds = time.process_time() - started
    store.close()
    return {"seconds_per_reply": seconds / replies, "bytes_per_reply": store.path.stat().st_size / replies}


def compared_s() -> float:
    """Seconds of a core for the product of a question and a passage, as `generate` multiplies them."""
    import numpy as np
    import threadpoolctl

    vectors = np.random.default_rng(5).normal(size=(COMPARED, WIDTH)).astype("float32")
    with threadpoolctl.threadpool_limits(1):
        started = time.process_time()
        for question in vectors[:QUESTIONS]:
            np.flatnonzero(vectors @ question > 1e9)
        return (time.process_time() - started) / QUESTIONS / COMPARED


def embedded_s(texts: Sequence[str]) -> float:
    """Seconds of a core to embed one of `texts`."""
    import torch

    from stages.embedding import embedding
    from stages.params import Models, read_section

    embed = embedding(read_section("models", Models, REPOSITORY / "params.yaml").embedder)
    torch.set_num_threads(1)  # another would wait for its turn, and count as work
    embed(["It is loaded now."])
    started = time.process_time()
    embed(texts)
    return (time.process_time() - started) / len(set(texts))


def measured(folder: Path, docs: Path) -> dict[str, dict[str, Any]]:
    """The rows `teacher`, `reply_store`, `embedding` and `round_trips`: what a call, a reply, a text and a product take."""
    import sqlite3

    from bench.generation import run_stages, set_params
    from stages.evidence import passages_of
    from stages.records import Candidate, Chunk, read_records

    set_params(folder, docs, max_chunks=CHUNKS_ASKED)
    run_stages(folder, "collect", "ingest", "chunk", "generate")
    chunks = read_records(folder / "data/chunks.jsonl", Chunk)
    candidates = read_records(folder / "data/candidates.jsonl", Candidate)
    with sqlite3.connect(folder / "data/store/generate.sqlite") as database:
        asked = "SELECT sum(calls), sum(prompt_tokens), sum(new_tokens) FROM askings"
        calls, prompt_tokens, new_tokens = database.execute(asked).fetchone()
    passages = [passage.answer for chunk in chunks for passage in passages_of(chunk.markdown())]
    few, many = (kept(folder / "kept", replies) for replies in STORED)
    rates = {
        "teacher": {
            "calls": calls,
            "prompt_tokens_per_call": round(prompt_tokens / calls, 1),
            "new_tokens_per_call": round(new_tokens / calls, 1),
            "passages_per_chunk": round(len(passages) / len(chunks), 2),
            "bytes_per_candidate": round((folder / "data/candidates.jsonl").stat().st_size / len(candidates)),
        },
        "reply_store": many | {"growth": round(many["seconds_per_reply"] / few["seconds_per_reply"], 2)},
        "embedding": {"seconds_per_text": embedded_s(passages)},
        "round_trips": {"seconds_per_product": compared_s()},
    }
    of_run = {name: value for name, value in row([1.0], None).items() if name in ("commit", "load")}
    return {name: rate | of_run for name, rate in rates.items()}


class Page(NamedTuple):
    """A page's length, and what is asked about it."""

    words: int
    asks: Sequence[Any]


def pages_of(folder: Path, docs: Path) -> list[Page]:
    """The pages of `docs`, as the pipeline asks about them."""
    from bench.generation import run_stages, set_params
    from stages.generate import Params
    from stages.params import read_section
    from stages.recipes import asks_about
    from stages.records import Chunk, Document, read_records

    set_params(folder, docs)
    run_stages(folder, "collect", "ingest", "chunk")
    generate = read_section("generate", Params, folder / "params.yaml")
    chunks = read_records(folder / "data/chunks.jsonl", Chunk)
    return [
        Page(
            len(document.text.split()),
            [ask for chunk in chunks if chunk.document_id == document.id for ask in asks_about(chunk, generate, "fake")],
        )
        for document in read_records(folder / "data/documents.jsonl", Document)
    ]


def simulated(folder: Path, pages: Sequence[Page], latency_s: float, concurrencies: Sequence[int]) -> list[dict[str, float]]:
    """For each concurrency, the calls and seconds that the model says for `pages`, and those that a fake endpoint counted.

    Calls are predicted from every second page, by words, and the client's own time a call from those pages' calls, one at a time.
    """
    from fake_endpoint import FakeEndpoint, chosen

    from stages.llm import Endpoint, Store, ask_all

    sample = pages[::2]
    with FakeEndpoint(text=chosen, latency_s=latency_s) as fake:

        def asked(some: Sequence[Page], concurrency: int) -> tuple[int, float]:
            before = len(fake.bodies)
            store = Store(folder, f"{len(some)}-{concurrency}")
            requests = {ask.key: ask.request for page in some for ask in page.asks}
            endpoint = Endpoint(url=fake.url, model="fake")
            _, tally = ask_all(requests, store, lambda: [endpoint], concurrency, 60, "cost")
            store.close()
            assert tally.failed == 0
            return len(fake.bodies) - before, tally.seconds

        sample_calls, sample_s = asked(sample, 1)
        overhead_s = sample_s / sample_calls - latency_s
        predicted = sample_calls * sum(page.words for page in pages) / sum(page.words for page in sample)
        found = []
        for concurrency in concurrencies:
            calls, seconds = asked(pages, concurrency)
            found.append(
                {
                    "concurrency": concurrency,
                    "calls": calls,
                    "predicted_calls": round(predicted, 1),
                    "seconds": round(seconds, 3),
                    "predicted_s": round(waiting_s(predicted, latency_s, concurrency, overhead_s), 3),
                }
            )
    return found


def said(results: Mapping[str, Any]) -> str:
    """The section of RESULTS.md."""
    teacher, store, embedded, trips = (results[name] for name in ("teacher", "reply_store", "embedding", "round_trips"))
    lines = [
        HEADING,
        "",
        f"`python -m bench.cost --measure` and `python -m bench.cost --check` on {machine()}. The page docs/team/cost.md is worked out from these rows,",
        "from the demo above, and from P10 and P11. Nothing of it was measured on a GPU.",
        "",
        f"A call of the recipe `quote-first` takes {teacher['prompt_tokens_per_call']} prompt tokens, most of them examples, and {teacher['new_tokens_per_call']} new ones "
        f"({teacher['calls']} calls about {CHUNKS_ASKED} chunks of the handbook). A chunk holds {teacher['passages_per_chunk']} passages, and a candidate takes "
        f"{teacher['bytes_per_candidate']} bytes. The store keeps a reply in {1000 * store['seconds_per_reply']:.3f} ms and {store['bytes_per_reply']:.0f} bytes at {STORED[1]} replies; "
        f"it took {store['growth']:.2f} times as long as at {STORED[0]}. One core embeds {1 / embedded['seconds_per_text']:.0f} passages a second, and compares a "
        f"question with {COMPARED} passages in {1000 * COMPARED * trips['seconds_per_product']:.1f} ms; these three are times of the processor, as other work ran beside it.",
        "",
    ]
    if "cost" in results:
        checks = results["cost"]["checks"]
        lines += [
            f"The model against a fake endpoint that takes {1000 * FAKE_LATENCY_S:.0f} ms a call, asked about the handbook. Calls are predicted from every second page, by words,",
            "and seconds from those calls, the latency, and the client's own time a call when it makes one at a time.",
            "",
            table(
                ["calls at once", "calls predicted", "calls", "seconds predicted", "seconds", "seconds over predicted"],
                [
                    [
                        str(one["concurrency"]),
                        f"{one['predicted_calls']:.0f}",
                        str(one["calls"]),
                        f"{one['predicted_s']:.2f}",
                        f"{one['seconds']:.2f}",
                        f"{one['seconds'] / one['predicted_s']:.2f}",
                    ]
                    for one in checks
                ],
            ),
            "",
        ]
    return "\n".join(lines)


def read_results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((REPOSITORY / "bench/results.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-tokens-per-s", type=float, default=TOKENS_PER_S, help="new tokens of all requests together")
    parser.add_argument("--gpu-price-per-hour", type=float, default=PRICE_PER_HOUR)
    parser.add_argument("--latency-s", type=float, default=LATENCY_S, help="of a call to an endpoint of somebody else's")
    parser.add_argument("--concurrency", type=int, default=CONCURRENCY)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    fresh: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="docsmith-cost-") as scratch:
        if arguments.measure:
            fresh |= measured(Path(scratch), REPOSITORY / "docs")
        if arguments.check:
            checks = simulated(Path(scratch), pages_of(Path(scratch), REPOSITORY / "docs"), FAKE_LATENCY_S, FAKE_CONCURRENCY)
            fresh["cost"] = row([one["seconds"] / one["predicted_s"] for one in checks], None) | {"checks": checks}
    if fresh:
        section = said(read_results() | fresh)
        publish(fresh, section)
        print(section)
    else:
        of_reader = (arguments.gpu_tokens_per_s, arguments.gpu_price_per_hour, arguments.latency_s, arguments.concurrency)
        print("\n\n".join(tables(read_results(), *of_reader)))


if __name__ == "__main__":
    main()
