"""What every system answered, as a table that MLflow's pages show beside a run, and from which a version's answers can be read again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stages.records import Answer, Question, Score, content_id
from stages.scoreboard import MEASURES, in_order

COLUMNS = ("set", "question", "reference", "system", "answer", *MEASURES, "type", "section_id", "question_id")


def table_of(questions: Mapping[str, Question], answers: Sequence[Answer], scores: Mapping[str, Score]) -> dict[str, Any]:
    """COLUMNS and a row per answer, the answers to one question below each other; `scores` by the answers' ids."""
    place = {system: number for number, system in enumerate(in_order(sorted({answer.system for answer in answers})))}

    def order(answer: Answer) -> tuple[str, str, int]:
        return questions[answer.question_id].set, answer.question_id, place[answer.system]

    rows = []
    for answer in sorted(answers, key=order):
        fields = msgspec.structs.asdict(questions[answer.question_id]) | msgspec.structs.asdict(scores[answer.id])
        rows.append([(fields | {"answer": answer.text})[column] for column in COLUMNS])
    return {"columns": list(COLUMNS), "data": rows}


def log_table(client: Any, run_id: str, table: dict[str, Any]) -> str:
    """Keeps `table` as an artifact of the run, and gives its path, which is the same for the same table: none is there twice."""
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

    text = json.dumps(table, ensure_ascii=False)
    path = f"answers/{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    client.log_text(run_id, text, path)  # not client.log_table, which adds the rows once more
    known = json.loads(client.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
    entry = {"path": path, "type": "table"}
    if entry not in known:
        client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*known, entry]))
    return path


def kept_answers(tags: Mapping[str, str]) -> list[Answer]:
    """What the shipped file of the version with these tags answered when it was scored; [] where the table is gone."""
    import mlflow
    from mlflow.exceptions import MlflowException

    if "answers" not in tags:
        return []
    try:
        table = mlflow.artifacts.load_dict(tags["answers"])
    except (MlflowException, OSError):  # deleted, or on the disk of the machine that promoted it
        return []
    rows = (dict(zip(table["columns"], row, strict=True)) for row in table["data"])
    return [
        Answer(
            id=content_id(row["question_id"], tags["quant"]),
            question_id=row["question_id"],
            system=tags["quant"],
            text=row["answer"],
        )
        for row in rows
        if row["system"] == tags["quant"]
    ]
