"""ci: the workflows for GitHub and GitLab are valid, their shell is sound, and all that they name is there."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = sorted((ROOT / ".github/workflows").glob("*.yml"))
GITLAB = ROOT / ".ci/gitlab-ci.yml"
PATH = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
SCHEMAS = {file: "vendor.github-workflows" for file in GITHUB} | {GITLAB: "vendor.gitlab-ci"}


def steps_of(file: Path) -> dict[str, str]:
    """The shell of a workflow by `job: step`, with GitHub's expressions, of which shell knows nothing, as words."""
    text = yaml.safe_load(file.read_text(encoding="utf-8"))
    if file == GITLAB:
        jobs: dict[str, Any] = {name: job for name, job in text.items() if isinstance(job, dict) and "script" in job}
        return {name: "\n".join(job["script"]) for name, job in jobs.items()}
    return {
        f"{name}: {step.get('name', step['run'])}": step["run"]
        for name, job in text["jobs"].items()
        for step in job["steps"]
        if "run" in step
    }


STEPS = {f"{file.name}: {name}": shell for file in SCHEMAS for name, shell in steps_of(file).items()}


def test_there_are_workflows_and_steps_to_check() -> None:
    assert [file.name for file in GITHUB] == ["pull-request.yml", "train.yml"] and GITLAB.is_file() and len(STEPS) >= 16


@pytest.mark.parametrize("file", SCHEMAS, ids=lambda file: file.name)
def test_a_workflow_is_what_its_service_reads(file: Path) -> None:
    transform = ["--data-transform", "gitlab-ci"] if file == GITLAB else []
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", SCHEMAS[file], *transform, str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", STEPS)
def test_the_shell_of_a_step_is_sound(name: str) -> None:
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "-"], input=STEPS[name], capture_output=True, text=True, check=False, env=PATH
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [name for name in STEPS if not name.startswith(GITLAB.name)])
def test_a_step_takes_what_github_fills_in_from_its_environment(name: str) -> None:
    assert "${{" not in STEPS[name]  # a branch name or an input in the shell's own text would be run


def test_modules_make_targets_and_outputs_that_steps_name_are_there() -> None:
    shell = "\n".join(STEPS.values())
    modules, targets = set(re.findall(r"-m stages\.(\w+)", shell)), set(re.findall(r"\bmake (\w+)", shell))
    assert modules == {"compare", "promote"} and all((ROOT / f"stages/{name}.py").is_file() for name in modules)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets == {"lint", "team"} and all(f"\n{name}:" in makefile for name in targets)
    wired = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    pulled = set(re.findall(r"\bdata/[\w./]+", shell))
    assert pulled == {"data/exam.jsonl", "data/scores.jsonl", "data/answers"} and all(f"- {path}\n" in wired for path in pulled)


def test_promotion_waits_for_an_approval_and_only_people_start_the_training() -> None:
    train = yaml.safe_load((ROOT / ".github/workflows/train.yml").read_text(encoding="utf-8"))
    assert list(train[True]) == ["workflow_dispatch"]  # YAML reads the key `on` as true
    assert train["jobs"]["promote"]["environment"] and train["jobs"]["promote"]["needs"] == "train"
    gitlab = yaml.safe_load(GITLAB.read_text(encoding="utf-8"))
    assert gitlab["promote"]["environment"] and gitlab["promote"]["needs"] == ["train"]
    assert all(rule["when"] == "manual" for job in ("train", "promote") for rule in gitlab[job]["rules"])
