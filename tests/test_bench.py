"""bench: what it writes, and that a peer is counted as it should be. The measurements themselves are not repeated here."""

import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_endpoint import FakeEndpoint

from bench.generation import HEADING, of_the_kit
from bench.rows import add_rows, row, with_section
from bench.training import UNSEEN, differences, one_side, settings
from bench.validation import by_projection, checked, corpus
from stages.llm import Endpoint
from stages.models import load_tokenizer
from stages.records import Example, Message
from stages.training import batches

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


def conversations(tiny_folder: Path, number: int, said: str) -> list[batches.Tokens]:
    """`number` conversations about machines; each is as long as the others where `said` has no field."""
    examples = [
        Example(
            id=str(place),
            pair_ids=(str(place),),
            document_id="d",
            messages=(
                Message("user", f"What is machine {place}?"),
                Message("assistant", said.format("very " * (place % 5)) + f" It has the number {place}."),
            ),
        )
        for place in range(10, 10 + number)
    ]
    return batches.tokenise(examples, load_tokenizer(tiny_folder), "Be brief and exact.", 200)


def test_both_sides_of_p5_are_counted_alike_and_learn_the_same_while_docsmith_computes_less(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows = conversations(tiny_folder, 24 + UNSEEN, "A loom.")
    (length,) = {len(one.input_ids) for one in rows}
    columns = zip(*(one.input_ids for one in rows), strict=True)
    alike = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    train = msgspec.structs.replace(settings()[0], per_device_train_batch_size=8, gradient_accumulation_steps=1, warmup_steps=0)
    mine, theirs = (one_side(side, tiny_folder, train, rows, tmp_path / side) for side in ("docsmith", "trl"))
    assert mine["examples"] == theirs["examples"] == 24 and mine["steps"] == theirs["steps"] == 3
    assert (
        mine["tokens"] == theirs["tokens"] == theirs["computed_tokens"] == 8 * length
    )  # of the step between the first and the last
    assert 0 < mine["answer_tokens"] == theirs["answer_tokens"] < mine["tokens"]
    assert length <= mine["computed_tokens"] <= 8 * length - 7 * (alike - 1)
    assert mine["loss"] == pytest.approx(theirs["loss"], abs=0.02)
    assert mine["unseen_loss"] == pytest.approx(theirs["unseen_loss"], abs=0.02)
    assert mine["unseen_loss"] < mine["loss"] - 0.05
    for found in (mine, theirs):
        assert sum(found["where"].values()) == pytest.approx(1) and {"matrix products", "optimizer"} <= set(found["where"])
        assert 0 < found["limit_fraction"] < 1


def test_the_losses_and_gradients_of_p7_differ_by_less_than_the_target_and_a_wrong_batch_is_seen(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = conversations(tiny_folder, 20, "A {}old loom.")
    train = settings()[0]
    found = differences(tiny_folder, train, rows, tmp_path)
    assert found and max(max(one.values()) for one in found) < 1e-4

    def wrong(some: Any, right: Any = batches.pack) -> Any:
        batch = right(some)
        return batch | {"position_ids": batch["position_ids"] // 2}

    monkeypatch.setattr(batches, "pack", wrong)
    assert min(one["gradients"] for one in differences(tiny_folder, train, rows, tmp_path)) > 1e-4
