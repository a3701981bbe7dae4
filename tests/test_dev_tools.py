"""dev tools: the container and the hooks before a commit name what is there, and the hooks refuse what they are for."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_project import call, succeed

ROOT = Path(__file__).parents[1]
CONTAINER = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
CONFIG = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
HOOKS: dict[str, dict[str, Any]] = {hook["id"]: hook for repo in CONFIG["repos"] for hook in repo["hooks"]}
# of devContainer.base.schema.json of devcontainers/spec and of pre-commit's documentation
CONTAINER_KEYS = {"name", "image", "hostRequirements", "postCreateCommand", "remoteEnv", "forwardPorts", "portsAttributes"}
HOOK_KEYS = {"id", "name", "entry", "language", "types", "types_or", "files", "always_run", "pass_filenames"}


def targets_in(text: str) -> set[str]:
    return set(re.findall(r"\bmake ([a-z-]+)", text))


def test_the_container_has_python_3_11_installs_the_packages_and_shows_the_pages_of_the_commands() -> None:
    assert set(CONTAINER) == CONTAINER_KEYS | {"customizations"}
    assert CONTAINER["image"] == "python:3.11" and CONTAINER["postCreateCommand"] == "make team"
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    served = {params["serve"]["port"]: "make serve", params["review"]["port"]: "make review"}
    (ui,) = re.findall(r"mlflow ui .*--port (\d+)", makefile)
    served[int(ui)] = "make ui"
    assert sorted(served) == CONTAINER["forwardPorts"]
    assert {int(port): told["label"] for port, told in CONTAINER["portsAttributes"].items()} == served
    assert CONTAINER["remoteEnv"]["PATH"].startswith("${containerWorkspaceFolder}/.venv/bin:")
    assert all(f"\n{target}:" in makefile for target in targets_in(json.dumps(CONTAINER)))


def test_hooks_are_local_and_run_what_setup_installs() -> None:
    assert [repo["repo"] for repo in CONFIG["repos"]] == ["local"]  # nothing is fetched
    assert set(HOOKS) == {"lint", "kept-by-dvc", "notebook-outputs"}
    for hook in HOOKS.values():
        assert {"id", "name", "entry", "language"} <= set(hook) <= HOOK_KEYS and hook["language"] == "system"
    assert HOOKS["lint"]["entry"] == "make lint" and "\nlint: $(READY)" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/.gitignore").write_text((ROOT / ".dvc/.gitignore").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\n", encoding="utf-8")
    succeed(tmp_path, "git", "init", "--quiet")
    succeed(tmp_path, "git", "add", "--all")
    return tmp_path


@pytest.mark.parametrize("path", ["data/pairs.jsonl", "models/adapter/adapter_model.safetensors", ".dvc/tmp/rwlock"])
def test_what_dvc_keeps_and_its_locks_are_refused_and_dvc_lock_is_not(repository: Path, path: str) -> None:
    entry = shlex.split(HOOKS["kept-by-dvc"]["entry"])
    assert call(repository, *entry).returncode == 0  # dvc.lock belongs into git
    (repository / path).parent.mkdir(parents=True, exist_ok=True)
    (repository / path).write_text("{}\n", encoding="utf-8")
    succeed(repository, "git", "add", "--force", path)
    refused = call(repository, *entry)
    assert refused.returncode == 1 and path in refused.stdout


def test_a_notebook_with_an_output_is_refused(tmp_path: Path) -> None:
    import nbformat

    clean = ROOT / "notebooks/walkthrough.ipynb"
    notebook = nbformat.read(clean, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.outputs = [nbformat.v4.new_output("stream", text="a secret")]
    nbformat.write(notebook, tmp_path / "run.ipynb")
    entry = shlex.split(HOOKS["notebook-outputs"]["entry"])
    assert call(tmp_path, *entry, str(clean)).returncode == 0
    refused = call(tmp_path, *entry, str(clean), "run.ipynb")
    assert refused.returncode == 1 and refused.stdout.startswith("run.ipynb:")


def test_the_shell_of_the_hooks_is_sound() -> None:
    for name in ("kept-by-dvc", "notebook-outputs"):
        shell = shlex.split(HOOKS[name]["entry"])[2]
        done = subprocess.run(
            [str(Path(sys.executable).with_name("shellcheck")), "--shell=bash", "-"],
            input=shell,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
