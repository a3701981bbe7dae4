"""synthetic-data-kit's generator between our own calls, and the evidence that it does not keep.

The kit gets a client that records and replays, one chunk at a time, so that ids, retries and the count of what failed stay ours.
"""

import contextlib
import functools
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec

from stages.evidence import fold, sentences_of

Words = Annotated[str, msgspec.Meta(pattern=r"\S")]

WRITTEN = re.compile(r'"(question|answer)"\s*:\s*("(?:[^"\\]|\\.)*")(?=\s*[,}])')

# Chosen on 16 answers reworded from a handbook, the same 16 moved to other questions, 10 that contradict it and 13 it does not hold:
# 15, 0, 2 and 0 find evidence. Of 499 accepted pairs then 469 did, 468 of them their own quote; with shuffled answers 20 did.
# The cosine of the answer alone does not part them: 0.41 to 0.93 for the 16, 0.16 to 0.62 for the 13.
MIN_COSINE = 0.65  # of question and answer together
MIN_COSINE_EACH = 0.4  # of either alone: a right answer to another question is near by its own words only


class KitPair(msgspec.Struct, frozen=True):
    """An entry of the kit's; it may hold more, as a rating."""

    question: Words
    answer: Words


def messages_for(text: str, pairs: int) -> tuple[tuple[str, str], ...]:
    """The (role, content) messages that the kit's QAGenerator sends for `text`, which stays whole whatever its length.

    `pairs` and a summary count only where the kit's prompt names them, which that of version 0.0.5 does not; the summary would be
    the first 100 characters of `text`, so that it costs no call.
    """
    (messages,), _ = _generate(text, pairs, "[]")
    return tuple((message["role"], message["content"]) for message in messages)


def pairs_in(reply: str) -> list[tuple[str, str]]:
    """Every (question, answer) that the kit's parser finds in `reply`, also when they are more than it was asked for.

    Raises ValueError, with the reason, when there is none, when one is incomplete, and when the parser lost or changed words:
    it skips what it cannot read, cuts an answer at a stray quotation mark, and leaves escapes undone, all without a word.
    """
    if reply.startswith("ERROR:"):  # what the kit's own client gives for a failed call
        raise ValueError(fold(reply)[:200])
    _, found = _generate("-", sys.maxsize, reply)
    if not found:
        raise ValueError("synthetic-data-kit found no pair in the reply")
    pairs = msgspec.convert(found, list[KitPair])
    written = Counter((key, fold(json.loads(value, strict=False))) for key, value in WRITTEN.findall(reply))
    parsed = Counter((key, fold(getattr(pair, key))) for pair in pairs for key in ("question", "answer"))
    questions = reply.count('"question"')
    if written != parsed or questions != len(pairs):
        raise ValueError(f"synthetic-data-kit lost or changed words: {len(pairs)} pairs from a reply with {questions} questions")
    return [(pair.question.strip(), pair.answer.strip()) for pair in pairs]


def spans_of(text: str) -> list[str]:
    """What can be evidence in a Markdown text: its sentences and every two neighbours, verbatim with white space folded."""
    whole, sentences = fold(text), sentences_of(text)
    return sentences + [two for two in map(" ".join, itertools.pairwise(sentences)) if two in whole]


def evidence_for(pairs: Sequence[tuple[str, str]], spans: Sequence[str], embed: Callable[[list[str]], Any]) -> list[str]:
    """For each (question, answer) the one of `spans` nearest to both together, or "" where none is near enough to each.

    `embed` maps texts to unit vectors, shape (n, d).
    """
    if not pairs or not spans:
        return [""] * len(pairs)
    questions, answers = (list(texts) for texts in zip(*pairs, strict=True))
    both = [f"{question} {answer}" for question, answer in pairs]
    known = embed(list(spans))
    evidence = []
    for whole, question, answer in zip(embed(both), embed(questions), embed(answers), strict=True):
        best = int((known @ whole).argmax())
        is_near = known[best] @ whole >= MIN_COSINE and min(known[best] @ question, known[best] @ answer) >= MIN_COSINE_EACH
        evidence.append(spans[best] if is_near else "")
    return evidence


def _generate(text: str, pairs: int, reply: str) -> tuple[list[Any], list[Any]]:
    """What the kit's generator sends for `text`, and what it makes of `reply`."""
    sent: list[Any] = []

    def batch_completion(batch: list[Any], **_sampling: Any) -> list[str]:
        sent.extend(batch)
        return [reply]

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its config's path and its progress
        generator = _generator()
        generator.client = SimpleNamespace(batch_completion=batch_completion)
        return sent, generator.generate_qa_pairs(text, summary=text, num_pairs=pairs)


@functools.cache
def _generator() -> Any:
    from synthetic_data_kit.generators.qa_generator import QAGenerator

    generator = QAGenerator(None)
    generator.generation_config["chunk_size"] = sys.maxsize  # it would split a longer text, and lose what came of which part
    return generator
