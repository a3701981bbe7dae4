"""bench.cost: the page shows what it prints, the model's arithmetic, and the model against calls that a fake endpoint counts."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from bench import cost
from bench.generation import page
from stages.generate import Params
from stages.params import read_section
from stages.recipes import asks_about
from stages.records import Chunk

ROOT = Path(__file__).parents[1]
RESULTS: dict[str, Any] = {
    "demo": {
        "pages": 10,
        "chunks": 100,
        "calls": 200,
        "candidates": 600,
        "trained": 300,
        "train_s": 1500,
        "cpu_tokens_per_s": 100,
    },
    "teacher": {
        "prompt_tokens_per_call": 400,
        "new_tokens_per_call": 50,
        "passages_per_chunk": 4,
        "bytes_per_candidate": 500,
    },
    "reply_store": {"seconds_per_reply": 0.0002, "bytes_per_reply": 250},
    "embedding": {"seconds_per_text": 0.02},
    "round_trips": {"seconds_per_product": 1e-7},
    "P10": {"seconds": {"10": 7.0, "1000": 20.0, "11000": 60.0}},
    "P11": {"checks": [{"rows": 100, "clusters_s": 9}, {"rows": 1000, "clusters_s": 3}, {"rows": 10_000, "clusters_s": 60}]},
}


def cells(table: str) -> dict[str, list[str]]:
    """The first cell of each row -> the others."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {first: rest for first, *rest in rows}


def test_the_page_shows_what_the_bench_prints() -> None:
    text = (ROOT / "docs/team/cost.md").read_text(encoding="utf-8")
    tables = cost.tables(cost.read_results())
    assert len(tables) == 3 and all(table in text for table in tables)
    assert text.count("\n| ---") == len(tables) + 2  # and two that are written by hand


def test_every_figure_of_the_page_that_a_bench_measured_is_the_one_in_the_results() -> None:
    results = cost.read_results()
    demo = results["demo"]
    page_of_results = (ROOT / "bench/RESULTS.md").read_text(encoding="utf-8")
    assert f"{demo['pages']} pages, {demo['words']:,} words" in page_of_results
    assert f"{demo['chunks']} chunks, {demo['calls']} calls" in page_of_results
    assert f"{demo['candidates']:,} candidates for {demo['facts']} facts" in page_of_results
    assert f"| {demo['pairs']} pairs, " in page_of_results and f"| {demo['trained']} pairs to train" in page_of_results
    assert f"| {demo['train_s']} s, " in page_of_results and f"P2: {demo['cpu_tokens_per_s']} and " in page_of_results
    small, large = results["P11"]["checks"][-2:]
    said = (ROOT / "docs/team/cost.md").read_text(encoding="utf-8")
    for figure in (
        f"{demo['pages']} pages with {demo['words']:,} words made {demo['chunks']} chunks, {demo['calls']} calls and {demo['candidates']:,} candidates",
        f"4 at once make {results['P16']['ratio']:.2f} times the calls of one (P16)",
        f"4 endpoints make {results['P16']['endpoints_ratio']:.2f} times the calls of one (P16)",
        f"makes {results['P3']['calls']['edit']} call of {results['P3']['calls']['full']:,} (P3)",
        f"{demo['train_s']} s for {demo['trained']} pairs",
        f"{large['clusters_s']:.0f} s for {large['rows']:,} rows, {large['clusters_s'] / small['clusters_s']:.0f} times those for {small['rows']:,} (P11)",
        f"{results['P10']['seconds']['1000000']:.0f} s for a million rows",
        f"a reply took {results['reply_store']['growth']} times as long at {cost.STORED[1]:,} replies as at {cost.STORED[0]:,}",
    ):
        assert figure in said, figure


def test_work_grows_with_the_pages() -> None:
    work = cost.work_of(25, RESULTS)
    assert work == cost.Work(
        pages=25, chunks=250, calls=500, candidates=1500, passages=1000, pairs=750, prompt_tokens=200_000, new_tokens=25_000
    )


def test_waiting_is_shared_by_the_calls_at_once_and_the_client_takes_its_time_for_each() -> None:
    assert cost.waiting_s(1000, 0.5, 20) == pytest.approx(25)
    assert cost.waiting_s(1000, 0.5, 20, overhead_s=0.1) == pytest.approx(30)


def test_validate_follows_the_line_and_near_duplicates_the_power_law_of_the_two_largest_runs() -> None:
    assert cost.validate_s(21_000, RESULTS) == pytest.approx(100)  # 4 ms a row more than at 11,000
    assert cost.clusters_s(100_000, RESULTS) == pytest.approx(1200)  # ten times the rows take twenty times as long
    assert cost.round_trips_s(cost.work_of(10, RESULTS), RESULTS) == pytest.approx(600 * 400 * 1e-7)


def test_the_tables_are_worked_out_from_the_rates_and_from_what_the_reader_gives() -> None:
    work, asking, beside = map(cells, cost.tables(RESULTS, tokens_per_s=1000, price_per_hour=3, latency_s=2, concurrency=10))
    assert work["calls to the teacher"] == ["20,000", "2 million", "200 million"]
    assert work["new tokens"] == ["1 million", "100 million", "10 billion"]
    assert asking["two cores, 100 tokens/s, measured"] == ["2.78 h", "11.6 days", "3.17 years"]
    assert asking["GPU hours at 1,000 tokens/s, assumed"] == ["0.278", "27.8", "2,780"]
    assert asking["money at 3.00 an hour, assumed"] == ["0.833", "83.3", "8,330"]
    assert asking["an endpoint of 2 s a call, 10 calls at once, assumed"][0] == "66.7 min"  # 20,000 calls * 2 s / 10
    assert beside["embedding questions and passages, one core"][0] == "33.3 min"  # 100,000 texts of 20 ms
    assert beside["vectors of all passages in memory"][0] == "61.4 MB"  # 40,000 passages of 384 numbers of 4 bytes
    assert beside["the store of replies on disk"] == ["5 MB", "500 MB", "50 GB"]
    assert beside["`data/candidates.jsonl`"] == ["30 MB", "3 GB", "300 GB"]
    assert beside["`train` in the CPU profile"][0] == "41.7 h"  # 30,000 pairs of 5 s


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.5"),
        (99.96, "100"),
        (1234, "1,230"),
        (999_600, "1 million"),
        (28_375_000, "28.4 million"),
        (4e12, "4,000 billion"),
    ],
)
def test_numbers_are_shown_in_three_digits(value: float, shown: str) -> None:
    assert cost.number(value) == shown


def test_the_model_says_within_a_tenth_how_many_calls_a_fake_endpoint_gets(tmp_path: Path) -> None:
    generate = read_section("generate", Params, ROOT / "params.yaml")
    place: dict[str, Any] = {"document_id": "d", "section_id": "s", "path": "p", "start": 0, "end": 1}
    texts = [page(one) for one in range(24)]  # page 0 has two facts, and the others one
    chunks = [Chunk(id=f"{one:016x}", heading_path=(f"Machine {one}",), text=text, **place) for one, text in enumerate(texts)]
    pages = [cost.Page(len(text.split()), asks_about(chunk, generate, "fake")) for text, chunk in zip(texts, chunks, strict=True)]
    found = cost.simulated(tmp_path, pages, 0.01, (1, 4))
    assert [one["concurrency"] for one in found] == [1, 4]
    for one in found:
        assert one["calls"] == sum(len(one.asks) for one in pages) == 25
        assert math.isclose(one["predicted_calls"], one["calls"], rel_tol=0.1) and one["predicted_calls"] != one["calls"]
    assert found[0]["predicted_s"] == pytest.approx(4 * found[1]["predicted_s"], rel=0.01)
    assert found[0]["predicted_s"] > 25 * 0.01


def test_the_measured_check_of_the_model_is_in_the_results() -> None:
    checks = cost.read_results()["cost"]["checks"]
    assert [one["concurrency"] for one in checks] == list(cost.FAKE_CONCURRENCY)
    assert all(math.isclose(one["predicted_calls"], one["calls"], rel_tol=0.15) for one in checks)
    section = cost.said(cost.read_results())
    text = (ROOT / "bench/RESULTS.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^\| \d.*", section) and all(line in text for line in re.findall(r"(?m)^\| \d.*", section))
