"""The rules held to account by pairs that were written by hand: 200 that break a rule, 100 that a careful reader would keep."""

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import MODELS

from stages import measure, validate
from stages.evidence import locate
from stages.executor import LOCAL
from stages.params import read_section
from stages.records import (
    Candidate,
    Chunk,
    Decision,
    Judgement,
    Pair,
    Record,
    Rejected,
    by_id,
    content_id,
    read_records,
    write_records,
)
from stages.rules import read_rules

PLANTED = Path(__file__).parent / "planted"
PARAMS = Path(__file__).parent.parent / "params.yaml"  # the rules are tested with the thresholds that are shipped
SECRETS = {  # put together here, so that no scanner takes this repository for the leak
    "{{AWS_KEY}}": "AKIA" + "Q3XR7NLMV5TZ2KWB",
    "{{GITHUB_TOKEN}}": "ghp" + "_" + "4vTq8ZxNc2LmR7pWsK9yHd3FbJ6gXe1UaQ5o",
    "{{SLACK_TOKEN}}": "xoxb" + "-410278835916" + "-572940381627-" + "Kp4TzQ8vLm2XrW7cNy5HdB3s",
    "{{PASSWORD}}": "h7Kp" + "2vXq9rTz",
}


def planted(name: str) -> dict[str, Any]:
    """A file of tests/planted with its secrets in place."""
    text = (PLANTED / f"{name}.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(re.sub(r"\{\{[A-Z_]+\}\}", lambda mark: SECRETS[mark[0]], text))
    return loaded


def chunk_of(name: str, passage: dict[str, Any]) -> Chunk:
    return Chunk(
        id=name,
        document_id=content_id(passage["path"]),
        section_id=content_id(passage["path"], passage["headings"]),
        path=passage["path"],
        heading_path=tuple(passage["headings"]),
        start=0,
        end=len(passage["text"]),
        text=passage["text"],
    )


def candidate_of(passage: str, pair: dict[str, Any], similarity: float) -> Candidate:
    return Candidate(
        id=content_id(passage, pair["question"], pair["answer"]),
        chunk_id=passage,
        fact_id=content_id(passage, pair["quote"]),
        question=pair["question"],
        answer=pair["answer"],
        quote=pair["quote"],
        type=pair.get("type", "factual"),
        recipe="free",
        model="planted",
        similarity=pair.get("similarity", similarity),
        rank=pair.get("rank", 1),
        wording=pair.get("wording", 1),
    )


CHUNKS = {name: chunk_of(name, passage) for name, passage in planted("passages").items()}
GOOD = [candidate_of(passage, pair, 0.8) for passage, pairs in planted("good").items() for pair in pairs]
# less similar than good ones: where two are alike, the good one is the better
BAD = [(rule, pair, candidate_of(pair["passage"], pair, 0.7)) for rule, pairs in planted("bad").items() for pair in pairs]
JUDGEMENTS = [
    Judgement(
        id=claim.id, status="scored", faithfulness=2, answerability=2, usefulness=2, too_low=tuple(pair["judged"]), reason="r"
    )
    for _, pair, claim in BAD
    if "judged" in pair
]
DECISIONS = [
    Decision(
        id=content_id(claim.question, claim.answer),
        verdict="reject",
        chunk_id=claim.chunk_id,
        question=claim.question,
        answer=claim.answer,
        quote=claim.quote,
        type=claim.type,
    )
    for rule, _, claim in BAD
    if rule == "rejected-by-reviewer"
]


class Outcome(NamedTuple):
    pairs: dict[str, Pair]
    rejected: dict[str, Rejected]
    written: list[bytes]


def outcome_in(folder: Path) -> Outcome:
    """What measure and validate make of all planted pairs at once."""
    inputs: dict[str, list[Any]] = {
        "candidates": [*GOOD, *(claim for _, _, claim in BAD)],
        "chunks": list(CHUNKS.values()),
        "judgements": JUDGEMENTS,
        "review": DECISIONS,
    }
    paths = {name: folder / f"{name}.jsonl" for name in (*inputs, "measurements", "pairs", "rejected")}
    records: list[Record]
    for name, records in inputs.items():
        write_records(paths[name], records)
    measure.main(
        paths["candidates"],
        paths["chunks"],
        paths["review"],
        paths["measurements"],
        folder / "measure.json",
        measure=read_section("measure", measure.Params, PARAMS),
        models=MODELS,
        executor=LOCAL,
    )
    validate.main(
        paths["candidates"],
        paths["chunks"],
        paths["judgements"],
        paths["measurements"],
        paths["review"],
        paths["pairs"],
        paths["rejected"],
        folder / "data_docs",
        folder / "validate.json",
        validate=read_section("validate", validate.Params, PARAMS),
    )
    return Outcome(
        by_id(read_records(paths["pairs"], Pair)),
        by_id(read_records(paths["rejected"], Rejected)),
        [paths[name].read_bytes() for name in ("measurements", "pairs", "rejected")],
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return outcome_in(tmp_path_factory.mktemp("planted"))


def test_there_are_200_bad_pairs_and_100_good_ones_with_quotes_that_hold() -> None:
    assert (len(BAD), len(GOOD)) == (200, 100)
    assert Counter(claim.type for claim in GOOD).keys() == {"factual", "conceptual", "procedural"}
    assert [claim.quote for claim in GOOD if not locate(claim.quote, CHUNKS[claim.chunk_id].text)] == []
    invented = [rule for rule, _, claim in BAD if not locate(claim.quote, CHUNKS[claim.chunk_id].text)]
    assert set(invented) == {"quote-not-in-chunk"}


def test_every_rule_that_rejects_has_four_bad_pairs_or_more() -> None:
    rules = read_rules(validate.SUITE, validate=read_section("validate", validate.Params, PARAMS))
    planted_by_rule = Counter(rule for rule, _, _ in BAD)
    assert planted_by_rule.keys() == {rule.rule for rule in rules if rule.severity == "warning"}
    assert min(planted_by_rule.values()) >= 4


def test_of_the_bad_pairs_95_in_100_are_caught_by_the_right_rule(outcome: Outcome) -> None:
    missed = [
        (rule, claim)
        for rule, _, claim in BAD
        if claim.id not in outcome.rejected or rule not in outcome.rejected[claim.id].rules
    ]
    for rule, claim in missed:
        caught = outcome.rejected[claim.id].rules if claim.id in outcome.rejected else "nothing"
        print(f"{rule} missed, {caught} found: {claim.question} | {claim.answer}")
    assert 1 - len(missed) / len(BAD) >= 0.95


def test_no_rule_misses_more_than_a_quarter_of_its_own_bad_pairs(outcome: Outcome) -> None:
    caught = Counter(rule for rule, _, claim in BAD if claim.id in outcome.rejected and rule in outcome.rejected[claim.id].rules)
    planted_by_rule = Counter(rule for rule, _, _ in BAD)
    assert [rule for rule, count in planted_by_rule.items() if caught[rule] < 0.75 * count] == []


def test_of_the_good_pairs_three_at_most_are_lost(outcome: Outcome) -> None:
    lost = [claim for claim in GOOD if claim.id not in outcome.pairs]
    for claim in lost:
        print(f"lost to {outcome.rejected[claim.id].rules}: {claim.question} | {claim.answer}")
    assert len(lost) <= 3


def test_personal_data_is_reported_and_not_rejected(outcome: Outcome) -> None:
    flagged = [pair.question for pair in outcome.pairs.values() if "holds-personal-data" in pair.flags]
    assert flagged == ["How do I reach the workshop for the coffee machine?"]


def test_no_secret_reaches_what_validate_writes(outcome: Outcome) -> None:
    assert [secret for secret in SECRETS.values() for content in outcome.written if secret.encode() in content] == []


def test_two_runs_write_the_same_bytes(outcome: Outcome, tmp_path: Path) -> None:
    assert outcome_in(tmp_path).written == outcome.written
