"""wiring: dvc.yaml, params.yaml, the code, .gitignore and the README say the same."""

import ast
import functools
import importlib
import inspect
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

import stages
from stages.params import Chat, Models, Retrieval, Tracking, read_section

CODE = Path(stages.__file__).parent
ROOT = CODE.parent
MODULES = sorted(path.stem for path in CODE.glob("*.py") if path.stem != "__init__")
FOLDERS = sorted(path.parent.name for path in CODE.glob("*/__init__.py"))
UNLISTED = {
    "tracking",
    "executor",
}  # where a run is recorded and where work is done changes no output: neither makes a stage run again
KEPT = {"data/store", "models/checkpoints"}  # survive runs: DVC deletes what it knows as an output before a stage runs


def pipeline() -> dict[str, dict[str, Any]]:
    """The stages of dvc.yaml by name, a foreach stage as its `do` with an item called `some`."""
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8").replace("${key}", "some").replace("${item.path}", "some-source")
    text = text.replace("${exam.gold}", "data/gold.jsonl")
    return {name: stage.get("do", stage) for name, stage in yaml.safe_load(text)["stages"].items()}


STAGES = pipeline()


def module_of(stage: str) -> str:
    """`x` of a stage's `python -m stages.x`."""
    words = shlex.split(STAGES[stage]["cmd"])
    assert words[:2] == ["python", "-m"] and words[2].startswith("stages."), STAGES[stage]["cmd"]
    return words[2].removeprefix("stages.")


def paths(entries: list[Any]) -> list[str]:
    """The paths of deps, outs, metrics or plots, some of which carry options."""
    return [path for entry in entries for path in (entry if isinstance(entry, dict) else [entry])]


def outputs(stage: dict[str, Any], is_cached: bool | None = None) -> list[str]:
    """Paths of outs, metrics and plots; with `is_cached`, only those that DVC keeps in its cache, or only the others."""
    found = []
    for entry in [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]:
        for path, options in (entry if isinstance(entry, dict) else {entry: {}}).items():
            if is_cached is None or options.get("cache", True) == is_cached:
                found.append(path)
    return found


@functools.cache
def imports_of(file: Path) -> set[str]:
    """Names of the modules and folders under stages/ that `file` imports itself, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: a relative import"
            names = [node.module] if node.module != "stages" else [f"stages.{name.name}" for name in node.names]
        else:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("stages.")}
    return found


def code_of(name: str) -> list[Path]:
    return sorted((CODE / name).rglob("*.py")) if name in FOLDERS else [CODE / f"{name}.py"]


def files_beside(module: str) -> set[str]:
    """The files in stages/ that a module names, as validate_suite.yaml, or "recipes" / "prompts.yaml" by its parts."""
    known = {path.relative_to(CODE) for path in CODE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    strings = [node for node in ast.walk(ast.parse((CODE / f"{module}.py").read_text())) if isinstance(node, ast.Constant)]
    named = {node.value for node in strings if isinstance(node.value, str)}
    return {str(path) for path in known if named.issuperset(path.parts)}


def needed_code(module: str) -> set[str]:
    """What a stage's outcome depends on under stages/: its file, the files it names, every folder that it imports in the end."""
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [found for file in code_of(name) for found in imports_of(file)]
    return {f"stages/{name}" for name in reached - {module}} | {
        f"stages/{file}" for file in {f"{module}.py"} | files_beside(module)
    }


def sections_of(module: str) -> dict[str, type[msgspec.Struct]]:
    """Section name -> Struct of the arguments that run() fills from params.yaml."""
    main = importlib.import_module(f"stages.{module}").main
    arguments = inspect.signature(main, eval_str=True).parameters.values()
    return {
        one.name: one.annotation
        for one in arguments
        if inspect.isclass(one.annotation) and issubclass(one.annotation, msgspec.Struct)
    }


def all_sections() -> dict[str, list[type[msgspec.Struct]]]:
    """Section -> each Struct that some stage or command reads it as."""
    found: dict[str, list[type[msgspec.Struct]]] = {}
    for module in MODULES:
        for name, struct in sections_of(module).items():
            if struct not in found.setdefault(name, []):
                found[name].append(struct)
    return found


SECTIONS = all_sections()


def git(*arguments: str, given: str = "") -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, input=given, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def test_there_are_stages_modules_and_folders_to_hold_together() -> None:
    assert len(STAGES) == 17 and len({module_of(stage) for stage in STAGES}) == 16
    assert {"promote", "serve", "chat", "doctor"} <= set(MODULES) and {"files", "params", "program", "records"} <= set(FOLDERS)
    assert needed_code("summary") > {"stages/summary.py", "stages/program"}
    assert files_beside("report") == {"report.md.jinja", "report.html.jinja", "validate_suite.yaml"}
    assert files_beside("validate") == {"validate_suite.yaml", "recipes/prompts.yaml"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_module_of_its_own_that_describes_itself(stage: str) -> None:
    file = CODE / f"{module_of(stage)}.py"
    assert file.is_file() and 'if __name__ == "__main__":\n    run(main)\n' in file.read_text(encoding="utf-8")
    assert "->" in (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    assert STAGES[stage]["desc"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_code_a_stage_depends_on_is_what_it_imports_in_the_end(stage: str) -> None:
    listed = [path for path in paths(STAGES[stage]["deps"]) if path.startswith("stages/")]
    needed = needed_code(module_of(stage))
    assert set(listed) == needed, f"missing {sorted(needed - set(listed))}, needless {sorted(set(listed) - needed)}"
    assert len(listed) == len(set(listed))


def test_stages_and_commands_never_import_each_other() -> None:
    for module in MODULES:
        assert not imports_of(CODE / f"{module}.py") & set(MODULES), module


def test_shared_folders_never_import_a_stage() -> None:
    for folder in FOLDERS:
        for file in code_of(folder):
            assert imports_of(file) <= set(FOLDERS), file


def test_every_folder_is_shared_by_two_modules_or_more() -> None:
    alone = {"parsers", "training", "registry"}  # ingest runs it as a program; too much for the files of train and of promote
    for folder in set(FOLDERS) - alone:
        users = [module for module in MODULES if f"stages/{folder}" in needed_code(module)]
        assert len(users) >= 2, f"{folder} is used by {users}"


def test_every_file_beside_the_stages_is_named_by_one() -> None:
    named = {name for module in MODULES for name in files_beside(module)}
    assert named >= {path.name for path in CODE.iterdir() if path.is_file() and path.suffix != ".py"} != set()


@pytest.mark.parametrize("stage", STAGES)
def test_the_params_of_a_stage_are_the_sections_its_main_takes(stage: str) -> None:
    listed = [re.sub(r"\.some$", "", name) for name in STAGES[stage]["params"]]
    assert {name.split(".")[0] for name in listed} == set(sections_of(module_of(stage))) - UNLISTED
    # models are listed one by one, so that another teacher does not train the base again
    used = re.findall(
        r"\bmodels\.(base|teacher|embedder)\b", re.sub(r'"[^"\n]*"', "", (CODE / f"{module_of(stage)}.py").read_text())
    )
    assert {name for name in listed if name.startswith("models")} == {f"models.{name}" for name in used}


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_gives_each_path_that_main_takes(stage: str) -> None:
    main = importlib.import_module(f"stages.{module_of(stage)}").main
    arguments = inspect.signature(main, eval_str=True).parameters.values()
    positional = [one for one in arguments if one.annotation in (Path, str) and one.default is inspect.Parameter.empty]
    assert len(shlex.split(STAGES[stage]["cmd"])[3:]) == len(positional)


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_command_reads_and_writes_is_what_dvc_knows(stage: str) -> None:
    given = {word for word in shlex.split(STAGES[stage]["cmd"])[3:] if word != "some"}
    reads = {path for path in paths(STAGES[stage]["deps"]) if not path.startswith("stages/")}
    known = reads | set(outputs(STAGES[stage])) | KEPT
    inside = {path for path in given if any(one.startswith(f"{path}/") for one in reads)}  # a folder of which it reads some files
    assert given <= known | inside, given - known - inside
    assert set(outputs(STAGES[stage])) <= given
    assert not set(outputs(STAGES[stage])) & reads


def test_what_a_stage_reads_is_in_the_repository_or_written_by_a_stage() -> None:
    written = {path for stage in STAGES.values() for path in outputs(stage)}
    for name, stage in STAGES.items():
        for path in paths(stage["deps"]):
            is_made = path in written or any(one.startswith(f"{path}/") for one in written)
            assert is_made or (ROOT / path).exists() or path == "some-source", f"{name}: {path}"


def test_every_section_of_params_is_read_and_every_section_read_is_there() -> None:
    text = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert set(text) == set(SECTIONS)
    assert {"models": [Models], "chat": [Chat], "tracking": [Tracking], "retrieval": [Retrieval]}.items() <= SECTIONS.items()


@pytest.mark.parametrize("section", SECTIONS)
def test_params_as_shipped_are_valid(section: str) -> None:
    for struct in SECTIONS[section]:
        assert read_section(section, struct, ROOT / "params.yaml")


@pytest.mark.parametrize(("section", "struct"), [(name, struct) for name, structs in SECTIONS.items() for struct in structs])
def test_every_setting_is_used_by_the_code(section: str, struct: type[msgspec.Struct]) -> None:
    files = [*CODE.rglob("*.py"), *CODE.glob("*_suite.yaml")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    assert not [name for name in struct.__struct_fields__ if not re.search(rf"(\.|\$PARAMETER: ){name}\b", code)]


def test_git_ignores_what_dvc_keeps_and_nothing_else() -> None:
    cached = [path for stage in STAGES.values() for path in outputs(stage, is_cached=True)] + sorted(KEPT)
    others = [path for stage in STAGES.values() for path in outputs(stage, is_cached=False)]
    assert "models/gguf" in cached and "reports/report.md" in others
    assert git("check-ignore", "--no-index", "--stdin", given="\n".join(cached)) == cached
    assert git("check-ignore", "--no-index", "--stdin", given="\n".join(others)) == []
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard") == []


def test_the_readme_lists_the_stages_in_their_order() -> None:
    tables: list[list[str]] = [[]]
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if row := re.match(r"\| *`(\w+)` *\|", line):
            tables[-1].append(row[1])
        elif tables[-1]:
            tables.append([])
    assert list(dict.fromkeys(module_of(stage) for stage in STAGES)) in tables


def test_links_lead_to_files_that_are_there() -> None:
    pages = [ROOT / "README.md", ROOT / "bench/RESULTS.md", *sorted((ROOT / "docs").rglob("*.md"))]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))]
    local = [(page, link.partition("#")[0]) for page, link in links if "://" not in link and not link.startswith("#")]
    assert len(local) > 30
    assert not [(str(page.relative_to(ROOT)), link) for page, link in local if not (page.parent / link).exists()]


def test_make_runs_modules_that_exist() -> None:
    named = re.findall(r"python -m stages\.(\w+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert named and set(named) <= set(MODULES)
