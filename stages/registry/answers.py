"""What every system answered, as a table that MLflow's pages show beside a run, and from which a version's answers can be read again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stages.records import Answer, Question, Score, content_id
from stages.scoreboard import MEASURES, SETS, in_order

PATH = "answers.json"  # the same in every run: MLflow's pages set tables of one name side by side
COLUMNS = ("question", "system", "answer", "reference", *MEASURES, "set", "type", "section_id", "question_id")


def table_of(questions: Mapping[str, Question], answers: Sequence[Answer], scores: Mapping[str, Score]) -> dict[str, Any]:
    """COLUMNS and a row per answer, the answers to one question below each other; `scores` by the answers' ids."""
    place = {system: number for number, system in enumerate(in_order(sorted({answer.system for answer in answers})))}

    def order(answer: Answer) -> tuple[int, str, int]:
        return SETS.index(questions[answer.question_id].set), answer.question_id, place[answer.system]

    rows = []
    for answer in sorted(answers, key=order):
        fields = msgspec.structs.asdict(questions[answer.question_id]) | msgspec.structs.asdict(scores[answer.id])
        rows.append([(fields | {"answer": answer.text})[column] for column in COLUMNS])
    return {"columns": list(COLUMNS), "data": rows}


def log_table(client: Any, run_id: str, table: dict[str, Any]) -> dict[str, str]:
    """Keeps `table` as an artifact of the run, in the place of an older one. Gives the tags by which `kept_answers` finds it again."""
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

    client.log_text(run_id, json.dumps(table), PATH)  # not client.log_table, which adds the rows once more
    client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([{"path": PATH, "type": "table"}]))
    return {"answers": f"runs:/{run_id}/{PATH}", "answers_sha256": _digest(table)}


def kept_answers(tags: Mapping[str, str]) -> list[Answer]:
    """What the shipped file of the version with these tags answered when it was scored; [] where that table is gone."""
    import mlflow
    from mlflow.exceptions import MlflowException

    if "answers" not in tags:
        return []
    try:
        table = mlflow.artifacts.load_dict(tags["answers"])
    except (MlflowException, OSError):  # deleted, or on the disk of the machine that promoted it
        return []
    if _digest(table) != tags["answers_sha256"]:  # by another version of the same run
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


def _digest(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()
