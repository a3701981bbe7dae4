"""Writes the values of a profile over those in params.yaml: `python -m stages.profile gpu`. Comments and other settings stay.

The CPU profile is params.yaml as it is shipped; stages/profiles/ holds what another profile changes, and cpu.yaml the way back.
"""

from pathlib import Path
from typing import Any

from stages.files import new_file
from stages.params import PARAMS_FILE
from stages.program import BadParams, run, say

PROFILES = Path(__file__).with_name("profiles")


def merge(settings: Any, changes: Any, where: str) -> int:
    """Sets each leaf of `changes` in `settings`, both nested dicts, and returns how many differed. Raises BadParams for an unknown name."""
    changed = 0
    for name, value in changes.items():
        if name not in settings:
            raise BadParams(f"{where}: {name} is no setting of params.yaml")
        if isinstance(value, dict):
            changed += merge(settings[name], value, f"{where}: {name}")
        elif settings[name] != value:
            if isinstance(value, list):
                settings[name][:] = value  # in place: the list stays on its line
            else:
                settings[name] = value
            changed += 1
    return changed


def main(name: str) -> None:
    from ruamel.yaml import YAML

    known = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if name not in known:
        raise BadParams(f"there is no profile {name}; known: {', '.join(known)}")
    yaml = YAML()  # keeps comments and order
    yaml.width = 1000
    yaml.preserve_quotes = True
    settings = yaml.load(PARAMS_FILE.read_text(encoding="utf-8"))
    changes = YAML(typ="safe").load((PROFILES / f"{name}.yaml").read_text(encoding="utf-8"))
    changed = merge(settings, changes, f"stages/profiles/{name}.yaml")
    with new_file(PARAMS_FILE) as draft, open(draft, "w", encoding="utf-8") as stream:
        yaml.dump(settings, stream)
    say(f"profile: {name}, {changed} settings changed in {PARAMS_FILE}. Next: dvc repro")


if __name__ == "__main__":
    run(main)
