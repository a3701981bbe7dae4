"""stages.decisions: what reviewers decided outlives a regeneration."""

from typing import Any

import msgspec

from stages.decisions import with_decisions
from stages.records import Candidate, Chunk, Decision, content_id

CHUNK = Chunk(
    id="now",
    document_id="d",
    section_id="s",
    path="a.md",
    heading_path=("Tea",),
    start=0,
    end=40,
    text="Steep tea for\nthree minutes. Then pour it.",
)
CANDIDATE = Candidate(
    id="c",
    chunk_id="now",
    fact_id="f",
    question="How long does tea steep?",
    answer="Three minutes.",
    quote="Steep tea for three minutes.",
    type="factual",
    recipe="quote-first",
    model="m",
    similarity=0.7,
    rank=2,
    wording=3,
)


def decision(verdict: Any, **changes: Any) -> Decision:
    plain = {
        "chunk_id": "now",
        "question": CANDIDATE.question,
        "answer": CANDIDATE.answer,
        "quote": CANDIDATE.quote,
        "type": "factual",
    }
    return Decision(id=content_id(CANDIDATE.question, CANDIDATE.answer), verdict=verdict, **(plain | changes))


def test_without_decisions_candidates_stay_as_they_are() -> None:
    found = with_decisions([CANDIDATE], [], {"now": CHUNK})
    assert (found.candidates, found.accepted, found.rejected, found.edited, found.stale) == ([CANDIDATE], set(), set(), 0, [])


def test_a_decision_is_found_by_question_and_answer_whatever_the_chunk_was_called() -> None:
    found = with_decisions([CANDIDATE], [decision("reject", chunk_id="earlier")], {"now": CHUNK})
    assert (found.candidates, found.rejected) == ([CANDIDATE], {"c"})


def test_an_edit_keeps_the_evidence_and_changes_the_words_and_the_id() -> None:
    (edited,) = with_decisions([CANDIDATE], [decision("edit", edited_answer="For three minutes.")], {"now": CHUNK}).candidates
    assert edited == msgspec.structs.replace(
        CANDIDATE, id=content_id("now", CANDIDATE.question, "For three minutes."), answer="For three minutes."
    )


def test_an_accepted_pair_that_is_no_longer_generated_comes_back_where_its_quote_stands() -> None:
    found = with_decisions([], [decision("accept", chunk_id="earlier")], {"now": CHUNK})
    (again,) = found.candidates
    assert (again.id, again.chunk_id, again.recipe) == (content_id("now", CANDIDATE.question, CANDIDATE.answer), "now", "review")
    assert found.accepted == {again.id}


def test_an_edited_pair_comes_back_edited() -> None:
    found = with_decisions([], [decision("edit", edited_question="How long is tea steeped?")], {"now": CHUNK})
    assert [(one.question, one.answer) for one in found.candidates] == [("How long is tea steeped?", "Three minutes.")]
    assert found.edited == 1


def test_a_decision_about_text_that_is_gone_is_stale_and_a_rejection_waits() -> None:
    gone = decision("accept", quote="Steep tea for four minutes.")
    found = with_decisions([], [gone], {"now": CHUNK})
    assert (found.candidates, found.stale) == ([], [gone])
    assert with_decisions([], [decision("reject")], {"now": CHUNK}).stale == []


def test_an_edit_that_says_what_another_candidate_says_leaves_one_of_them() -> None:
    other = msgspec.structs.replace(
        CANDIDATE, id=content_id("now", "How long is tea steeped?", "Three minutes."), question="How long is tea steeped?"
    )
    found = with_decisions([CANDIDATE, other], [decision("edit", edited_question="How long is tea steeped?")], {"now": CHUNK})
    assert [one.id for one in found.candidates] == [other.id]
