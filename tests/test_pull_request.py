"""A pull request from end to end: a run is committed and pushed, a branch edits one page, and the workflows' own steps do the rest.

The steps are read from the workflow files and run in clones of a bare git remote, with a DVC remote that is a folder.
"""

import os
import re
import stat
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Finished
from markdown_it import MarkdownIt
from small_project import call, succeed
from test_ci import GITLAB, ROOT, steps_of

pytestmark = pytest.mark.timeout(2400)  # run alone, the first test waits for two runs of the pipeline
PULL_REQUEST, TRAIN = (steps_of(ROOT / f".github/workflows/{name}.yml") for name in ("pull-request", "train"))
POSTED = """#!/usr/bin/env python3
\"\"\"Stands in for gh and curl: keeps what is posted, as the services would, and refuses what they refuse.\"\"\"
import os, pathlib, re, sys
given = " ".join(sys.argv[1:])
file = re.search(r"--body-file (\\S+)|body@(\\S+)", given)
if file:
    body = pathlib.Path(file[1] or file[2]).read_text(encoding="utf-8")
    if not 0 < len(body) <= 65536:
        sys.exit("the comment is empty or too long")
    pathlib.Path(os.environ["POSTED"]).write_text(given + "\\n" + body, encoding="utf-8")
"""


class Runner(NamedTuple):
    """A machine that runs workflow steps in a clone: what a step adds to GITHUB_PATH, summary and outputs is kept in `root`."""

    root: Path
    clone: Path

    def run(self, shell: str, **more: str) -> "str":
        """What the step prints. A failure is the test's."""
        done = self.attempt(shell, **more)
        assert done[0] == 0, done[1]
        return done[1]

    def attempt(self, shell: str, **more: str) -> tuple[int, str]:
        """Exit code and output of the step, with the shell and the variables that GitHub gives it."""
        names = {"GITHUB_PATH": "path", "GITHUB_STEP_SUMMARY": "summary", "GITHUB_OUTPUT": "output", "POSTED": "posted"}
        files = {name: self.root / file for name, file in names.items()}
        files["GITHUB_PATH"].touch()
        paths = [str(self.root / "bin"), *files["GITHUB_PATH"].read_text().split()]
        known = {
            "GITHUB_BASE_REF": "main",
            "GITHUB_REF_NAME": "edit",
            "GITHUB_RUN_ID": "7",
            "GITHUB_RUN_ATTEMPT": "1",
            "GITHUB_SERVER_URL": "https://github.example",
            "GITHUB_REPOSITORY": "team/docs",
            "HEAD_SHA": "abc123",
            "NUMBER": "12",
            "DEFAULT_BRANCH": "main",
            "SETTINGS": "",
            "PATH": os.pathsep.join([*paths, os.environ["PATH"]]),
        }
        variables = known | {name: str(file) for name, file in files.items()} | more
        done = call(self.clone, "bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", shell, **variables)
        return done.returncode, done.stdout + done.stderr

    def read(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf-8")


def runner(finished: Finished, root: Path, branch: str) -> Runner:
    """A fresh clone of `branch`, where `make setup` finds its work done: .venv is made of links to this Python's environment."""
    clone = root / "clone"
    succeed(root, "git", "clone", "--quiet", "--branch", branch, str(finished.git_remote), str(clone))
    (clone / ".venv").mkdir()
    for part in Path(sys.prefix).iterdir():
        (clone / ".venv" / part.name).symlink_to(part)
    for profile in ("cpu", "gpu"):
        (clone / f".venv/.ready-{profile}").touch()
    (root / "bin").mkdir()
    for name in ("gh", "curl"):
        (root / "bin" / name).write_text(POSTED)
        (root / "bin" / name).chmod(stat.S_IRWXU)
    return Runner(root, clone)


@pytest.fixture(scope="module")
def edited(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A colleague's clone in which the branch `edit` was made: one page edited, `dvc repro`, committed and pushed as the handbook says."""
    clone = tmp_path_factory.mktemp("colleague") / "clone"
    succeed(clone.parent, "git", "clone", "--quiet", str(finished.git_remote), str(clone))
    succeed(clone, "dvc", "pull", "--quiet")
    assert "Running stage" not in succeed(clone, "dvc", "repro")
    for kept in ("data/store", "models/cache"):  # not versioned: without them the teacher would be asked everything again
        succeed(clone, "cp", "-r", str(finished.project / kept), kept)
    succeed(clone, "git", "checkout", "--quiet", "-b", "edit")
    page = clone / "pages/lamp.md"
    page.write_text(page.read_text(encoding="utf-8").replace("nine hours", "eleven hours"), encoding="utf-8")
    said = succeed(clone, "dvc", "repro")
    assert "Running stage 'generate'" in said and "Running stage 'report'" in said
    succeed(clone, "git", "add", "dvc.lock", "reports", "pages")
    succeed(clone, "git", "commit", "--quiet", "--message", "The battery lasts eleven hours")
    assert succeed(clone, "git", "status", "--porcelain") == ""
    succeed(clone, "git", "push", "--quiet", "origin", "edit")
    succeed(clone, "dvc", "push", "--quiet")
    return clone


def test_the_report_job_checks_fetches_compares_and_comments(finished: Finished, edited: Path, tmp_path: Path) -> None:
    machine = runner(finished, tmp_path, "edit")
    steps = {name.removeprefix("report: "): shell for name, shell in PULL_REQUEST.items() if name.startswith("report: ")}
    assert next(iter(steps)) == "Set up" and len(steps) == 6
    for shell in steps.values():
        machine.run(shell)
    options, _, posted = machine.read("posted").partition("\n")
    assert options == "pr comment 12 --edit-last --create-if-none --body-file reports/pull-request.md"
    assert posted == machine.read("summary") and posted.startswith("# Docsmith: ")
    against = posted.split("## Against origin/main")[1].split("## Scores")[0]
    assert "on the questions that both runs asked" in against and re.search(r"^\| Recall, similarity \| \d+", against, flags=re.M)
    assert re.search(r"<summary>\d+ of \d+ answers differ</summary>", against) and "No setting differs." in against
    assert "| reports/metrics/ingest.json characters |" in against and "sha256" not in against
    assert "](https://github.example/team/docs/raw/abc123/reports/scores.png)" in posted
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(posted)
    assert html.count("<details>") == html.count("</details>") > 3 and not re.search(r"(?m)^\||^<p>\|", html)
    assert (machine.clone / "reports/plots/index.html").is_file()


def test_gitlabs_report_job_posts_the_same_as_a_note(finished: Finished, edited: Path, tmp_path: Path) -> None:
    machine = runner(finished, tmp_path, "edit")
    gitlab = {
        "CI_API_V4_URL": "https://gitlab.example/api/v4",
        "CI_PROJECT_ID": "3",
        "CI_MERGE_REQUEST_IID": "4",
        "NOTES_TOKEN": "t",
    }
    gitlab |= {"CI_MERGE_REQUEST_TARGET_BRANCH_NAME": "main", "CI_PROJECT_URL": "https://gitlab.example/team/docs"}
    machine.run(steps_of(GITLAB)["report"], CI_COMMIT_SHA="abc123", **gitlab)
    options, _, posted = machine.read("posted").partition("\n")
    assert options.endswith("https://gitlab.example/api/v4/projects/3/merge_requests/4/notes")
    assert "## Against origin/main" in posted and "](https://gitlab.example/team/docs/-/raw/abc123/reports/loss.png)" in posted


def test_an_edit_without_a_run_fails_the_check(finished: Finished, tmp_path: Path) -> None:
    machine = runner(finished, tmp_path, "main")
    machine.run(PULL_REQUEST["report: Set up"])
    page = machine.clone / "pages/lamp.md"
    page.write_text(page.read_text(encoding="utf-8") + "\nThe lamp is blue.\n", encoding="utf-8")
    code, said = machine.attempt(PULL_REQUEST["report: Is the committed run that of the committed files"])
    assert code == 1 and "::error::dvc.lock is not what these files give. Run dvc repro" in said


def test_a_project_without_a_run_says_in_one_line_that_there_is_nothing_to_compare(finished: Finished, tmp_path: Path) -> None:
    machine = runner(finished, tmp_path, "main")
    machine.run(PULL_REQUEST["report: Set up"])
    succeed(machine.clone, "git", "rm", "-r", "--quiet", "dvc.lock", "reports")
    machine.run(PULL_REQUEST["report: Compare with the base branch"])
    assert machine.read("summary").count("\n") == 1 and machine.read("summary").startswith("There is no reports/report.md")


def test_the_training_job_runs_what_changed_keeps_it_comments_and_promotion_judges_it(
    finished: Finished, edited: Path, tmp_path: Path
) -> None:
    machine = runner(finished, tmp_path, "edit")
    steps = {name: shell for name, shell in TRAIN.items() if name.startswith("train: ")}
    assert len(steps) == 5
    said = [machine.run(shell, SETTINGS="report.samples=2 train.seed=3407") for shell in steps.values()]
    ran = re.findall(r"Running stage '(\w+)'", "".join(said))
    assert ran == ["dataset", "report"]  # which show params.yaml; the seed is what it was
    commit = machine.read("output").strip().removeprefix("commit=")
    assert commit == succeed(finished.git_remote, "git", "rev-parse", "edit").strip()
    committed = succeed(finished.git_remote, "git", "show", "--stat", "--format=%s", "edit")
    assert committed.startswith("Run of edit: Docsmith: ") and " params.yaml " in committed and " dvc.lock " in committed
    assert "| report.samples | 6 | 2 | -4 |" in machine.read("posted")
    (tmp_path / "second").mkdir()
    other = runner(finished, tmp_path / "second", "edit")
    promote = [shell for name, shell in TRAIN.items() if name.startswith("promote: ")]
    for shell in promote[:-1]:
        other.run(shell)
    assert "Running stage" not in other.run("dvc repro")
    assert "promote: " in other.attempt(promote[-1])[1]


def test_gitlabs_training_job_runs_detached_and_pushes_to_the_branch(finished: Finished, edited: Path, tmp_path: Path) -> None:
    machine = runner(finished, tmp_path, "edit")
    succeed(machine.clone, "git", "checkout", "--quiet", "--detach")
    before = succeed(finished.git_remote, "git", "rev-parse", "edit")
    gitlab = {
        "CI_JOB_ID": "9",
        "CI_COMMIT_REF_NAME": "edit",
        "PUSH_URL": str(finished.git_remote),
        "SETTINGS": "report.samples=3",
    }
    gitlab |= {"GITLAB_USER_NAME": "a", "GITLAB_USER_EMAIL": "a@example.org"}
    assert "Running stage 'report'" in machine.run(steps_of(GITLAB)["train"], **gitlab)
    assert before != succeed(finished.git_remote, "git", "rev-parse", "edit")
    assert "samples: 3" in succeed(finished.git_remote, "git", "show", "edit:params.yaml")
