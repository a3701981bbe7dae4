"""Prints what the last run made: pairs, scores with intervals, where the report is, and what to type next."""

import json
from pathlib import Path
from typing import Any

from stages.program import BadInput, run, say


def interval(figure: dict[str, Any]) -> str:
    """A score as `0.71 (0.68 to 0.74)`; an interval that could not be computed is left out."""
    if figure["low"] is None:
        return f"{figure['mean']:.2f}"
    return f"{figure['mean']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def lines_of(validated: dict[str, Any], scored: dict[str, Any]) -> list[str]:
    """The summary's lines, from the metrics of validate and evaluate."""
    lines = [
        f"{validated['pairs']} pairs kept and {validated['rejected']} of {validated['candidates']} candidates rejected (reports/data_docs/index.html)"
    ]
    for name, title in (("recall", "trained facts in new words"), ("held_out", "sections never trained on")):
        if name not in scored:
            continue
        lines.append(f"similarity to the reference answer, {title}, with {100 * scored['confidence']:g} % interval:")
        for system, figures in scored[name]["systems"].items():
            lines.append(f"  {system:<8} {interval(figures['similarity'])}   n={figures['n']}")
    lines += ["report: reports/report.html", "next:   make chat   make serve   make promote   make ui"]
    return lines


def main(metrics: Path = Path("reports/metrics")) -> None:
    paths = [metrics / "validate.json", metrics / "evaluate.json"]
    if not all(path.is_file() for path in paths):
        raise BadInput(f"{metrics} has no scores yet. Make them with: make repro")
    validated, scored = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    for line in lines_of(validated, scored):
        say(line)


if __name__ == "__main__":
    run(main)
