"""walkthrough: the notebook is committed without outputs, and runs from top to bottom on a finished run."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import Finished
from small_project import PAGES, call

from stages.scoreboard import read_scoreboard

NOTEBOOK = Path(__file__).parents[1] / "notebooks/walkthrough.ipynb"
MOST_LINES = 16


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_valid_and_holds_no_outputs() -> None:
    notebook = read()
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) >= 9 and all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_a_cell_is_a_few_lines_that_call_the_stages() -> None:
    cells = [cell.source for cell in read().cells if cell.cell_type == "code"]
    assert all(len(cell.splitlines()) <= MOST_LINES for cell in cells)
    assert sum("from stages." in cell for cell in cells) >= 4
    assert not any(word in cell for cell in cells for word in ("def ", "class ", "lambda ", "!", "%matplotlib"))


def test_the_notebook_runs_and_shows_plots_an_answer_and_the_paragraph_behind_it(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    before = call(finished.project, "git", "status", "--short").stdout
    notebook = read()
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(finished.project)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in one for one in shown) == 3  # data, training, scores
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    board = read_scoreboard(finished.project / "reports/metrics/evaluate.json")
    assert {"base", "tuned", "q8_0"} <= set(board.sets["recall"].systems)
    question = printed.partition("question  ")[2].splitlines()[0]
    assert question.endswith("?") and f"q8_0> {question}\n" in printed
    answer = printed.partition(f"q8_0> {question}\n")[2].strip()
    assert answer
    lineage = shown[-1]["text/html"]
    assert any(f"data/raw/pages/{name}" in lineage for name in PAGES) and "SHA-256" in lineage
    evidence = printed.partition("evidence  ")[2].partition(": ")[2].splitlines()[0]
    assert evidence in " ".join(
        lineage.split()
    )  # of a trained question, the nearest source is the evidence that it was trained on
    assert call(finished.project, "git", "status", "--short").stdout == before
