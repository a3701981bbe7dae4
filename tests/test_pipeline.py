"""The real thing: `dvc repro` on a corpus of three pages, with the real models, from collect to report, and what follows it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Finished
from small_project import SECRET, call

from stages.files import sha256_of_file
from stages.scoreboard import read_scoreboard

STAGES = [
    "collect@pages",
    "ingest",
    "chunk",
    "generate",
    "judge",
    "measure",
    "validate",
    "coverage",
    "split",
    "dataset",
    "exam",
    "train",
    "export",
    "answer",
    "evaluate",
    "report",
]


@pytest.fixture(scope="module")
def project(finished: Finished) -> Path:
    """A copy of the repository with three pages of its own, after `dvc repro`."""
    ran = [line.split("'")[1] for line in finished.said.splitlines() if line.startswith("Running stage")]
    assert ran == STAGES
    return finished.project


def metrics(project: Path, stage: str) -> dict[str, object]:
    return json.loads((project / f"reports/metrics/{stage}.json").read_text(encoding="utf-8"))


def test_a_second_repro_runs_no_stage_and_status_is_clean(project: Path) -> None:
    again = call(project, "dvc", "repro")
    assert again.returncode == 0
    assert "Running stage" not in again.stdout
    assert "up to date" in call(project, "dvc", "status").stdout


def test_every_candidate_is_a_pair_or_rejected_and_every_call_is_accounted_for(project: Path) -> None:
    generated, validated = metrics(project, "generate"), metrics(project, "validate")
    assert generated["calls"] == generated["accepted"] + generated["rejected"] + generated["failed"] > 0  # type: ignore[operator]
    assert generated["accepted"] >= 0.9 * generated["calls"]  # type: ignore[operator]
    assert generated["candidates"] > generated["calls"]  # type: ignore[operator]  # several wordings in a call
    assert generated["candidates"] == validated["candidates"] == validated["pairs"] + validated["rejected"]


def test_the_judge_is_off_and_nothing_that_was_judged_counts(project: Path) -> None:
    assert metrics(project, "judge") == {"used": False, "why": "judge.enabled is false"}
    assert (project / "data/judgements.jsonl").read_bytes() == b""
    rated = {"used": False, "why": "judge.enabled is false", "asked": 0, "scored": 0, "unparsed": 0, "failed": 0}
    assert metrics(project, "evaluate")["judge"] == rated


def test_every_section_is_on_the_map_and_most_have_a_pair(project: Path) -> None:
    covered = metrics(project, "coverage")
    assert covered["sections"] == 6  # three pages with two each
    assert covered["covered"] >= 5  # type: ignore[operator]


def test_every_pair_leads_back_to_the_words_of_its_page(project: Path) -> None:
    pairs = [json.loads(line) for line in (project / "data/pairs.jsonl").open(encoding="utf-8")]
    assert pairs
    for pair in pairs:
        page = (project / "pages" / pair["path"]).read_text(encoding="utf-8")
        assert " ".join(page[pair["quote_start"] : pair["quote_end"]].split()) == pair["quote"]


def test_a_secret_of_a_page_is_reported_and_reaches_no_pair_report_or_model_data(project: Path) -> None:
    assert metrics(project, "ingest")["findings"] == {"secret": 1}
    after = [
        "pairs.jsonl",
        "rejected.jsonl",
        "train.jsonl",
        "dev.jsonl",
        "questions.jsonl",
        "exam.jsonl",
        "findings.jsonl",
        "dataset",
        "answers",
    ]
    paths = [project / "data" / name for name in after] + [project / "reports", project / "models/gguf"]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    assert len(files) > 20
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]


def test_no_question_has_a_near_duplicate_in_training(project: Path) -> None:
    cluster = {pair["id"]: pair["cluster"] for pair in map(json.loads, (project / "data/pairs.jsonl").open(encoding="utf-8"))}
    trained = {
        cluster[name]
        for row in map(json.loads, (project / "data/train.jsonl").open(encoding="utf-8"))
        for name in row["pair_ids"]
    }
    asked = {cluster[row["pair_id"]] for row in map(json.loads, (project / "data/questions.jsonl").open(encoding="utf-8"))}
    assert trained and asked and not trained & asked


def test_training_lowers_the_loss(project: Path) -> None:
    rows = (project / "reports/curves/train.csv").read_text(encoding="utf-8").splitlines()[1:]
    trained = [float(row.split(",")[1]) for row in rows]
    assert len(trained) >= 6
    assert sum(trained[-3:]) < sum(trained[:3])


def test_the_scored_gguf_is_the_shipped_one_and_its_checksum_holds(project: Path) -> None:
    checked = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=project / "models/gguf", capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
    assert "docsmith-q8_0.gguf: OK" in checked.stdout
    board = read_scoreboard(project / "reports/metrics/evaluate.json")
    assert sorted(board.sets["recall"].systems) == ["base", "q8_0", "tuned", "tuned_rag"]
    assert board.models["q8_0"] == sha256_of_file(project / "models/gguf/docsmith-q8_0.gguf")


def test_the_report_shows_every_system(project: Path) -> None:
    report = (project / "reports/report.md").read_text(encoding="utf-8")
    assert all(name in report for name in ("base", "tuned", "q8_0"))
    assert len(report) < 65_536


def test_promote_registers_one_version_and_a_second_time_none(project: Path) -> None:
    first = call(project, sys.executable, "-m", "stages.promote")
    assert first.returncode == 0, first.stderr
    again = call(project, sys.executable, "-m", "stages.promote")
    assert again.returncode == 0, again.stderr
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    uri = f"sqlite:///{project}/models/mlflow.db"
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    versions = client.search_model_versions("name='docsmith'")
    assert [version.version for version in versions] in (["1"], [1])
    assert "challenger" in client.get_registered_model("docsmith").aliases


def test_an_edited_page_is_noticed_and_asks_only_about_what_is_new(project: Path) -> None:
    page = project / "pages/lamp.md"
    page.write_text(page.read_text(encoding="utf-8").replace("USB-C cable", "magnetic cable"), encoding="utf-8")
    assert "collect@pages" in call(project, "dvc", "status").stdout
    before = metrics(project, "generate")
    done = call(project, "dvc", "repro", "generate")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if " reused, " in line)
    reused, asked = _counts(line)
    assert 0 < asked <= before["calls"] / 3  # type: ignore[operator]
    assert reused == metrics(project, "generate")["calls"] - asked  # type: ignore[operator]


def test_a_decision_of_a_reviewer_is_applied_by_the_next_repro_without_a_call(project: Path) -> None:
    from stages.records import Decision, Pair, content_id, read_records, write_records

    assert call(project, "dvc", "repro", "validate").returncode == 0
    pair = read_records(project / "data/pairs.jsonl", Pair)[0]
    kept = {name: getattr(pair, name) for name in ("chunk_id", "question", "answer", "quote", "type")}
    write_records(project / "data/review.jsonl", [Decision(id=content_id(pair.question, pair.answer), verdict="reject", **kept)])
    done = call(project, "dvc", "repro", "validate")
    assert done.returncode == 0, done.stderr
    assert "Running stage 'generate'" not in done.stdout and "Running stage 'validate'" in done.stdout
    assert metrics(project, "validate")["review"] == {"accepted": 0, "edited": 0, "rejected": 1, "stale": 0}
    assert pair.id not in {one.id for one in read_records(project / "data/pairs.jsonl", Pair)}


def _counts(line: str) -> tuple[int, int]:
    found = re.search(r"\((\d+) reused, (\d+) generated", line)
    assert found is not None, line
    return int(found[1]), int(found[2])
