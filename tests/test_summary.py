"""summary: the last lines of `make demo`, from what validate, evaluate and report wrote."""

from pathlib import Path

import msgspec
import pytest
from finished_run import MEANS, scoreboard, write_run, write_scores

from stages.program import BadInput
from stages.scoreboard import Interval
from stages.summary import main, score_lines, short


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    write_run(tmp_path)
    (tmp_path / "reports/report.json").write_text('{"verdict": {"outcome": "reject", "reason": "it lost too much"}}')
    return tmp_path / "reports"


def test_the_summary_says_pairs_scores_verdict_and_what_to_type_next(reports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(reports)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "456 pairs kept and 778 of 1234 candidates rejected (reports/data_docs/index.html)",
        "similarity to the reference answer, out of scope the share that says so, with 95 % interval:",
        "             Recall, n=6          Held-out sections, n=3  Gold, n=4            Out of scope, n=3    General, n=2",
    ]
    assert lines[3] == (
        "  base       0.61 (0.57 to 0.65)  0.31 (0.27 to 0.35)     0.51 (0.47 to 0.55)  0.61 (0.57 to 0.65)  0.63 (0.59 to 0.67)"
    )
    assert [line.split()[0] for line in lines[3:10]] == list(MEANS)
    assert lines[10:] == [
        "verdict: reject: it lost too much",
        "report: reports/report.html",
        "next:   make chat   make serve   make promote   make ui",
    ]
    assert max(map(len, lines)) <= 130


def test_the_summary_names_the_confidence_that_was_measured(reports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scores(reports.parent, msgspec.structs.replace(scoreboard("recall"), confidence=0.8))
    main(reports)
    assert "similarity to the reference answer, with 80 % interval:" in capsys.readouterr().out


def test_a_set_that_was_not_asked_has_no_column_and_a_score_that_is_missing_an_empty_cell() -> None:
    board = scoreboard("recall", "gold")
    del board.sets["recall"].systems["base"], board.sets["recall"].systems["tuned"].measures["similarity"]
    head, base, tuned, *_ = score_lines(board)
    assert head.split() == ["Recall,", "n=6", "Gold,", "n=4"]
    assert base.split() == ["base", "0.51", "(0.47", "to", "0.55)"] and base.index("0.51") == head.index("Gold")
    assert tuned.split()[:2] == ["tuned", "0.68"]


@pytest.mark.parametrize("missing", ["metrics/validate.json", "metrics/evaluate.json", "report.json"])
def test_without_a_finished_run_it_says_how_to_make_one(missing: str, reports: Path) -> None:
    (reports / missing).unlink()
    with pytest.raises(BadInput, match=rf"{missing} is missing, .*Make it with: make repro$"):
        main(reports)


def test_a_negative_score_keeps_its_sign_and_one_section_has_no_interval() -> None:
    assert short(Interval(-0.126, -0.2, 0.05)) == "-0.13 (-0.20 to 0.05)"
    assert (short(Interval(0.6, None, None)), short(None)) == ("0.60", "")
