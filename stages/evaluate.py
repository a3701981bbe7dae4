"""data/questions.jsonl + data/answers/<system>.jsonl -> data/scores.jsonl + reports/metrics/evaluate.json

Scores every system on the same questions: cosine similarity of sentence embeddings and ROUGE-L, with bootstrap intervals over
sections and paired gains over base and tuned. No language model is called; 1,000 answers take under a minute on two shared cores.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from stages.files import write_json
from stages.models import load_embedder
from stages.params import Count, Models, Positive
from stages.program import BadInput, BadRecord, run, say
from stages.records import Answer, Question, Score, by_id, read_records, write_records
from stages.scoreboard import COLUMNS, Interval, Scoreboard, SetScores, SystemScores, in_order, score_rows

BASELINES = ("base", "tuned")  # a system is compared with those before it in `in_order`


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How sure the intervals are, and how they are drawn."""

    confidence: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
    resamples: Positive
    seed: Count


class Words:
    """rouge-score's words, letters and digits in lower case, for every alphabet: its own knows a-z only, and scores the rest 0."""

    def tokenize(self, text: str) -> list[str]:
        """The words of `text` in order."""
        return re.findall(r"[^\W_]+", text.lower())


def check_answers(questions: dict[str, Question], system: str, answers: Sequence[Answer], where: Path) -> None:
    """Raises BadRecord unless `answers` holds exactly one answer of `system` to each of `questions` (by id) and nothing else."""
    answered: set[str] = set()
    for answer in answers:
        fault = None
        if answer.question_id not in questions:
            fault = "which is not among the questions"
        elif answer.question_id in answered:
            fault = "a second time"
        elif answer.system != system:
            fault = f"by {answer.system}, in the file of {system}"
        if fault:
            raise BadRecord(f"{where}: {answer.id} answers question {answer.question_id}, {fault}. Run: dvc repro --force answer")
        answered.add(answer.question_id)
    if missing := sorted(questions.keys() - answered):
        raise BadRecord(
            f"{where}: {len(missing)} of {len(questions)} questions have no answer, the first is {missing[0]}; "
            "systems are compared on the same questions. Run: dvc repro --force answer"
        )


def score_answers(questions: dict[str, Question], answers: Sequence[Answer], embedder: Any) -> list[Score]:
    """One Score for each of `answers`, in their order. An answer without a word has similarity 0 and ROUGE-L 0 by definition.

    ROUGE-L: F-measure over lower-case words, no stemming (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").
    Raises BadRecord when a similarity is not a number.
    """
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=Words())
    references = [questions[answer.question_id].reference for answer in answers]
    texts = sorted({answer.text for answer in answers} | set(references))  # each text once, in an order that runs share
    place = {text: row for row, text in enumerate(texts)}
    vectors = embedder.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    scores = []
    for answer, reference in zip(answers, references, strict=True):
        question = questions[answer.question_id]
        similarity = 0.0 if is_empty(answer) else float(vectors[place[answer.text]] @ vectors[place[reference]])
        if not math.isfinite(similarity):
            raise BadRecord(
                f"the similarity of {answer.system}'s answer {answer.id} is {similarity}, not a number; "
                "the embedder is damaged: check models.embedder in params.yaml"
            )
        scores.append(
            Score(
                id=answer.id,
                question_id=question.id,
                set=question.set,
                section_id=question.section_id,
                type=question.type,
                system=answer.system,
                similarity=round(min(1.0, max(-1.0, similarity)), 6),
                rouge_l=round(rouge.score(reference, answer.text)["rougeL"].fmeasure, 6),
            )
        )
    return scores


def is_empty(answer: Answer) -> bool:
    """Whether the system said nothing but spaces."""
    return not answer.text.strip()


def interval(values: Sequence[float], sections: Sequence[str], evaluate: Params) -> Interval:
    """The mean of `values` with its percentile bootstrap interval, drawing whole sections (one name per value).

    Questions on one section stand or fall together, so drawing single questions would make the interval too narrow (Field and
    Welsh 2007, "Bootstrapping clustered data"). One section gives no interval. Raises BadRecord when a value is not a number.
    """
    import numpy
    from scipy.stats import bootstrap

    if not all(map(math.isfinite, values)):
        raise BadRecord("a score is not a number, so there is no mean. Rebuild the scores with: dvc repro --force evaluate")
    by_section: dict[str, list[float]] = defaultdict(list)
    for value, section in zip(values, sections, strict=True):
        by_section[section].append(value)
    mean = round(math.fsum(values) / len(values), 6)
    if len(by_section) == 1:
        return Interval(mean, None, None)
    drawn = bootstrap(
        ([math.fsum(group) for group in by_section.values()], [len(group) for group in by_section.values()]),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,  # a section's sum and its count are drawn together
        vectorized=True,
        n_resamples=evaluate.resamples,
        confidence_level=evaluate.confidence,
        method="percentile",
        rng=numpy.random.default_rng(evaluate.seed),
    ).confidence_interval
    return Interval(mean, round(float(drawn.low), 6), round(float(drawn.high), 6))


def score_set(scores: Sequence[Score], empty: set[str], evaluate: Params) -> SetScores:
    """The scores of one question set: each system's means, and its gain over base and tuned on the same questions.

    `empty` holds the ids of answers without a word. Every system must have scored the same questions.
    """
    by_system: dict[str, list[Score]] = defaultdict(list)
    for score in sorted(scores, key=lambda score: score.question_id):
        by_system[score.system].append(score)
    sections = [score.section_id for score in by_system["base"]]
    systems = in_order(list(by_system))
    return SetScores(
        sections=len(set(sections)),
        systems={
            system: SystemScores(
                n=len(by_system[system]),
                empty=sum(score.id in empty for score in by_system[system]),
                similarity=interval([score.similarity for score in by_system[system]], sections, evaluate),
                rouge_l=interval([score.rouge_l for score in by_system[system]], sections, evaluate),
            )
            for system in systems
        },
        gains={
            f"{system}-{baseline}": interval(
                [one.similarity - other.similarity for one, other in zip(by_system[system], by_system[baseline], strict=True)],
                sections,
                evaluate,
            )
            for place, baseline in enumerate(BASELINES)
            for system in systems[place + 1 :]
        },
    )


def table(name: str, scores: SetScores) -> str:
    """`scores` for the terminal: a line per system, as wide as its longest cell."""
    rows = [COLUMNS, *score_rows(scores)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    sections = f"{scores.sections} sections" if scores.sections > 1 else "1 section, which gives no interval"
    return "\n  ".join([f"{name}, {sections}", *lines])


def main(questions: Path, answers: Path, scores: Path, metrics: Path, evaluate: Params, models: Models) -> None:
    asked = by_id(read_records(questions, Question))
    if not any(question.set == "recall" for question in asked.values()):
        raise BadRecord(f"{questions}: no recall question, so no system can be scored; add documents or raise split.max_recall")
    files = {path.stem: path for path in sorted(answers.glob("*.jsonl"))}
    if absent := [system for system in BASELINES if system not in files]:
        raise BadInput(
            f"{answers}: {absent[0]}.jsonl is missing; base and tuned are what gains are measured against. Run: dvc repro"
        )
    said = []
    for system, path in files.items():
        own = read_records(path, Answer)
        check_answers(asked, system, own, path)
        said += own
    scored = score_answers(asked, said, load_embedder(models.embedder))
    empty = {answer.id for answer in said if is_empty(answer)}
    by_set = {name: [score for score in scored if score.set == name] for name in ("recall", "held_out")}
    board = Scoreboard(
        confidence=evaluate.confidence,
        recall=score_set(by_set["recall"], empty, evaluate),
        held_out=score_set(by_set["held_out"], empty, evaluate) if by_set["held_out"] else None,
    )
    write_records(scores, scored)
    write_json(metrics, board)
    say(f"evaluate: means with {100 * evaluate.confidence:g} % intervals over sections; gains are in similarity")
    for name, one in board.sets().items():
        say(table(name, one))


if __name__ == "__main__":
    run(main)
