"""judge: against a fake server, whose judges are a few lines each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import MODELS
from fake_endpoint import FakeEndpoint, Turn
from fake_judge import Judge, audited, honest, is_probe, judging, ratings

from stages.executor import LOCAL
from stages.judge import main
from stages.judging import DIMENSIONS
from stages.program import BadInput
from stages.records import Candidate, Chunk, Judgement, Measurement, Pair, Rejected, read_records, write_records
from stages.validate import Params as Validate
from stages.validate import main as validate

CHUNK = Chunk(
    id="chunk",
    document_id="doc",
    section_id="section",
    path="tea.md",
    heading_path=("Tea", "Steeping"),
    start=0,
    end=80,
    text="## Steeping\n\nSteep green tea for three minutes\n  at 80 degrees. Nobody knows why.\n",
)
TRUE = Candidate(
    id="true",
    chunk_id="chunk",
    fact_id="fact",
    question="How long should green tea steep?",
    answer="Steep green tea for three minutes.",
    quote="Steep green tea for three minutes at 80 degrees.",
    type="factual",
    recipe="quote-first",
    model="m",
    similarity=0.8,
    rank=1,
    wording=1,
)
FALSE = msgspec.structs.replace(
    TRUE, id="false", question="How hot is green tea steeped?", answer="Steep it in boiling milk, and for long.", wording=2
)
FOURTH = msgspec.structs.replace(TRUE, id="fourth", question="For how many minutes does green tea steep?", wording=4)


class Files:
    """A folder with two true candidates, of which one is a fourth wording, and a false one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.candidates, self.chunks, self.judgements = (
            folder / f"{name}.jsonl" for name in ("candidates", "chunks", "judgements")
        )
        self.pairs, self.rejected, self.metrics = folder / "pairs.jsonl", folder / "rejected.jsonl", folder / "judge.json"
        write_records(self.chunks, [CHUNK])
        write_records(self.candidates, [TRUE, FALSE, FOURTH])

    def judge(self, text: Judge, turn: Callable[[str, int], Turn] = lambda prompt, call: "ok", **changes: Any) -> FakeEndpoint:
        """Runs the stage with a judge that says `text`; the endpoint knows what it was asked."""
        with FakeEndpoint(turn, text) as endpoint:
            paths = self.candidates, self.chunks, self.folder / "store", self.judgements, self.metrics
            main(*paths, judge=judging(endpoint, **changes), models=MODELS, executor=LOCAL)
        return endpoint

    def found(self) -> dict[str, Judgement]:
        return {one.id: one for one in read_records(self.judgements, Judgement)}

    def figures(self) -> dict[str, Any]:
        return dict(json.loads(self.metrics.read_text()))

    def validate(self) -> dict[str, tuple[str, ...]]:
        """Runs validate on what the judge left; rejected id -> rules."""
        settings = Validate(wordings=4, min_similarity=0.5, min_entailment=0.0, max_rejected_share=0.95)
        plain: dict[str, Any] = {"entailment": 0.9, "language": "en", "source_language": "en", "secrets": (), "personal_data": ()}
        measurements, review = self.folder / "measurements.jsonl", self.folder / "review.jsonl"
        write_records(measurements, [Measurement(id=one.id, cluster=one.id, **plain) for one in (TRUE, FALSE, FOURTH)])
        review.touch()
        paths = self.candidates, self.chunks, self.judgements, measurements, review, self.pairs, self.rejected
        validate(*paths, self.folder / "docs", self.folder / "validate.json", validate=settings)
        return {row.id: row.rules for row in read_records(self.rejected, Rejected)}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


# the audit


def test_a_judge_that_reads_passes_the_audit_and_is_used(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = files.judge(honest)
    assert files.figures() == {
        "used": True,
        "why": "the audit passed: 16 of 16 right answers passed, 16 of 16 swapped ones were caught",
        "audit": {"probes": 16, "passed": 16, "caught": 16, "unscored": 0},
        "asked": 2,
        "scored": 2,
        "unparsed": 0,
        "failed": 0,
        "too_low": {"faithfulness": 1, "answerability": 0, "usefulness": 0},
    }
    assert {name: (one.faithfulness, one.too_low) for name, one in files.found().items()} == {
        "true": (5, ()),
        "false": (1, ("faithfulness",)),
    }
    assert len(endpoint.bodies) == 34
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "2 scored + 0 unparsed + 0 failed; 1 rated below 4" in line


@pytest.mark.parametrize(
    ("judge", "audit"),
    [
        (lambda body: ratings(5), {"probes": 16, "passed": 16, "caught": 0, "unscored": 0}),
        (lambda body: ratings(1), {"probes": 16, "passed": 0, "caught": 16, "unscored": 0}),
        (lambda body: "Looks fine to me!", {"probes": 16, "passed": 0, "caught": 0, "unscored": 32}),
    ],
    ids=["calls everything right", "calls everything wrong", "talks nonsense"],
)
def test_a_judge_that_fails_the_audit_is_not_used(
    files: Files, capsys: pytest.CaptureFixture[str], judge: Judge, audit: dict[str, int]
) -> None:
    endpoint = files.judge(judge)
    assert files.found() == {}
    assert (files.figures()["used"], files.figures()["audit"]) == (False, audit)
    assert len(endpoint.bodies) == 32 and all(is_probe(body) for body in endpoint.bodies)
    line = capsys.readouterr().out
    assert line.startswith(
        f"judge: not used, as the audit failed: {audit['passed']} of 16 right answers passed, {audit['caught']} of 16"
    )
    assert line.count("\n") == 1 and ("32 of 32 replies had no ratings (not the JSON" in line) == (audit["unscored"] == 32)


def test_a_right_answer_passes_only_when_no_rating_is_low(files: Files) -> None:
    files.judge(lambda body: ratings(json.loads(honest(body))["faithfulness"], usefulness=3))
    assert files.figures()["audit"] == {"probes": 16, "passed": 0, "caught": 16, "unscored": 0}


def test_a_swapped_answer_is_caught_by_its_faithfulness_alone(files: Files) -> None:
    files.judge(lambda body: ratings(5, 1 if json.loads(honest(body))["faithfulness"] == 1 else 5))
    assert files.figures()["audit"] == {"probes": 16, "passed": 16, "caught": 0, "unscored": 0}


@pytest.mark.parametrize(("share", "is_used"), [(0.875, True), (0.9, False)])
def test_the_share_of_probes_that_a_judge_must_get_right_is_a_setting(files: Files, share: float, is_used: bool) -> None:
    def blind_in_the_bath(body: dict[str, Any]) -> str:
        return ratings(5) if "Topic: Baths" in body["messages"][-1]["content"] else honest(body)

    files.judge(blind_in_the_bath, audit_pass_share=share)
    assert (files.figures()["used"], files.figures()["audit"]["caught"]) == (is_used, 14)


# the ratings


def test_a_candidate_is_judged_against_its_whole_chunk(files: Files) -> None:
    endpoint = files.judge(honest)
    shown = [body["messages"][-1]["content"] for body in endpoint.bodies if not is_probe(body)]
    assert len(shown) == 2
    for content in shown:
        assert (
            content.startswith("Topic: Tea > Steeping\nPassage:\n## Steeping\n\nSteep green tea")
            and "Nobody knows why." in content
        )


def test_the_reason_is_asked_for_before_the_ratings(files: Files) -> None:
    schema = files.judge(honest).bodies[0]["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == ["reason", *DIMENSIONS]
    assert schema["properties"]["faithfulness"] == {"enum": [1, 2, 3, 4, 5]}
    assert schema["additionalProperties"] is False and sorted(schema["required"]) == sorted(["reason", *DIMENSIONS])


def test_the_limit_is_a_setting_and_a_new_one_costs_no_call(files: Files) -> None:
    files.judge(audited(ratings(4, 3, 5)))
    assert files.found()["true"].too_low == ("answerability",)
    again = files.judge(audited("never asked"), min_score=3)
    assert (files.found()["true"].too_low, again.bodies) == ((), [])


def test_more_wordings_are_judged_when_asked_for(files: Files) -> None:
    files.judge(honest, wordings=4)
    assert sorted(files.found()) == ["false", "fourth", "true"]
    assert len(files.judge(honest, wordings=1).bodies) == 0
    assert sorted(files.found()) == ["true"]


# what becomes of them


def test_an_unfaithful_candidate_is_rejected_by_name_and_the_others_keep_their_text(files: Files) -> None:
    files.judge(honest)
    assert files.validate() == {"false": ("judge-unfaithful",)}
    texts = [(pair.id, pair.question, pair.answer, pair.quote) for pair in read_records(files.pairs, Pair)]
    assert texts == [(one.id, one.question, one.answer, one.quote) for one in (FOURTH, TRUE)]


def test_unanswerable_and_useless_candidates_are_rejected_by_name(files: Files) -> None:
    files.judge(audited(ratings(5, 2, 1)))
    both = ("judge-unanswerable", "judge-useless")
    assert files.validate() == {"false": both, "true": both}


def test_an_unparsed_reply_is_counted_and_neither_rejects_nor_changes_a_pair(files: Files) -> None:
    def rewriting(body: dict[str, Any]) -> str:
        better = ratings(1, question="Which milk?", answer="Oat milk, at 100 degrees.")
        return honest(body) if is_probe(body) else better if FALSE.answer in body["messages"][-1]["content"] else "I cannot say."

    files.judge(honest, enabled=False)
    assert files.validate() == {}
    before = files.pairs.read_bytes()
    files.judge(rewriting)
    figures = files.figures()
    assert [figures[name] for name in ("used", "asked", "scored", "unparsed", "failed")] == [True, 2, 0, 2, 0]
    assert files.validate() == {}
    assert files.pairs.read_bytes() == before


def test_a_call_without_a_reply_is_failed_and_asked_again_next_time(files: Files) -> None:
    files.judge(honest, lambda prompt, call: "400" if FALSE.answer in prompt else "ok")
    judgement = files.found()["false"]
    assert (judgement.status, judgement.faithfulness, judgement.too_low) == ("failed", None, ())
    assert "fake 400" in judgement.reason
    assert [files.figures()[name] for name in ("asked", "scored", "unparsed", "failed")] == [2, 1, 0, 1]
    assert files.validate() == {}
    assert len(files.judge(honest).bodies) == 1
    assert files.found()["false"].too_low == ("faithfulness",)


def test_a_second_run_asks_nothing_and_writes_the_same_bytes(files: Files) -> None:
    files.judge(honest)
    before = files.judgements.read_bytes(), files.metrics.read_bytes()
    assert files.judge(honest).bodies == []
    assert (files.judgements.read_bytes(), files.metrics.read_bytes()) == before


def test_a_judge_that_is_off_asks_nothing_and_says_so(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert files.judge(honest, enabled=False).bodies == []
    assert files.judgements.read_bytes() == b""
    assert files.figures() == {"used": False, "why": "judge.enabled is false"}
    assert capsys.readouterr().out == "judge: not used, as judge.enabled is false; no candidate was judged\n"


def test_a_candidate_of_a_chunk_that_is_gone_is_an_error(files: Files) -> None:
    write_records(files.candidates, [msgspec.structs.replace(TRUE, chunk_id="gone")])
    with pytest.raises(BadInput, match="true names chunk gone"):
        files.judge(honest)
