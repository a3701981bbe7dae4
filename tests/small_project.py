"""A small project of three pages that a test can run through the real pipeline, and how to run its commands."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[1]
PAGES = {
    "kettle.md": """# The Alto kettle

## Boiling

The Alto kettle boils one litre of water in three minutes. To start the kettle, press the round button on its handle.
The kettle switches itself off when the water boils, because a bimetal disc bends at one hundred degrees.

## Descaling

Descaling removes the lime that hard water leaves in the Alto kettle. To descale the kettle, boil half a litre of vinegar and rinse twice.
A kettle in a town with hard water needs descaling every month. The lid of the kettle must stay closed while the vinegar boils.
""",
    "lamp.md": """# The Brio lamp

## Light

The Brio lamp gives eight hundred lumens of warm white light. To dim the Brio lamp, hold the touch sensor for two seconds.
The lamp remembers its last brightness, because it stores the value in flash memory.

## Battery

The battery of the Brio lamp lasts nine hours at half brightness. To charge the lamp, connect a USB-C cable to the port in its foot.
A red ring on the lamp means that the battery is below ten percent.
""",
    "radio.md": """# The Corso radio

## Stations

The Corso radio stores forty stations in its memory. To save a station, hold one of the number keys until the radio beeps.
The radio searches for stations again when its antenna has been moved.

## Alarm

The alarm of the Corso radio starts quietly and grows louder for one minute. To set the alarm, turn the left wheel and press it.
The alarm is a clock of its own, so that it rings during a power cut as well.
""",
}
SECRET = "ghp_" + "Zq7Lw2Xk9Rb4Tn6Vc8Mf3Hd5Js1Py0Ga2Ke"  # of the radio's alarm section
SETTINGS = {
    "collect": {"sources": {"pages": {"path": "pages"}}},
    "generate": {"pairs_per_chunk": 3, "wordings": 4, "concurrency": 16},
    "split": {"held_out_share": 0.2, "max_dev": 4},
    "train": {"num_train_epochs": 6, "logging_steps": 1, "eval_steps": 5, "warmup_steps": 1},
    "chat": {"max_new_tokens": 24},
    "exam": {"max_general": 6, "max_out_of_scope": 6},
    "answer": {"concurrency": 4, "systems": ["base", "tuned", "tuned_rag"]},
    "export": {"quants": ["q8_0"]},
    "evaluate": {"resamples": 200},
}


IDENTITY = {
    f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in (("NAME", "a"), ("EMAIL", "a@example.org"))
}


def call(project: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs `command` in `project` with this Python's programs first, in CI's way, and with `more` in its environment."""
    environment = os.environ | IDENTITY | {"CI": "true"} | more
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=1100, check=False)


def succeed(project: Path, *command: str, **more: str) -> str:
    """As `call`, and gives what was printed; a failure is the test's."""
    done = call(project, *command, **more)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def write_project(project: Path) -> None:
    """A copy of the repository in the empty folder `project`, with three pages of its own and settings that suit them."""
    for name in ("stages", "requirements", ".github", ".ci", ".dvcignore", ".gitignore", "dvc.yaml", "Makefile"):
        source = REPOSITORY / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, project / name, ignore=ignored) if source.is_dir() else shutil.copy(source, project / name)
    (project / ".dvc").mkdir()
    for name in (".gitignore", "config"):
        shutil.copy(REPOSITORY / ".dvc" / name, project / ".dvc" / name)
    if (REPOSITORY / "models/cache").is_dir():
        shutil.copytree(REPOSITORY / "models/cache", project / "models/cache")
    (project / "data").mkdir()
    for source in (REPOSITORY / "data").glob("*.jsonl"):
        if source.name in ("curated.jsonl", "gold.jsonl", "review.jsonl"):
            shutil.copy(source, project / "data")
    for name, text in PAGES.items():
        (project / "pages").mkdir(exist_ok=True)
        leak = (
            f"\nThe alarm of the radio is set from afar with the token {SECRET} of the workshop.\n" if name == "radio.md" else ""
        )
        (project / "pages" / name).write_text(text + leak, encoding="utf-8")
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    for section, values in SETTINGS.items():
        params.setdefault(section, {}).update(values)
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
