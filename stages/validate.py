"""data/candidates.jsonl, judged, measured and reviewed -> data/pairs.jsonl + data/rejected.jsonl + Data Docs: each held against the rules.

The rules are data, in validate_suite.yaml beside this file; Great Expectations runs them. Nothing disappears: each candidate is a pair,
with its evidence located in the document, or a rejected row with the names of the rules it broke. Costs seconds.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from stages.decisions import with_decisions
from stages.evidence import CODE, FENCED, ITEM, fold, invented, locate, words
from stages.files import new_folder, write_json
from stages.params import NonNegative, Positive, Share
from stages.program import BadInput, LimitBroken, run, say
from stages.records import (
    MEND,
    Candidate,
    Chunk,
    Decision,
    Judgement,
    Measurement,
    Pair,
    Rejected,
    by_id,
    read_records,
    write_records,
)
from stages.rules import checking, read_rules
from stages.screening import instructions_in, redacted, secrets_in

SUITE = Path(__file__).with_name("validate_suite.yaml")
PROMPTS = Path(__file__).parent / "recipes" / "prompts.yaml"

TAG = r"(?:a|b|i|u|p|br|hr|em|li|ol|ul|td|th|tr|div|img|pre|sub|sup|svg|code|span|table|thead|tbody|strong|script|style|iframe|details|summary|h[1-6])"
MARKUP = re.compile(
    rf"</?{TAG}(?:\s[^>]*)?/?>|</\w+>|<\w+\s+[\w:-]+=[^>]*>|&(?:[a-z]{{2,8}}|#\d+);|\]\(|!\[|\{{\{{|\{{%|^\s*\|.*\|\s*$|^#{{1,6}} |^:::|^\s*\.\. \w+::",
    re.IGNORECASE | re.MULTILINE,
)
MAX_SHARE_IN_QUESTION = 0.85  # of the answer's words


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    wordings: Positive
    min_similarity: NonNegative
    min_entailment: Share
    max_rejected_share: Share


def copies(question: str, answer: str) -> bool:
    """Whether `question` says nearly all that `answer` says; both as `words` gives them."""
    said = set(answer.split())
    return len(said & set(question.split())) > MAX_SHARE_IN_QUESTION * len(said)


def loops(text: str) -> bool:
    """Whether up to ten words outside code come three times in a row, a line three times, or a sentence of at least five words twice."""
    listed = ITEM.sub("", text)
    prose = CODE.sub(" ", listed)
    often = max(Counter(words(listed).split()).values(), default=0)
    sentences = Counter(words(sentence) for sentence in re.split(r"(?<=[.!?])\s", prose)) if often > 1 else Counter[str]()
    if any(count > 1 and one.count(" ") >= 4 for one, count in sentences.items()):
        return True
    if often < 3:  # as in nearly all texts: the rest is slow
        return False
    said = words(prose).split()
    for length in range(1, min(10, len(said) // 3) + 1):
        equal = 0  # words in a row that are the same as the one `length` words on
        for one, other in zip(said, said[length:], strict=False):
            equal = equal + 1 if one == other else 0
            if equal == 2 * length:
                return True
    return any(count > 2 and one for one, count in Counter(words(line) for line in FENCED.sub("", listed).split("\n")).items())


def holds_markup(text: str) -> bool:
    return MARKUP.search(CODE.sub(" ", text)) is not None


def table(
    candidates: Sequence[Candidate],
    chunks: Mapping[str, Chunk],
    judgements: Mapping[str, Judgement],
    measurements: Mapping[str, Measurement],
    refused: frozenset[str],
    examples: Iterable[str],
) -> Any:
    """A DataFrame with a row for each candidate in the given order: its fields, secrets marked over, and the columns that rules ask about.

    A candidate that no judge rated, for whatever reason, is not `rated_` anything: the other rules decide. `refused`: by a reviewer.
    """
    import pandas

    taught = {words(example) for example in examples}
    sources = {name: fold(f"{' '.join(chunk.heading_path)} {chunk.text}") for name, chunk in chunks.items()}

    @functools.cache  # the wordings of a fact share their answer and quote
    def of_answer(answer: str, quote: str, chunk_id: str) -> dict[str, bool]:
        return invented(answer, sources[chunk_id]) | {
            "quote_is_missing": locate(quote, chunks[chunk_id].text) is None,
            "answer_loops": loops(answer),
            "holds_markup": holds_markup(answer),
            "speaks_to_a_model": bool(instructions_in(f"{answer}\n{quote}")),
        }

    rows: list[dict[str, Any]] = []
    for candidate in candidates:
        chunk, measured = chunks[candidate.chunk_id], measurements[candidate.id]
        question, answer = words(candidate.question), words(candidate.answer)
        too_low = judgements[candidate.id].too_low if candidate.id in judgements else ()
        told = of_answer(candidate.answer, candidate.quote, chunk.id)
        rows.append(
            msgspec.structs.asdict(without_secrets(candidate) if measured.secrets else candidate)
            | told
            | {
                "question_copies_answer": copies(question, answer),
                "question_copies_example": question in taught,
                "question_loops": loops(candidate.question) or CODE.sub("", candidate.question).count("?") > 1,
                "holds_markup": told["holds_markup"] or holds_markup(candidate.question),
                "speaks_to_a_model": told["speaks_to_a_model"] or bool(instructions_in(candidate.question)),
                "holds_secret": bool(measured.secrets),
                "holds_personal_data": bool(measured.personal_data),
                "entailment": measured.entailment,
                "language_differs": "" not in (measured.language, measured.source_language)
                and measured.language != measured.source_language,
                "rated_unfaithful": "faithfulness" in too_low,
                "rated_unanswerable": "answerability" in too_low,
                "rated_useless": "usefulness" in too_low,
                "reviewer_rejected": candidate.id in refused,
            }
        )
    return pandas.DataFrame(rows)


def varied(candidates: Sequence[Candidate], measurements: Mapping[str, Measurement]) -> list[Candidate]:
    """`candidates`, those first that are the first of their fact and cluster: wordings that differ teach more, and one can be asked."""
    seen: Counter[tuple[str, str]] = Counter()
    turns = []
    for candidate in candidates:
        key = candidate.fact_id, measurements[candidate.id].cluster
        turns.append(seen[key])
        seen[key] += 1
    order = sorted(range(len(turns)), key=turns.__getitem__)
    return [candidates[place] for place in order]


def selection(candidates: Sequence[Candidate], measurements: Mapping[str, Measurement]) -> Any:
    """A DataFrame with a row for each of `candidates`, best first: whether a better one says the same, else its place in its fact, from 1."""
    import pandas

    rows: list[dict[str, Any]] = []
    asked: set[str] = set()
    fact_of_cluster: dict[str, str] = {}
    wordings: Counter[str] = Counter()
    for candidate in candidates:
        question = words(candidate.question)
        is_asked = question in asked
        is_alike = fact_of_cluster.get(measurements[candidate.id].cluster, candidate.fact_id) != candidate.fact_id
        if not is_asked and not is_alike:
            asked.add(question)
            fact_of_cluster.setdefault(measurements[candidate.id].cluster, candidate.fact_id)
            wordings[candidate.fact_id] += 1
        rows.append(
            {
                "id": candidate.id,
                "question": candidate.question,
                "repeats_better_question": is_asked,
                "repeats_better_pair": is_alike and not is_asked,
                "place": 0 if is_asked or is_alike else wordings[candidate.fact_id],
            }
        )
    return pandas.DataFrame(rows)


def without_secrets(candidate: Candidate) -> Candidate:
    """`candidate` with each secret in its texts marked over."""
    texts = {name: getattr(candidate, name) for name in ("question", "answer", "quote")}
    return msgspec.structs.replace(candidate, **{name: redacted(text, secrets_in(text)) for name, text in texts.items()})


def example_questions(prompts: Path) -> list[str]:
    """Every question that a prompt shows to the teacher."""
    import yaml

    recipes = yaml.safe_load(prompts.read_text(encoding="utf-8")).values()
    examples = [example for recipe in recipes for example in recipe.get("examples", [])]
    return [question for example in examples for question in example.get("questions") or [example["question"]]]


def pair_of(candidate: Candidate, chunk: Chunk, cluster: str, flags: Sequence[str], is_reviewed: bool) -> Pair:
    """`candidate` as a pair, its quote located in the document."""
    place = locate(candidate.quote, chunk.text)
    if place is None:
        raise LimitBroken(
            f"candidate {candidate.id} passed every rule, but its quote is not in chunk {chunk.id}; keep the rule quote-not-in-chunk"
        )
    return Pair(
        id=candidate.id,
        chunk_id=chunk.id,
        fact_id=candidate.fact_id,
        section_id=chunk.section_id,
        document_id=chunk.document_id,
        path=chunk.path,
        heading_path=chunk.heading_path,
        question=candidate.question,
        answer=candidate.answer,
        quote=candidate.quote,
        quote_start=chunk.start + place[0],
        quote_end=chunk.start + place[1],
        type=candidate.type,
        model=candidate.model,
        similarity=candidate.similarity,
        wording=candidate.wording,
        cluster=cluster,
        flags=tuple(flags),
        reviewed=is_reviewed,
    )


def rejected_of(candidate: Candidate, chunk: Chunk, rules: Sequence[str], has_secret: bool, is_waivable: bool) -> Rejected:
    shown = without_secrets(candidate) if has_secret else candidate
    return Rejected(
        id=candidate.id,
        chunk_id=chunk.id,
        section_id=chunk.section_id,
        question=shown.question,
        answer=shown.answer,
        quote=shown.quote,
        type=candidate.type,
        similarity=candidate.similarity,
        rules=tuple(rules),
        waivable=is_waivable,
    )


def main(
    candidates: Path,
    chunks: Path,
    judgements: Path,
    measurements: Path,
    review: Path,
    pairs: Path,
    rejected: Path,
    data_docs: Path,
    metrics: Path,
    *,
    validate: Params,
) -> None:
    rules = read_rules(SUITE, validate=validate)
    chunk_by_id = by_id(read_records(chunks, Chunk))
    asked = read_records(candidates, Candidate)
    if not asked:
        raise BadInput(f"{candidates} holds no candidate; see data/generate_failures.jsonl")
    if lost := [claim for claim in asked if claim.chunk_id not in chunk_by_id]:
        raise BadInput(
            f"{candidates}: {lost[0].id} names chunk {lost[0].chunk_id}, which {chunks} does not hold. Re-run: dvc repro generate"
        )
    reviewed = with_decisions(asked, read_records(review, Decision, MEND), chunk_by_id)
    measured = by_id(read_records(measurements, Measurement))
    if unknown := [claim for claim in reviewed.candidates if claim.id not in measured]:
        raise BadInput(f"{measurements} has no row for candidate {unknown[0].id}. Re-run: dvc repro measure")
    # best first: what people wrote or accepted, then by round trip, so that of two equal questions the better one stays
    claims = sorted(
        reviewed.candidates,
        key=lambda claim: (
            claim.recipe != "curated",
            claim.id not in reviewed.accepted,
            claim.wording,
            -claim.similarity,
            claim.id,
        ),
    )
    rows = table(
        claims,
        chunk_by_id,
        by_id(read_records(judgements, Judgement)),
        measured,
        reviewed.rejected,
        example_questions(PROMPTS),
    )
    faults: dict[str, list[str]] = {}  # candidate id -> rules that reject it
    flags: dict[str, list[str]] = {}  # candidate id -> rules that report it
    counts: Counter[str] = Counter()

    def note(broken: Mapping[str, Sequence[str]]) -> None:
        for rule in rules:
            ids = broken.get(rule.rule, ())
            counts[rule.rule] += len(ids)
            for id in ids:
                if rule.severity == "info":
                    flags.setdefault(id, []).append(rule.rule)
                elif not (rule.waivable and id in reviewed.accepted):
                    faults.setdefault(id, []).append(rule.rule)

    with new_folder(data_docs) as draft, checking(draft) as check:
        note(check("candidates", rows, [rule for rule in rules if rule.among == "all"]))
        sound = varied([claim for claim in claims if claim.id not in faults], measured)
        if sound:
            note(check("sound candidates", selection(sound, measured), [rule for rule in rules if rule.among == "sound"]))
    final = {rule.rule for rule in rules if not rule.waivable}
    accepted, refused = [], []
    for claim in claims:
        chunk, one = chunk_by_id[claim.chunk_id], measured[claim.id]
        if claim.id in faults:
            refused.append(rejected_of(claim, chunk, faults[claim.id], bool(one.secrets), final.isdisjoint(faults[claim.id])))
        else:
            accepted.append(pair_of(claim, chunk, one.cluster, flags.get(claim.id, ()), claim.id in reviewed.accepted))
    share = len(refused) / len(claims)
    write_records(rejected, refused)
    write_records(pairs, accepted)
    write_json(
        metrics,
        {
            "candidates": len(claims),
            "pairs": len(accepted),
            "rejected": len(refused),
            "rejected_share": round(share, 4),
            "sections": len({pair.section_id for pair in accepted}),
            "facts": len({pair.fact_id for pair in accepted}),
            "by_rule": {rule.rule: counts[rule.rule] for rule in rules if rule.severity != "info"},
            "flagged": {rule.rule: counts[rule.rule] for rule in rules if rule.severity == "info"},
            "review": {
                "accepted": len(reviewed.accepted) - reviewed.edited,
                "edited": reviewed.edited,
                "rejected": len(reviewed.rejected),
                "stale": len(reviewed.stale),
            },
        },
    )
    say(
        f"validate: {len(claims)} candidates = {len(accepted)} pairs + {len(refused)} rejected; Data Docs in {data_docs}/index.html"
    )
    if reviewed.stale:
        say(
            f"validate: {len(reviewed.stale)} decisions in {review} are about text that is gone, first {reviewed.stale[0].question!r}"
        )
    if not accepted or share > validate.max_rejected_share:
        worst = ", ".join(f"{rule} {count}" for rule, count in counts.most_common(3))
        raise LimitBroken(
            f"{share:.1%} of {len(claims)} candidates were rejected, and validate.max_rejected_share is {validate.max_rejected_share:.0%}; most often: {worst}"
        )


if __name__ == "__main__":
    run(main)
