"""data/exam.jsonl + data/chunks.jsonl + data/answers/<system>.jsonl -> data/scores.jsonl + reports/metrics/evaluate.json

Scores every system on the same questions, set by set, with bootstrap intervals over sections and paired comparisons with base and
tuned, and looks for the questions in data/train.jsonl and for secrets in the answers. 1,000 answers take under a minute on two shared
cores. No language model is called unless judge.enabled is true: then the judge of the stage `judge` rates each answer to a question
with a passage, a call each.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from stages.executor import Executor
from stages.files import sha256_of_file, write_json
from stages.judging import Exhibit, Judged, Judging, exhibit_of, judged
from stages.likeness import repeats
from stages.models import load_embedder
from stages.params import Models
from stages.program import BadInput, BadRecord, run, say
from stages.records import Answer, Chunk, Example, Question, Score, by_id, read_records, write_records
from stages.scoreboard import (
    BASELINES,
    COLUMNS,
    SETS,
    Rated,
    Scoreboard,
    SetScores,
    SystemScores,
    figure,
    in_order,
    score_rows,
)
from stages.scoring import Sampling, Scoring, compare, is_empty, means, score_answers
from stages.screening import secrets_in

UNTRAINED = ("base", "base_rag", "oracle")  # by a model that others made
PARTIAL = "oracle"  # sees the passage that holds the quote, so it answers only the questions that have one


class Asked(msgspec.Struct, frozen=True):
    """What reports/metrics/answer.json says of who was asked what."""

    systems: dict[str, "Model"]
    chat_sha256: str
    questions_sha256: str


class Model(msgspec.Struct, frozen=True):
    """The file or folder that answered for a system."""

    sha256: str


def read_asked(path: Path, questions: Path) -> Asked:
    """What the stage `answer` noted. Raises BadInput when that is missing, or when it put other questions than those in `questions`."""
    if not path.is_file():
        raise BadInput(f"{path} is missing, so nothing says who answered. Run: dvc repro --force answer")
    try:
        asked = msgspec.json.decode(path.read_bytes(), type=Asked)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BadInput(f"{path} does not say who answered: {error}. Run: dvc repro --force answer") from None
    if (found := sha256_of_file(questions)) != asked.questions_sha256:
        raise BadInput(
            f"{path}: the answers are to questions with SHA-256 {asked.questions_sha256[:12]}, and {questions} has {found[:12]}. Run: dvc repro"
        )
    return asked


def check_answers(questions: dict[str, Question], system: str, answers: Sequence[Answer], where: Path) -> None:
    """Raises BadRecord unless `answers` holds one answer of `system` to each of `questions` (by id), and nothing else.

    The system `oracle` may leave questions out, but not all.
    """
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
    if (missing := sorted(questions.keys() - answered)) and (system != PARTIAL or not answered):
        raise BadRecord(
            f"{where}: {len(missing)} of {len(questions)} questions have no answer, the first is {missing[0]}; "
            "systems are compared on the same questions. Run: dvc repro --force answer"
        )


def leaks(questions: Iterable[Question], examples: Iterable[Example]) -> tuple[str, ...]:
    """Sorted ids of the questions that a user of `examples` asks, word for word or nearly: the model may know their answers by heart."""
    asked = list(questions)
    trained = [turn.content for example in examples for turn in example.messages if turn.role == "user"]
    return tuple(sorted(asked[place].id for place in repeats([one.question for one in asked], trained)))


def given_away(answers: Iterable[Answer]) -> tuple[str, ...]:
    """Sorted ids of the answers in which the tuned model, or a file of it, says a secret: one that was trained, or read in a passage."""
    return tuple(sorted(one.id for one in answers if one.system not in UNTRAINED and secrets_in(one.text)))


def exhibits_of(answers: Sequence[Answer], questions: Mapping[str, Question], chunks: Mapping[str, Chunk]) -> dict[str, Exhibit]:
    """What a judge is shown of each answer with a word to a question with a passage, by the answer's id.

    Raises BadInput when the passage of a question is not among `chunks`.
    """
    exhibits = {}
    for answer in answers:
        question = questions[answer.question_id]
        if question.chunk_id and question.chunk_id not in chunks:
            raise BadInput(
                f"question {question.id} names chunk {question.chunk_id}, which is not among the {len(chunks)} chunks. Run: dvc repro"
            )
        if question.chunk_id and not is_empty(answer):
            exhibits[answer.id] = exhibit_of(question.question, answer.text, chunks[question.chunk_id])
    return exhibits


def ratings_of(found: Judged, answers: Sequence[Answer], questions: Mapping[str, Question]) -> dict[str, float]:
    """The mean of faithfulness and usefulness, 1 to 5, by answer; replies without ratings and questions without a passage give none.

    An answer without a word gets 1: it helps nobody, and a judge may find nothing unfaithful in it.
    """
    if not found.used:
        return {}
    # answerability is left out: it rates the question and its passage, which are the same for every system
    scored = {
        one.id: (one.faithfulness + one.usefulness) / 2
        for one in found.judgements
        if one.faithfulness is not None and one.usefulness is not None
    }
    return scored | {one.id: 1.0 for one in answers if is_empty(one) and questions[one.question_id].chunk_id}


def score_set(scores: Sequence[Score], empty: set[str], sampling: Sampling, is_part: bool = False) -> SetScores:
    """The scores of one question set: each system's means, and what it gains over base and tuned on the questions both answered.

    `empty` holds the ids of answers without a word. `is_part` leaves out the questions that base did not pass as a set of their own.
    """
    by_system: dict[str, list[Score]] = defaultdict(list)
    for score in sorted(scores, key=lambda score: score.question_id):
        by_system[score.system].append(score)
    systems = in_order(list(by_system))
    compared = {
        f"{system}-{baseline}": compare(by_system[system], by_system[baseline], sampling)
        for place, baseline in enumerate(BASELINES)
        for system in systems[place + 1 :]
    }
    by_type = {
        kind: {
            system: one["similarity"]
            for system in systems
            if "similarity" in (one := means([score for score in by_system[system] if score.type == kind], sampling))
        }
        for kind in sorted({score.type for score in scores})
    }
    unknown = {score.question_id for score in by_system["base"] if not score.passed}
    return SetScores(
        questions=len({score.question_id for score in scores}),
        sections=len({score.section_id for score in scores}),
        systems={
            system: SystemScores(
                n=len(by_system[system]),
                empty=sum(score.id in empty for score in by_system[system]),
                measures=means(by_system[system], sampling),
            )
            for system in systems
        },
        comparisons={name: found for name, found in compared.items() if found},
        by_type={kind: found for kind, found in by_type.items() if found},
        unknown=score_set([score for score in scores if score.question_id in unknown], empty, sampling, is_part=True)
        if unknown and not is_part
        else None,
    )


def table(name: str, scores: SetScores) -> str:
    """`scores` for the terminal: a line per system, without the columns in which no system has a figure, and what training changed."""
    columns = [column for column in zip(COLUMNS, *score_rows(scores), strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    found = scores.comparisons["tuned-base"]
    shown = f"= {figure(found.p)}" if found.p >= 0.001 else "< 0.001"
    lines.append(
        f"tuned passed {found.won} that base did not, and base {found.lost} that tuned did not (exact McNemar p {shown})"
        + (f"; the least gain to be seen is {figure(found.minimum_effect)}" if found.minimum_effect is not None else "")
    )
    sections = f"{scores.sections} sections" if scores.sections > 1 else "1 section, which gives no interval"
    asked = "1 question" if scores.questions == 1 else f"{scores.questions} questions"
    return "\n  ".join([f"{name}, {asked}, {sections}", *lines])


def main(
    exam: Path,
    chunks: Path,
    train: Path,
    answers: Path,
    asked: Path,
    store: Path,
    scores: Path,
    metrics: Path,
    *,
    evaluate: Scoring,
    judge: Judging,
    models: Models,
    executor: Executor,
) -> None:
    questions = by_id(read_records(exam, Question))
    if not any(question.set == "recall" for question in questions.values()):
        raise BadRecord(f"{exam}: no recall question, so no system can be scored; add documents or raise split.max_recall")
    noted = read_asked(asked, exam)
    files = {path.stem: path for path in sorted(answers.glob("*.jsonl"))}
    if absent := [system for system in BASELINES if system not in files]:
        raise BadInput(
            f"{answers}: {absent[0]}.jsonl is missing; base and tuned are what gains are measured against. Run: dvc repro"
        )
    if unnamed := sorted(files.keys() ^ noted.systems.keys()):
        raise BadInput(f"{answers} and {asked} name different systems, such as {unnamed[0]}. Run: dvc repro --force answer")
    said = []
    for system, path in files.items():
        own = read_records(path, Answer)
        check_answers(questions, system, own, path)
        said += own
    exhibits = exhibits_of(said, questions, by_id(read_records(chunks, Chunk))) if judge.enabled else {}
    # before the embedder is loaded, which would share a GPU with the judge
    found = judged(exhibits, judge, models.teacher, store, executor)
    ratings = ratings_of(found, said, questions)
    scored = score_answers(questions, said, load_embedder(models.embedder), evaluate.pass_similarity, ratings)
    empty = {answer.id for answer in said if is_empty(answer)}
    by_set = {name: [score for score in scored if score.set == name] for name in SETS}
    board = Scoreboard(
        confidence=evaluate.confidence,
        seed=evaluate.seed,
        sets={name: score_set(found, empty, evaluate) for name, found in by_set.items() if found},
        models={system: noted.systems[system].sha256 for system in in_order(list(files))},
        questions_sha256=noted.questions_sha256,
        chat_sha256=noted.chat_sha256,
        leaks=leaks(questions.values(), read_records(train, Example)),
        secrets=given_away(said),
        judge=Rated(used=found.used, why=found.why, **found.counts()),
    )
    write_records(scores, scored)
    write_json(metrics, board)
    say(f"evaluate: judge: {found.said('answer')}")
    say(f"evaluate: means with {100 * evaluate.confidence:g} % intervals over sections; gains are in similarity")
    for name, one in board.sets.items():
        say(table(name, one))
    if board.secrets:
        say(
            f"evaluate: {len(board.secrets)} answers of the tuned model hold a secret, the first is {board.secrets[0]}; it cannot be promoted"
        )
    if board.leaks:
        say(
            f"evaluate: {len(board.leaks)} of {len(questions)} questions stand in the training data, the first is {board.leaks[0]}: "
            f"{questions[board.leaks[0]].question!r}; no model can be promoted by them"
        )


if __name__ == "__main__":
    run(main)
