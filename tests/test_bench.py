"""bench: what it writes, and that a peer is counted as it should be. The measurements themselves are not repeated here."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import FakeEndpoint

from bench.generation import HEADING, of_the_kit
from bench.rows import add_rows, row, with_section
from bench.validation import by_projection, checked, corpus
from stages.llm import Endpoint

PAIRS = [
    {"question": "How long does green tea steep?", "answer": "3 minutes."},
    {"question": "How hot?", "answer": "80 degrees."},
]


def test_only_the_own_section_is_replaced_and_a_missing_one_is_added_at_the_end() -> None:
    others = "# Measurements\n\n## The demo\n\nTwelve minutes.\n"
    first = with_section(others, f"{HEADING}\n\nOld.\n")
    assert first == f"{others}\n{HEADING}\n\nOld.\n"
    longer = first + "\n## Serving\n\nFast.\n"
    assert with_section(longer, f"{HEADING}\n\nNew.\n") == f"{others}\n{HEADING}\n\nNew.\n\n## Serving\n\nFast.\n"


def test_rows_of_other_benches_stay_and_own_ones_are_replaced(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    add_rows(results, {"P1": {"ratio": 1}, "P4": {"ratio": 4}})
    add_rows(results, {"P1": {"ratio": 9}})
    assert json.loads(results.read_text()) == {"P1": {"ratio": 9}, "P4": {"ratio": 4}}


def test_a_row_has_the_median_and_both_ends_of_its_ratios() -> None:
    found = row([3.0, 9.0, 4.0], 0.25)
    assert (found["ratio"], found["spread"], found["limit_fraction"], found["pairs"]) == (4.0, [3.0, 9.0], 0.25, 3)


def test_every_pair_that_the_kit_parses_counts_and_a_run_without_one_counts_as_one(tmp_path: Path) -> None:
    def text(body: dict[str, Any]) -> str:
        return "no pair" if "kettle" in json.dumps(body) else json.dumps(PAIRS)

    with FakeEndpoint(text=text, models=[{"id": "fake"}]) as fake:
        endpoint = Endpoint(url=fake.url, model="fake")
        some = of_the_kit(tmp_path / "some", "Green tea steeps for three minutes at eighty degrees.", endpoint)
        none = of_the_kit(tmp_path / "none", "A kettle boils a litre in four minutes.", endpoint)
    assert len(fake.bodies) == 4  # a summary and a chunk, twice
    assert (some["pairs"], none["pairs"]) == (2, 0)
    assert round(some["per_min"] * some["seconds"] / 60, 6) == 2
    assert round(none["per_min"] * none["seconds"] / 60, 6) == 1


def test_a_run_of_the_kit_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.generation.KIT_S", 1)
    with FakeEndpoint(text=json.dumps(PAIRS), models=[{"id": "fake"}]) as fake:
        found = of_the_kit(tmp_path / "slow", "A kettle boils a litre.", Endpoint(url=fake.url, model="fake"))
    assert found["pairs"] == 0
    assert round(found["per_min"] * found["seconds"] / 60, 6) == 1


def test_every_near_duplicate_that_the_bench_plants_is_found_and_none_is_left_between_questions_and_training() -> None:
    found = checked(corpus(1600), by_projection)
    assert found["rows"] == 1608 and found["planted"] == found["found"] == found["flagged"] == 8
    assert found["left"] == 0 and 0 < found["comparisons"] < 1608**2 / 4
