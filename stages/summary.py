"""Prints what the last run made: pairs, scores with intervals, the verdict, where the report is, and what to type next."""

from pathlib import Path
from typing import Any

from stages.pages import SETS, dig, read_figures
from stages.program import BadInput, run, say
from stages.scoreboard import Interval, Scoreboard, in_order, read_scoreboard


def short(interval: Interval | None) -> str:
    """A score as `0.71 (0.68 to 0.74)`, without an interval where there is none, and nothing where it was not measured."""
    if interval is None:
        return ""
    mean, *ends = (f"{value:.2f}" for value in (interval.mean, interval.low, interval.high) if value is not None)
    return f"{mean} ({' to '.join(ends)})" if ends else mean


def score_lines(board: Scoreboard) -> list[str]:
    """A line per system with a column per question set, as wide as its longest cell."""
    names = [name for name in SETS if name in board.sets]
    systems = in_order(sorted({system for name in names for system in board.sets[name].systems}))
    rows = [["", *(f"{SETS[name].title}, n={board.sets[name].questions}" for name in names)]]
    for system in systems:
        found = (board.sets[name].systems.get(system) for name in names)
        rows.append(
            [
                system,
                *(short(one.measures.get(SETS[name].measure)) if one else "" for name, one in zip(names, found, strict=True)),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def lines_of(validated: dict[str, Any], board: Scoreboard, report: dict[str, Any]) -> list[str]:
    """The summary's lines, from the metrics of validate, the scoreboard and the report."""
    aside = ", out of scope the share that says so" if "out_of_scope" in board.sets else ""
    return [
        f"{validated['pairs']} pairs kept and {validated['rejected']} of {validated['candidates']} candidates rejected (reports/data_docs/index.html)",
        f"similarity to the reference answer{aside}, with {100 * board.confidence:g} % interval:",
        *score_lines(board),
        f"verdict: {dig(report, 'verdict', 'outcome')}: {dig(report, 'verdict', 'reason')}",
        "report: reports/report.html",
        "next:   make chat   make serve   make promote   make ui",
    ]


def main(reports: Path = Path("reports")) -> None:
    paths = [reports / "metrics/validate.json", reports / "metrics/evaluate.json", reports / "report.json"]
    if missing := [path for path in paths if not path.is_file()]:
        raise BadInput(f"{missing[0]} is missing, so there is nothing to sum up yet. Make it with: make repro")
    for line in lines_of(read_figures(paths[0]), read_scoreboard(paths[1]), read_figures(paths[2])):
        say(line)


if __name__ == "__main__":
    run(main)
