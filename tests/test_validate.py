import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from stages.program import BadInput, BadParams, LimitBroken
from stages.records import Candidate, Chunk, Judgement, Pair, Rejected, read_records, write_records
from stages.validate import (
    PROMPTS,
    SUITE,
    Params,
    Rule,
    broken_rules,
    example_questions,
    main,
    pair_of,
    read_rules,
    table,
)

VALIDATE = Params(wordings=3, min_similarity=0.5, max_rejected_share=0.95)
DOCUMENT = "# Tea\n\nWater first.\n\n## Steeping\n\nSteep green tea for three minutes\n  at 80 degrees. Nobody knows why.\n"
START = DOCUMENT.index("## Steeping")
CHUNK = Chunk(
    id="chunk",
    document_id="doc",
    section_id="section",
    path="tea.md",
    heading_path=("Tea", "Steeping"),
    start=START,
    end=len(DOCUMENT),
    text=DOCUMENT[START:],
)
GOOD = Candidate(
    id="good",
    chunk_id="chunk",
    fact_id="fact",
    question="How long should green tea steep?",
    answer="Green tea should steep for three minutes.",
    quote="Steep green tea for three minutes at 80 degrees.",
    type="factual",
    recipe="quote-first",
    model="m",
    similarity=0.8,
    rank=1,
    wording=1,
)
# Each breaks the rule it is named after, and no other.
BAD: dict[str, dict[str, Any]] = {
    "question-too-short": {"question": "Why tea?"},
    "question-without-mark": {"question": "Tell me how green tea should steep"},
    "question-repeats-itself": {"question": "How long long long should white tea steep?"},
    "question-not-self-contained": {"question": "What is it that the leaves need?"},
    "answer-too-short": {"question": "How long does oolong steep?", "answer": "For three minutes."},
    "answer-refuses": {"question": "How long does black tea steep?", "answer": " I don\u2019t know how long that takes."},
    "quote-not-in-chunk": {"question": "How long does red tea steep?", "quote": "Steep red tea for three minutes."},
    "question-copies-answer": {
        "question": "Steep - green tea - for three minutes?",
        "answer": "Steep green tea for three minutes.",
    },
    "question-copies-example": {"question": "How do I RINSE the coffee machine?"},
    "duplicate-question": {"question": "how long should GREEN tea steep ?"},
    "round-trip-too-far": {"question": "At how many degrees is tea made?", "similarity": 0.49},
    "round-trip-finds-another": {"question": "At which heat is tea made?", "rank": 2},
    "better-wording-exists": {"question": "How hot is the water of tea?", "wording": 4},
    "judge-unfaithful": {"question": "Who made tea first?"},
    "judge-unanswerable": {"question": "Who made tea last?"},
    "judge-useless": {"question": "Who made tea twice?"},
    "id-repeats": {"id": "good", "question": "How hot should the water for tea be?"},
    "type-unknown": {"question": "How warm should the water for tea be?", "type": "funny"},
}
# Each is as near to the rule's limit as a good one may be.
NEAR: dict[str, dict[str, Any]] = {
    "question-too-short": {"question": "Why tea 2?"},
    "question-without-mark": {"question": "May green tea steep?"},
    "question-repeats-itself": {"question": "How long long should white tea steep?"},
    "question-not-self-contained": {"question": "What is item 3 of the list of leaves?"},
    "answer-too-short": {"question": "How long is oolong steeped?", "answer": "For three minutes..."},
    "answer-refuses": {"question": "Who knows why?", "answer": "Nobody: we all say that I don't know is fine."},
    "quote-not-in-chunk": {"question": "How many minutes?", "quote": "three minutes\nat 80"},
    "question-copies-answer": {
        "question": "Is it for three minutes that green tea steeps?",
        "answer": "Steep green tea for three minutes.",
    },
    "question-copies-example": {"question": "How do I rinse the old coffee machine?"},
    "duplicate-question": {"question": "How long should all green tea steep?"},
    "round-trip-too-far": {"question": "At how many degrees Celsius is tea made?", "similarity": 0.5},
    "round-trip-finds-another": {"question": "At which heat is some tea made?", "rank": 1},
    "better-wording-exists": {"question": "How hot is the water of good tea?", "wording": 3},
    "judge-unfaithful": {"question": "Who made good tea first?"},
    "judge-unanswerable": {"question": "Who made good tea last?"},
    "judge-useless": {"question": "Who made good tea twice?"},
    "id-repeats": {"id": "another", "question": "How hot should the water be?"},
    "type-unknown": {"question": "How warm should the water be?", "type": "procedural"},
}


def judgement(candidate_id: str, rating: int | None, *too_low: Any, status: Any = "scored") -> Judgement:
    ratings = dict.fromkeys(("faithfulness", "answerability", "usefulness"), rating)
    return Judgement(id=candidate_id, status=status, too_low=too_low, reason="r", **ratings)  # type: ignore[arg-type]


JUDGEMENTS = {
    one.id: one
    for one in (
        judgement("bad judge-unfaithful", 3, "faithfulness"),
        judgement("bad judge-unanswerable", 3, "answerability"),
        judgement("bad judge-useless", 3, "usefulness"),
        judgement("near judge-unfaithful", 3),
        judgement("near judge-unanswerable", None, status="unparsed"),
        judgement("near judge-useless", None, status="failed"),
    )
}


def candidate(**changes: Any) -> Candidate:
    return msgspec.structs.replace(GOOD, **changes)


def rules() -> list[Rule]:
    return read_rules(SUITE, VALIDATE)


def rows(*candidates: Candidate) -> Any:
    return table(candidates, {"chunk": CHUNK}, JUDGEMENTS, example_questions(PROMPTS))


def severity(name: str) -> str:
    return next(rule.severity for rule in rules() if rule.rule == name)


WARNINGS = [name for name in BAD if severity(name) == "warning"]
CRITICAL = [name for name in BAD if severity(name) == "critical"]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The faults of a table with the good candidate, and a bad and a near one for each rule that rejects rows."""
    bad = [candidate(**({"id": f"bad {name}"} | BAD[name])) for name in WARNINGS]
    near = [candidate(**({"id": f"near {name}"} | NEAR[name])) for name in NEAR]
    return broken_rules(rows(GOOD, *near, *bad), rules(), tmp_path_factory.mktemp("docs"))


def test_every_rule_has_a_candidate_that_breaks_it_and_one_that_nearly_does() -> None:
    names = [rule.rule for rule in rules()]
    assert len(names) == 18
    assert list(BAD) == list(NEAR) == names


@pytest.mark.parametrize("name", WARNINGS)
def test_a_rule_catches_its_bad_candidate_and_only_that_rule_does(name: str, faults: dict[str, list[str]]) -> None:
    assert faults[f"bad {name}"] == [name]


@pytest.mark.parametrize("name", NEAR)
def test_a_rule_lets_a_good_candidate_pass(name: str, faults: dict[str, list[str]]) -> None:
    assert f"near {name}" not in faults
    assert "good" not in faults


@pytest.mark.parametrize("name", CRITICAL)
def test_a_critical_rule_stops_the_stage(name: str, tmp_path: Path) -> None:
    with pytest.raises(LimitBroken, match=f"the critical rule {name} failed for"):
        broken_rules(rows(GOOD, candidate(**({"id": "bad"} | BAD[name]))), rules(), tmp_path)


def test_a_candidate_that_breaks_two_rules_names_both_in_the_suites_order(tmp_path: Path) -> None:
    found = broken_rules(rows(candidate(question="Tea", rank=5)), rules(), tmp_path)
    assert found == {"good": ["question-too-short", "question-without-mark", "round-trip-finds-another"]}


@pytest.mark.parametrize(
    ("setting", "bad"), [({"wordings": 4}, "better-wording-exists"), ({"min_similarity": 0.4}, "round-trip-too-far")]
)
def test_a_setting_moves_the_limit_of_its_rule(setting: dict[str, Any], bad: str, tmp_path: Path) -> None:
    looser = read_rules(SUITE, msgspec.structs.replace(VALIDATE, **setting))
    assert broken_rules(rows(candidate(**BAD[bad])), looser, tmp_path) == {}
    assert broken_rules(rows(candidate(**BAD[bad])), rules(), tmp_path) == {"good": [bad]}


# a suite that cannot run


def suite(folder: Path, *entries: Any) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(list(entries)) if entries else "# nothing\n")
    return path


def entry(**changes: Any) -> dict[str, Any]:
    kwargs = {"column": "question", "min_value": 10}
    rule = {
        "rule": "short",
        "expectation": "expect_column_value_lengths_to_be_between",
        "kwargs": kwargs,
        "severity": "warning",
        "reason": "r",
    }
    return rule | changes


def test_an_empty_suite_cannot_pass(tmp_path: Path) -> None:
    with pytest.raises(BadParams, match="holds no rule"):
        read_rules(suite(tmp_path), VALIDATE)


def test_a_rule_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadParams, match="the rule short is there twice"):
        read_rules(suite(tmp_path, entry(), entry(reason="other")), VALIDATE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"severity": "fatal"}, "severity"),
        ({"expectaton": "x"}, "expectaton is not a setting.*Did you mean expectation"),
        ({"kwargs": {"column": "wording", "max_value": "<validate.wording>"}}, "validate.wording is not a setting"),
    ],
)
def test_a_misspelt_rule_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadParams, match=message):
        read_rules(suite(tmp_path, entry(**change)), VALIDATE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"expectation": "expect_column_value_lenghts_to_be_between"},
            "short: expect_column_value_lenghts_to_be_between is not an expectation",
        ),
        ({"kwargs": {"column": "questions", "min_value": 10}}, "the rule short could not run"),
        ({"kwargs": {"column": "question", "min_valu": 10}}, "short"),
        ({"kwargs": {"min_value": 10}}, "short"),
        (
            {"expectation": "expect_column_values_to_match_regex", "kwargs": {"column": "question", "regex": "(?"}},
            "the rule short could not run",
        ),
    ],
)
def test_a_rule_that_cannot_run_is_an_error_and_never_a_pass(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    broken = read_rules(suite(tmp_path, entry(**change)), VALIDATE)
    with pytest.raises(BadParams, match=message) as refused:
        broken_rules(rows(GOOD), broken, tmp_path / "docs")
    assert "\n" not in str(refused.value)


# evidence


def test_offsets_of_a_pair_give_the_quote_in_the_documents_text() -> None:
    pair = pair_of(GOOD, CHUNK)
    assert DOCUMENT[pair.quote_start : pair.quote_end] == "Steep green tea for three minutes\n  at 80 degrees."
    assert (pair.section_id, pair.document_id, pair.path) == ("section", "doc", "tea.md")


def test_the_examples_of_every_recipe_are_known_and_none_is_there_twice() -> None:
    questions = example_questions(PROMPTS)
    assert {"How do I rinse the coffee machine?", "How can I get a new library card?"} <= set(questions)
    assert len(questions) == len(set(questions)) == 12


# main


class Files:
    def __init__(self, folder: Path, *candidates: Candidate) -> None:
        self.folder = folder
        self.candidates, self.chunks = folder / "candidates.jsonl", folder / "chunks.jsonl"
        self.judgements = folder / "judgements.jsonl"
        self.pairs, self.rejected = folder / "pairs.jsonl", folder / "rejected.jsonl"
        self.docs, self.metrics = folder / "data_docs", folder / "validate.json"
        write_records(self.chunks, [CHUNK])
        write_records(self.candidates, candidates)
        write_records(self.judgements, [])

    def run(self, **changes: Any) -> dict[str, Any]:
        settings = msgspec.structs.replace(VALIDATE, **changes)
        main(self.candidates, self.chunks, self.judgements, self.pairs, self.rejected, self.docs, self.metrics, validate=settings)
        return self.account()

    def account(self) -> dict[str, Any]:
        metrics: dict[str, Any] = json.loads(self.metrics.read_text())
        pairs, rejected = read_records(self.pairs, Pair), read_records(self.rejected, Rejected)
        asked = read_records(self.candidates, Candidate)
        assert sorted([*(row.id for row in pairs), *(row.id for row in rejected)]) == [row.id for row in asked]
        assert (metrics["candidates"], metrics["pairs"], metrics["rejected"]) == (len(asked), len(pairs), len(rejected))
        assert all(row.rules for row in rejected)
        return metrics


@pytest.fixture
def files(tmp_path: Path) -> Files:
    second = candidate(id="a second", question="How hot is the water for tea?", wording=2)
    bad = [
        candidate(**({"id": f"bad {name}"} | BAD[name]))
        for name in ("question-too-short", "duplicate-question", "round-trip-too-far")
    ]
    return Files(tmp_path, GOOD, second, *bad)


def test_every_candidate_is_a_pair_or_rejected_by_name(files: Files) -> None:
    metrics = files.run()
    assert [pair.id for pair in read_records(files.pairs, Pair)] == ["a second", "bad duplicate-question"]
    # of two equal questions with equal wording and similarity, the one with the lower id stays: "bad duplicate-question"
    rejected = {row.id: row.rules for row in read_records(files.rejected, Rejected)}
    assert rejected == {
        "good": ("duplicate-question",),
        "bad question-too-short": ("question-too-short",),
        "bad round-trip-too-far": ("round-trip-too-far",),
    }
    assert metrics["rejected_share"] == 0.6
    assert {rule: count for rule, count in metrics["by_rule"].items() if count} == {
        "duplicate-question": 1,
        "question-too-short": 1,
        "round-trip-too-far": 1,
    }
    assert len(metrics["by_rule"]) == 18
    assert (metrics["sections"], metrics["facts"]) == (1, 1)


def test_of_two_equal_questions_the_better_wording_stays(tmp_path: Path) -> None:
    files = Files(
        tmp_path, candidate(id="a", wording=2), candidate(id="b", wording=1), candidate(id="c", wording=1, similarity=0.7)
    )
    files.run()
    assert [pair.id for pair in read_records(files.pairs, Pair)] == ["b"]


def test_two_runs_write_the_same_bytes(files: Files) -> None:
    files.run()
    before = [path.read_bytes() for path in (files.pairs, files.rejected, files.metrics)]
    files.run()
    assert [path.read_bytes() for path in (files.pairs, files.rejected, files.metrics)] == before


def test_data_docs_name_the_rules_and_their_reasons(files: Files) -> None:
    files.run()
    index = files.docs / "index.html"
    assert "pairs" in index.read_text(encoding="utf-8")
    pages = "".join(page.read_text(encoding="utf-8") for page in files.docs.rglob("*.html"))
    assert "round-trip-too-far" in pages
    assert "a question far from its evidence asks about something else" in pages
    assert not re.findall(re.escape(str(files.folder)), pages)


def test_too_many_rejected_is_an_error_after_everything_is_written(files: Files) -> None:
    with pytest.raises(
        LimitBroken, match=r"60\.0% of 5 candidates were rejected, and validate\.max_rejected_share is 50%; most often: "
    ):
        files.run(max_rejected_share=0.5)
    assert files.account()["rejected"] == 3
    assert (files.docs / "index.html").is_file()


def test_a_share_at_the_limit_is_no_error(files: Files) -> None:
    assert files.run(max_rejected_share=0.6)["rejected_share"] == 0.6


def test_no_pair_at_all_is_an_error_whatever_the_limit(tmp_path: Path) -> None:
    with pytest.raises(LimitBroken, match=r"100\.0% of 1 candidates were rejected"):
        Files(tmp_path, candidate(rank=7)).run(max_rejected_share=1.0)


def test_no_candidate_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no candidate"):
        Files(tmp_path).run()


def test_a_candidate_of_a_chunk_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="good names chunk gone"):
        Files(tmp_path, candidate(chunk_id="gone")).run()
