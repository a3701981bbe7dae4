"""scoreboard: what tables and sentences show of it, and files that are none."""

from pathlib import Path

import pytest
from msgspec import to_builtins

from stages.files import write_json
from stages.program import BadInput
from stages.scoreboard import (
    COLUMNS,
    Comparison,
    Interval,
    Scoreboard,
    SetScores,
    SystemScores,
    brief,
    figure,
    in_order,
    read_scoreboard,
    score_rows,
    show,
)

MEAN = Interval(0.5, 0.25, 0.75)
SETS = {
    "recall": SetScores(
        questions=4,
        sections=2,
        systems={
            "tuned": SystemScores(
                4, 0, {"similarity": MEAN, "judge": Interval(4.5, 4.0, 5.0), "passed": Interval(1.0, None, None)}
            ),
            "base": SystemScores(4, 1, {"similarity": Interval(0.25, 0.0, 0.5), "rouge_l": MEAN}),
        },
        comparisons={"tuned-base": Comparison(4, 2, {"similarity": Interval(0.25, -0.0001, 0.5)}, 0.375, 2, 1, 0.625)},
        by_type={},
    )
}
BOARD = Scoreboard(0.95, 1, SETS, {"base": "b", "tuned": "t"}, "q", "c", ())


def test_a_row_has_a_cell_for_each_column_and_none_for_what_was_not_measured() -> None:
    rows = score_rows(SETS["recall"])
    assert all(len(row) == len(COLUMNS) for row in rows)
    base, tuned = (dict(zip(COLUMNS, row, strict=True)) for row in rows)
    assert (base["system"], base["empty"], base["ROUGE-L"], base["over base"]) == ("base", "1", "0.500 [0.250 to 0.750]", "")
    assert (tuned["judge"], base["judge"]) == ("4.500 [4.000 to 5.000]", "")
    assert (tuned["passed"], tuned["ROUGE-L"], tuned["over base"]) == ("1.000", "", "0.250 [0.000 to 0.500]")


def test_systems_stand_in_one_order() -> None:
    assert in_order(["q8_0", "tuned", "oracle", "base"]) == ["base", "tuned", "oracle", "q8_0"]


def test_an_interval_names_its_confidence_and_one_section_gives_a_mean_alone() -> None:
    assert show(MEAN, 0.9) == "0.500 (90 % 0.250 to 0.750)" and brief(MEAN) == "0.500 [0.250 to 0.750]"
    assert show(Interval(0.5, None, None), 0.9) == brief(Interval(0.5, None, None)) == "0.500"
    assert figure(-0.0004) == "0.000"


def test_a_scoreboard_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate.json", BOARD)
    assert read_scoreboard(tmp_path / "evaluate.json") == BOARD


def test_a_scoreboard_from_before_answers_were_rated_can_be_read(tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate.json", {name: value for name, value in to_builtins(BOARD).items() if name != "judge"})
    assert read_scoreboard(tmp_path / "evaluate.json").judge.used is False


@pytest.mark.parametrize("text", ["", "{}", '{"confidence": 0.95, "recall": {}}'])
def test_a_missing_or_strange_file_is_no_scoreboard(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadInput, match="is missing, so there are no scores"):
        read_scoreboard(tmp_path / "evaluate.json")
    (tmp_path / "evaluate.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match="is not a scoreboard"):
        read_scoreboard(tmp_path / "evaluate.json")


def test_a_scoreboard_of_nan_is_none(tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate.json", BOARD)
    text = (tmp_path / "evaluate.json").read_text()
    for number in ("NaN", "null", "Infinity"):
        (tmp_path / "evaluate.json").write_text(text.replace('"mean": 0.25', f'"mean": {number}'))
        with pytest.raises(BadInput, match="is not a scoreboard"):
            read_scoreboard(tmp_path / "evaluate.json")
