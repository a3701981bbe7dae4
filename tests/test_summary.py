"""summary: the last lines of `make demo`, from what validate and evaluate measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.program import BadInput
from stages.summary import interval, main


def scores(mean: float, low: float | None, high: float | None, n: int) -> dict[str, Any]:
    return {
        "n": n,
        "empty": 0,
        "similarity": {"mean": mean, "low": low, "high": high},
        "rouge_l": {"mean": 0, "low": 0, "high": 0},
    }


def written(folder: Path, scored: dict[str, Any]) -> Path:
    (folder / "validate.json").write_text(json.dumps({"candidates": 500, "pairs": 120, "rejected": 380}))
    (folder / "evaluate.json").write_text(json.dumps(scored))
    return folder


def test_the_summary_says_pairs_scores_and_what_to_type_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recall = {
        "sections": 9,
        "gains": {},
        "systems": {"base": scores(0.5, 0.456, 0.544, 40), "q8_0": scores(0.714, 0.68, 0.748, 40)},
    }
    held_out = {"sections": 1, "gains": {}, "systems": {"base": scores(0.6, None, None, 4)}}
    main(written(tmp_path, {"confidence": 0.95, "recall": recall, "held_out": held_out}))
    assert capsys.readouterr().out.splitlines() == [
        "120 pairs kept and 380 of 500 candidates rejected (reports/data_docs/index.html)",
        "similarity to the reference answer, trained facts in new words, with 95 % interval:",
        "  base     0.50 (0.46 to 0.54)   n=40",
        "  q8_0     0.71 (0.68 to 0.75)   n=40",
        "similarity to the reference answer, sections never trained on, with 95 % interval:",
        "  base     0.60   n=4",
        "report: reports/report.html",
        "next:   make chat   make serve   make promote   make ui",
    ]


def test_the_summary_names_the_confidence_that_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recall = {"sections": 9, "gains": {}, "systems": {"base": scores(0.5, 0.4, 0.6, 40)}}
    main(written(tmp_path, {"confidence": 0.8, "recall": recall}))
    assert "with 80 % interval:" in capsys.readouterr().out


def test_a_set_that_was_not_asked_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recall = {"sections": 9, "gains": {}, "systems": {"base": scores(0.5, 0.4, 0.6, 40)}}
    main(written(tmp_path, {"confidence": 0.95, "recall": recall}))
    assert "never trained on" not in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["validate.json", "evaluate.json"])
def test_without_a_finished_run_it_says_how_to_make_one(missing: str, tmp_path: Path) -> None:
    (written(tmp_path, {}) / missing).unlink()
    with pytest.raises(BadInput, match=r"has no scores yet\. Make them with: make repro$"):
        main(tmp_path)


def test_a_negative_score_keeps_its_sign() -> None:
    assert interval({"mean": -0.126, "low": -0.2, "high": 0.05}) == "-0.13 (-0.20 to 0.05)"
