"""Candidates as reviewers decided: what measure and validate work on."""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from stages.evidence import locate
from stages.records import Candidate, Chunk, Decision, content_id


class Reviewed(msgspec.Struct, frozen=True):
    """Candidates with their edits, and what reviewers thought of them."""

    candidates: list[Candidate]
    accepted: frozenset[str]  # ids in `candidates`, edited ones among them
    rejected: frozenset[str]
    edited: int
    stale: list[Decision]  # accepted or edited, but no chunk holds the quote any more


def with_decisions(candidates: Sequence[Candidate], decisions: Iterable[Decision], chunks: Mapping[str, Chunk]) -> Reviewed:
    """`candidates` after review: an edited one is replaced, and one that was accepted and is no longer generated comes back."""
    left = {decision.id: decision for decision in decisions}
    found: list[Candidate] = []
    accepted: set[str] = set()
    rejected: set[str] = set()
    edited = 0
    used: set[str] = set()
    for candidate in candidates:
        decision = left.get(content_id(candidate.question, candidate.answer))
        if decision is None:
            found.append(candidate)
            continue
        used.add(decision.id)
        after = _edited(candidate, decision) if decision.verdict == "edit" else candidate
        edited += decision.verdict == "edit"
        (rejected if decision.verdict == "reject" else accepted).add(after.id)
        found.append(after)
    stale = []
    for name in sorted(left.keys() - used):
        decision = left[name]
        chunk = _chunk_of(decision, chunks) if decision.verdict != "reject" else None
        if chunk:
            again = _edited(_again(decision, chunk), decision) if decision.verdict == "edit" else _again(decision, chunk)
            edited += decision.verdict == "edit"
            accepted.add(again.id)
            found.append(again)
        elif decision.verdict != "reject":
            stale.append(decision)
    unique = {candidate.id: candidate for candidate in found}  # an edit may say what another candidate says
    return Reviewed(list(unique.values()), frozenset(accepted), frozenset(rejected), edited, stale)


def _edited(candidate: Candidate, decision: Decision) -> Candidate:
    question, answer = decision.edited_question or candidate.question, decision.edited_answer or candidate.answer
    id = content_id(candidate.chunk_id, question, answer)
    return msgspec.structs.replace(candidate, id=id, question=question, answer=answer)


def _chunk_of(decision: Decision, chunks: Mapping[str, Chunk]) -> Chunk | None:
    """The chunk that holds the quote: the one it was taken from, or else the first by id."""
    order = [decision.chunk_id, *sorted(chunks)] if decision.chunk_id in chunks else sorted(chunks)
    return next((chunks[id] for id in order if decision.quote and locate(decision.quote, chunks[id].text)), None)


def _again(decision: Decision, chunk: Chunk) -> Candidate:
    return Candidate(
        id=content_id(chunk.id, decision.question, decision.answer),
        chunk_id=chunk.id,
        fact_id=content_id(chunk.id, decision.quote),
        question=decision.question,
        answer=decision.answer,
        quote=decision.quote,
        type=decision.type,
        recipe="review",
        model="review",
        similarity=1.0,  # a person vouches for it
        rank=1,
        wording=1,
    )
