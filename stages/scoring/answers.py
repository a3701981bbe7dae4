"""What one answer is worth: what is measured without a language model, beside the ratings that a judge gave."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from stages.evidence import fold, words
from stages.program.errors import BadRecord
from stages.records import Answer, Question, Score

ABSTENTIONS = Path(__file__).parent / "abstentions.yaml"


class Words:
    """rouge-score's words, letters and digits in lower case, for every alphabet: its own knows a-z only, and scores the rest 0."""

    def tokenize(self, text: str) -> list[str]:
        """The words of `text` in order."""
        return re.findall(r"[^\W_]+", text.lower())


class Language(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One language of abstentions.yaml."""

    admits: tuple[str, ...]
    unless: tuple[str, ...]
    goes_on: tuple[str, ...]


def score_answers(
    questions: Mapping[str, Question],
    answers: Sequence[Answer],
    embedder: Any,
    pass_similarity: float,
    ratings: Mapping[str, float] = {},
) -> list[Score]:
    """One Score for each of `answers`, in their order. An answer without a word scores 0, whatever its embedding says.

    Similarity and ROUGE-L (F-measure over lower-case words, no stemming; Lin 2004, "ROUGE: A Package for Automatic Evaluation of
    Summaries") need the question's reference, the other shares its key facts or its quote; without, they are None. `ratings` holds a judge's ratings by the ids of the answers that have one.
    An out-of-scope question is passed by abstaining. Any other is passed by words as near to the reference as `pass_similarity`, with
    every key fact, which abstain only where the reference itself does ("I cannot know what time it is"). Raises BadRecord when a similarity is not a number.
    """
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=Words())
    references = {question.reference for question in questions.values() if question.reference}
    texts = sorted({answer.text for answer in answers} | references)  # each text once, in an order that runs share
    place = {text: row for row, text in enumerate(texts)}
    vectors = embedder.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    scores = []
    for answer in answers:
        question = questions[answer.question_id]
        similarity = rouge_l = None
        if question.reference:
            cosine = 0.0 if is_empty(answer) else float(vectors[place[answer.text]] @ vectors[place[question.reference]])
            if not math.isfinite(cosine):
                raise BadRecord(
                    f"the similarity of {answer.system}'s answer {answer.id} is {cosine}, not a number; "
                    "the embedder is damaged: check models.embedder in params.yaml"
                )
            similarity = round(min(1.0, max(-1.0, cosine)), 6)
            rouge_l = round(rouge.score(question.reference, answer.text)["rougeL"].fmeasure, 6)
        key_facts = share_of_facts(question.key_facts, answer.text)
        abstained = abstains(answer.text)
        if question.set == "out_of_scope":
            is_right = abstained
        else:
            is_near = similarity is not None and similarity >= pass_similarity
            is_right = not is_empty(answer) and abstained == abstains(question.reference) and is_near and key_facts in (None, 1.0)
        scores.append(
            Score(
                id=answer.id,
                question_id=question.id,
                set=question.set,
                section_id=question.section_id,
                type=question.type,
                system=answer.system,
                similarity=similarity,
                rouge_l=rouge_l,
                key_facts=key_facts,
                evidence=share_in_quote(question.quote, answer.text),
                judge=ratings.get(answer.id),
                abstained=float(abstained),
                passed=float(is_right),
            )
        )
    return scores


def is_empty(answer: Answer) -> bool:
    """Whether the system said nothing but spaces."""
    return not answer.text.strip()


def share_of_facts(facts: Sequence[str], text: str) -> float | None:
    """The share of `facts` that stand in `text`, case and white space folded; None without facts. 50 does not stand in 500."""
    if not facts:
        return None
    folded = fold(text).lower()
    found = sum(bool(re.search(rf"(?<!\d){re.escape(fact)}(?!\d)", folded)) for fact in (fold(one).lower() for one in facts))
    return round(found / len(facts), 6)


def share_in_quote(quote: str, text: str) -> float | None:
    """The share of the words of `text` that stand in `quote`; None without a quote, 0 where `text` has no word.

    Words such as "the" count too: without them the share told right answers from wrong ones no better, and each language has its own.
    """
    if not quote:
        return None
    said, known = words(text).split(), set(words(quote).split())
    return round(sum(word in known for word in said) / len(said), 6) if said else 0.0


def abstains(text: str) -> bool:
    """Whether `text` says that it does not know, or that the documentation does not cover the question; see abstentions.yaml."""
    text = text.replace("’", "'")
    starts = [0, *(found.end() for found in re.finditer(r"[.!?][)\"']?\s+|\n+", text.rstrip()))]
    for start, end in list(zip(starts, [*starts[1:], len(text)], strict=True))[:2]:
        for admits, unless, goes_on in _patterns():
            found = admits.search(text[start:end].rstrip())
            if (
                found
                and not unless.search(text[start : start + found.start()])
                and not goes_on.search(text[start + found.end() :])
            ):
                return True
    return False


@functools.cache
def _patterns() -> list[tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]]:
    """For each language: what admits, what voids that when it stands before, and what voids it when it follows."""
    import yaml

    languages = msgspec.convert(yaml.safe_load(ABSTENTIONS.read_text(encoding="utf-8")), dict[str, Language])
    return [
        (
            re.compile("|".join(language.admits), re.IGNORECASE),
            re.compile(rf"\b(?:{'|'.join(language.unless)})\b", re.IGNORECASE),
            re.compile("|".join(language.goes_on), re.IGNORECASE),
        )
        for language in languages.values()
    ]
