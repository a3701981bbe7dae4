"""How validation grows: rows P10 and P11 -> bench/results.json and a section of bench/RESULTS.md.

    python -m bench.validation [--pairs 3] [--rows 100000] [--growth 10000 100000 1000000] [--embedded 2000]

P10: the whole stage `validate`, Data Docs included, against Great Expectations called directly with the same suite, on tables made in
that process and on tables that lie ready. P11: near-duplicates found and leaks kept out, against datasketch and against comparing each vector with each. The candidates are
made from templates. Costs half an hour on two cores, most of it for a million rows; each row is written as soon as it is known.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.rows import REPOSITORY, machine, publish, row, section

HEADING = "## Validation"
TARGETS = {"P10": "<= 1.3; linear", "P11": "linear (1)"}
WORDINGS, FACTS = 4, 2  # of a fact, of a chunk
DUPLICATES = 50  # one of so many facts is told again elsewhere, nearly in the same words
COMPARED = 20_000  # vectors that are compared each with each; the time for more is worked out from these
DATA = "candidates chunks judgements measurements review pairs rejected"

SLOTS = (  # part, colour, machine, place, need, time
    "spindle,gearbox,bearing,clutch,valve,piston,flywheel,chain,nozzle,roller,hinge,filter",
    "amber,black,blue,bronze,copper,cream,golden,green,grey,ivory,orange,purple,red,silver,white,yellow",
    "lathe,loom,press,mill,saw,crane,pump,boiler,kiln,winch,drill,furnace,mixer,conveyor,engine,turbine",
    "north hall,south hall,old barn,cellar,attic,harbour,quarry,orchard,brewery,foundry,chapel,market",
    "clean oil,soft soap,warm water,dry sand,fine chalk,new felt,fresh paint,thin wax,pine tar,rock salt",
    "before winter,after each flood,at sunrise,in late spring,once the guests have left,during the harvest",
)
KEEPERS = ("an older keeper", "the watch", "a miller's cart", "each guest", "the night shift", "a carter", "whoever is awake")
ERRANDS = (
    "brings along",
    "keeps in a locked chest",
    "buys at the gate",
    "takes from the store",
    "carries up the stairs",
    "weighs on the old scales",
    "leaves at the door",
    "has to sign for",
    "mixes by hand",
    "warms by the stove",
    "pours from a can",
)


def fact(number: int) -> tuple[str, str, str]:
    """Subject, need and time of a fact. A third of the facts is about a setting, set as code, and a third has a number."""
    place = number * 1_000_003  # a prime, so that neighbours differ in several words, and no two of 2 million facts are the same
    chosen = []
    for slot in SLOTS:
        words = slot.split(",")
        chosen.append(words[place % len(words)])
        place //= len(words)
    part, colour, machine_name, hall, need, when = chosen
    if number % 3 == 0:
        return f"the setting `{machine_name}.{part}_{number}`", need, when
    return (
        f"the {part} of the {colour} {machine_name} in the {hall} of district {number % 1000 if number % 3 == 1 else 'nine'}",
        need,
        when,
    )


def told(number: int, way: int) -> tuple[str, str]:
    """Question and answer about a fact, in one of WORDINGS ways; from there on near-duplicates of the first, as leaks have them."""
    subject, need, when = fact(number)
    questions = [
        f"What does {subject} need {when}?",
        f"Can you name the supplies that keepers bring to {subject} {when}?",
        f"How is {subject} looked after {when}?",
        f"Which care should a new keeper give to {subject} {when}?",
        f"what does {subject} need {when} ?",  # case and blanks
        f"What does {subject} need {when}, please?",  # a word more
        f"{when.capitalize()}, what does {subject} need?",  # the order
    ]
    what = f"{need}, which {KEEPERS[number % 7]} {ERRANDS[number % 11]}"
    plain = f"{when.capitalize()}, {subject} needs {what}."
    other = f"{subject[0].upper()}{subject[1:]} needs {what}, {when}."
    return questions[way], other if way == WORDINGS + 2 else plain


class Corpus(NamedTuple):
    """Made-up inputs of `validate`, and the places among the candidates of each pair of planted near-duplicates."""

    candidates: list[Any]
    chunks: list[Any]
    measurements: list[Any]
    planted: list[tuple[int, int]]


def corpus(rows: int) -> Corpus:
    """About `rows` candidates, of which one in twelve breaks a rule and one wording in four is one too many."""
    from stages.records import Candidate, Chunk, Measurement, content_id

    candidates: list[Any] = []
    chunks: list[Any] = []
    planted: list[tuple[int, int]] = []
    facts = rows // WORDINGS
    copies = [(number, WORDINGS + number // DUPLICATES % 3) for number in range(0, facts, DUPLICATES)]
    told_in = [[(number, way) for way in range(WORDINGS)] for number in range(facts)] + [[copy] for copy in copies]
    for start in range(0, len(told_in), FACTS):
        here = told_in[start : start + FACTS]
        text = "\n\n".join(dict.fromkeys(told(*ways[0])[1] for ways in here))
        where = f"page-{start // 40}.md", f"Section {start}"
        chunk = Chunk(
            id=content_id(*where, text),
            document_id=content_id(where[0]),
            section_id=content_id(*where),
            path=where[0],
            heading_path=where[1:],
            start=0,
            end=len(text),
            text=text,
        )
        chunks.append(chunk)
        for ways in here:
            for place, (number, way) in enumerate(ways, 1):
                question, answer = told(number, way)
                if way >= WORDINGS:
                    planted.append((number * WORDINGS, len(candidates)))
                elif number % 12 == 5:
                    answer += " It has 77 gears."
                candidates.append(
                    Candidate(
                        id=content_id(chunk.id, question, answer),
                        chunk_id=chunk.id,
                        fact_id=content_id(chunk.id, number),
                        question=question,
                        answer=answer,
                        quote=told(number, way)[1],
                        type="factual",
                        recipe="templates",
                        model="none",
                        similarity=0.9 - place / 10,
                        rank=1,
                        wording=place,
                    )
                )
    measurements = [
        Measurement(id=one.id, entailment=0.9, language="en", source_language="en", secrets=(), personal_data=(), cluster=one.id)
        for one in candidates
    ]
    return Corpus(candidates, chunks, measurements, planted)


# P10


def lay_out(folder: Path, rows: int) -> Path:
    """A folder with the inputs of `validate` and, for the peer, the suite and the tables that the stage makes of them."""
    import msgspec

    from stages import validate
    from stages.params import read_section
    from stages.records import write_records

    made = corpus(rows)
    (folder / "data").mkdir(parents=True)
    (folder / "params.yaml").symlink_to(REPOSITORY / "params.yaml")
    for name in ("candidates", "chunks", "measurements"):
        write_records(folder / f"data/{name}.jsonl", getattr(made, name))
    for name in ("judgements", "review"):
        (folder / f"data/{name}.jsonl").touch()
    rules = validate.read_rules(validate.SUITE, validate=read_section("validate", validate.Params, folder / "params.yaml"))
    for name, table in tables_of(folder).items():
        table.to_parquet(folder / f"{name}.parquet")
    (folder / "rules.json").write_bytes(msgspec.json.encode(rules))
    return folder


def tables_of(folder: Path) -> dict[str, Any]:
    """The tables that the rules ask about, of the records in `folder`."""
    from stages import validate
    from stages.records import Candidate, Chunk, Measurement, by_id, read_records

    candidates = read_records(folder / "data/candidates.jsonl", Candidate)
    chunks = by_id(read_records(folder / "data/chunks.jsonl", Chunk))
    measured = by_id(read_records(folder / "data/measurements.jsonl", Measurement))
    claims = sorted(candidates, key=lambda claim: (claim.wording, -claim.similarity, claim.id))
    sound = [claim for claim in claims if "77 gears" not in claim.answer]
    return {
        "all": validate.table(claims, chunks, {}, measured, frozenset(), validate.example_questions(validate.PROMPTS)),
        "sound": validate.selection(sound, measured),
    }


def direct(folder: Path, is_ready: bool) -> None:
    """The peer of P10: Great Expectations as its documentation has it, on the tables of `lay_out`, made before or now."""
    import great_expectations as gx
    import great_expectations.expectations as gxe
    import pandas

    tables = (
        {name: pandas.read_parquet(folder / f"{name}.parquet") for name in ("all", "sound")} if is_ready else tables_of(folder)
    )
    rules = json.loads((folder / "rules.json").read_bytes())
    context = gx.get_context(mode="ephemeral")
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder / "direct_docs")}
    context.add_data_docs_site("docs", {"class_name": "SiteBuilder", "store_backend": store})
    source = context.data_sources.add_pandas("pandas")
    for name, table in tables.items():
        suite = context.suites.add(gx.ExpectationSuite(name=name))
        for rule in rules:
            if rule["among"] == name:
                # the one expectation of Docsmith's own is this one with its set given
                is_own = rule["expectation"] == "expect_rows_not_to_be"
                kind = gxe.ExpectColumnValuesToBeInSet
                if not is_own:
                    kind = getattr(gxe, "".join(word.capitalize() for word in rule["expectation"].split("_")))
                suite.add_expectation(
                    kind(**rule["kwargs"] | ({"value_set": [False]} if is_own else {}), meta={"rule": rule["rule"]})
                )
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        validation = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
        asked = {"result_format": "COMPLETE", "unexpected_index_column_names": ["id"]}
        checkpoint = context.checkpoints.add(gx.Checkpoint(name=name, validation_definitions=[validation], result_format=asked))
        checkpoint.run(batch_parameters={"dataframe": table})
    context.build_data_docs()


def seconds_of(folder: Path, *command: str) -> float:
    """How long `python -m command` takes in `folder`."""
    started = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "CI": "true"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with code {done.returncode}: {done.stderr.strip()[-2000:]}")
    return time.monotonic() - started


def validated(folder: Path) -> float:
    paths = [f"data/{name}.jsonl" for name in DATA.split()]
    return seconds_of(folder, "stages.validate", *paths, "reports/data_docs", "reports/metrics/validate.json")


def whole_stage(folder: Path, rows: int, pairs: int, growth: Sequence[int]) -> tuple[dict[str, Any], str]:
    """Row P10."""
    laid = lay_out(folder / "ratio", rows)
    times = []
    for turn in range(pairs):
        peers = [seconds_of(laid, "bench.validation", "--direct", str(laid), *flag) for flag in ([], ["--ready"])]
        times.append((validated(laid), *peers))
        print("P10 {}/{}: {:.1f} s, directly {:.1f} s, on ready tables {:.1f} s".format(turn + 1, pairs, *times[-1]), flush=True)
    counts = json.loads((laid / "reports/metrics/validate.json").read_text(encoding="utf-8"))
    ours, theirs, ready = (statistics.median(each) for each in zip(*times, strict=True))
    seconds = {rows: ours}
    for size in sorted(set(growth) - {rows}):
        seconds[size] = validated(lay_out(folder / str(size), size))
        print(f"P10, {size} rows: {seconds[size]:.1f} s", flush=True)
    said = (
        f"P10, {counts['candidates']} candidates, {counts['rejected_share']:.0%} of them rejected, as a process of its own each: the stage takes {ours:.0f} s, "
        f"Great Expectations called directly {theirs:.0f} s when it makes the columns that the rules ask about, {ready:.0f} s when they lie ready (ratio {ours / ready:.1f}). Growth: "
        + ", ".join(f"{seconds[size]:.0f} s for {size} rows" for size in sorted(seconds))
        + "."
    )
    return row([one / other for one, other, _ in times], None) | {"seconds": seconds, "ready_ratio": round(ours / ready, 2)}, said


# P11


@contextlib.contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """A function that says how many comparisons `stages.likeness` has made within: of texts with texts, and of vectors with vectors."""
    import faiss

    from stages import likeness

    alike, near_pairs = likeness._alike, likeness.near_pairs
    counts = Counter[str]()

    def counted_alike(*given: Any) -> bool:
        counts["texts"] += 1
        return alike(*given)

    def counted_pairs(vectors: Any, min_cosine: float) -> list[tuple[int, int]]:
        faiss.cvar.hnsw_stats.reset()
        found = near_pairs(vectors, min_cosine)
        counts["vectors"] += faiss.cvar.hnsw_stats.ndis if len(vectors) > likeness.EXACT else len(vectors) ** 2
        return found

    likeness._alike, likeness.near_pairs = counted_alike, counted_pairs
    yield counts.total
    likeness._alike, likeness.near_pairs = alike, near_pairs


def by_projection(texts: Sequence[str]) -> Any:
    """Unit vectors of width 384 in place of embeddings: of the words' weights (tf-idf), projected at random."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer
    from sklearn.random_projection import SparseRandomProjection

    steps = TfidfVectorizer(token_pattern=r"\w+"), SparseRandomProjection(384, random_state=5, dense_output=True), Normalizer()
    return make_pipeline(*steps).fit_transform(texts).astype("float32")


def by_model(texts: Sequence[str]) -> Any:
    """Unit vectors of the embedder in params.yaml."""
    from stages.models import load_embedder
    from stages.params import Models, read_section

    embedder = load_embedder(read_section("models", Models, REPOSITORY / "params.yaml").embedder)
    return embedder.encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False)


def checked(made: Corpus, embed: Callable[[Sequence[str]], Any]) -> dict[str, float]:
    """What the near-duplicate and leak check finds of what is planted in `made`, and what it costs."""
    import msgspec

    from stages import split
    from stages.likeness import clusters
    from stages.measure import Params as Measure
    from stages.params import read_section
    from stages.records import by_id
    from stages.validate import pair_of

    params = REPOSITORY / "params.yaml"
    settings = read_section("split", split.Params, params)
    questions, answers = ([getattr(one, name) for one in made.candidates] for name in ("question", "answer"))
    vectors = embed(questions + answers)
    question_vectors, answer_vectors = vectors[: len(questions)], vectors[len(questions) :]
    with counting() as count:
        started = time.monotonic()
        found = clusters(
            questions, answers, question_vectors, answer_vectors, read_section("measure", Measure, params).min_cosine
        )
        clusters_s = time.monotonic() - started
        comparisons = count()
    chunks = by_id(made.chunks)
    pairs = [
        pair_of(one, chunks[one.chunk_id], made.candidates[cluster].id, (), False)
        for one, cluster in zip(made.candidates, found, strict=True)
    ]
    started = time.monotonic()
    parts = split.part(pairs, settings)
    split_s = time.monotonic() - started
    trained = {pair.id for pair in parts.train}
    asked = {pair.id for pair in [*parts.recall, *parts.dev, *parts.held_out]}
    twins = [(pairs[one].id, pairs[other].id) for one, other in made.planted]
    # and were each copy asked, and all else trained, would the rule say so
    copies = {copy for _, copy in twins}
    naive = split.conversations(
        [pair for pair in pairs if pair.id not in copies], msgspec.structs.replace(settings, multi_turn_share=0.0)
    )
    leaks = split.table(naive, [], [split.question_of(pair, "recall") for pair in pairs if pair.id in copies], by_id(pairs))
    return {
        "rows": len(pairs),
        "planted": len(twins),
        "found": sum(found[one] == found[other] for one, other in made.planted),
        "flagged": int(leaks["near_duplicate_is_trained"].sum()),
        "left": sum((one in asked and other in trained) or (one in trained and other in asked) for one, other in twins),
        "comparisons": comparisons,
        "clusters_s": round(clusters_s, 2),
        "split_s": round(split_s, 2),
    }


def by_datasketch(made: Corpus) -> float:
    """Seconds for the same texts in datasketch as its documentation has it, without confirming what it finds."""
    from datasketch import MinHash, MinHashLSH

    started = time.monotonic()
    index = MinHashLSH(threshold=0.8, num_perm=128)
    for number, one in enumerate(made.candidates):
        said = re.findall(r"\w+", f"{one.question} {one.answer}".lower())
        sketch = MinHash(num_perm=128)
        for place in range(len(said) - 2):
            sketch.update(" ".join(said[place : place + 3]).encode())
        index.query(sketch)
        index.insert(number, sketch)
    return time.monotonic() - started


def each_with_each(rows: int) -> float:
    """Seconds for the products of `rows` vectors of question and answer with each other, worked out from COMPARED of them."""
    import numpy as np

    size = min(rows, COMPARED)
    vectors = np.random.default_rng(5).normal(size=(size, 768)).astype("float32")
    started = time.monotonic()
    for start in range(0, size, 1000):
        np.argwhere(vectors[start : start + 1000] @ vectors.T >= 1e9)
    return (time.monotonic() - started) * (rows / size) ** 2


def near_duplicates_and_leaks(rows: int, embedded: int) -> tuple[dict[str, Any], str]:
    """Row P11."""
    real = checked(corpus(embedded), by_model)
    print(f"P11, embeddings of the model: {real}", flush=True)
    small, large = (checked(corpus(size), by_projection) for size in (rows // 10, rows))
    print(f"P11: {small}\nP11: {large}", flush=True)
    peer_s, product_s = by_datasketch(corpus(rows)), each_with_each(rows)
    growth = large["comparisons"] / small["comparisons"] / (large["rows"] / small["rows"])
    said = (
        f"P11, the ratio is the growth of the comparisons from {small['rows']} pairs ({small['comparisons']}) to {large['rows']} ({large['comparisons']}), over the growth of the pairs; each with each would be 10. "
        f"Planted near-duplicates of other sections: {large['found']} of {large['planted']} found at {large['rows']} pairs, {small['found']} of {small['planted']} at {small['rows']}, "
        f"with vectors of the words' weights in place of embeddings; {real['found']} of {real['planted']} at {real['rows']}, with the model's embeddings. "
        f"Left between questions and training after `split`: {real['left'] + small['left'] + large['left']}; where every copy was asked on purpose, the rule flagged {large['flagged']} of {large['planted']}. "
        f"Time: clusters {small['clusters_s']:.0f} s and {large['clusters_s']:.0f} s, parting {small['split_s']:.0f} s and {large['split_s']:.0f} s; "
        f"datasketch alone, unconfirmed, {peer_s:.0f} s; the products of all vectors {product_s:.0f} s."
    )
    return row([growth], None) | {
        "checks": [real, small, large],
        "datasketch_s": round(peer_s, 1),
        "products_s": round(product_s, 1),
    }, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--growth", type=int, nargs="*", default=[10_000, 100_000, 1_000_000], help="of P10")
    parser.add_argument("--embedded", type=int, default=2000, help="pairs of P11 with embeddings of the model")
    parser.add_argument("--direct", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ready", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help="write nothing into the repository")
    arguments = parser.parse_args()
    if arguments.direct:
        direct(arguments.direct, arguments.ready)
        return
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    opening = [
        HEADING,
        "",
        f"`python -m bench.validation --rows {arguments.rows}` on {machine()}. Candidates are made from templates.",
    ]
    rows: dict[str, Any] = {}
    remarks: list[str] = []

    def keep(name: str, measured: tuple[dict[str, Any], str]) -> None:
        rows[name] = measured[0]
        remarks.append(measured[1])
        if not arguments.dry:
            publish({name: measured[0]}, section(opening, rows, TARGETS, remarks))

    keep("P11", near_duplicates_and_leaks(arguments.rows, arguments.embedded))
    with tempfile.TemporaryDirectory(prefix="docsmith-bench-") as scratch:
        keep("P10", whole_stage(Path(scratch), arguments.rows, arguments.pairs, arguments.growth))
    print(section(opening, rows, TARGETS, remarks))


if __name__ == "__main__":
    main()
