"""params.yaml, read strictly: a section per stage, and four that stages share (models, chat, tracking, retrieval)."""

import difflib
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from stages.program.errors import BadParams

PARAMS_FILE = Path("params.yaml")
Section = TypeVar("Section", bound=msgspec.Struct)

Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0.0)]


class Models(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Model references: `pkg:<module>/<file or folder>`, a path, or `hf:<id>@<revision>`."""

    base: str
    teacher: str
    embedder: str


class Chat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every conversation starts with, in training, evaluation, the Modelfile and serving."""

    system_prompt: str
    max_new_tokens: Positive
    context_tokens: Positive


class Tracking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where MLflow keeps runs and models; MLFLOW_TRACKING_URI, when set, wins over `uri`."""

    uri: str
    experiment: str
    model_name: str


class Retrieval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model is shown beside a question."""

    top_k: Positive  # the chunks nearest to it


def read_section(name: str, section: type[Section], path: Path = PARAMS_FILE) -> Section:
    """The section `name` of params.yaml as `section`. Raises BadParams with the setting's name, its value and a suggestion."""
    import yaml

    if not path.is_file():
        raise BadParams(f"{path} is missing; run the command in the folder that holds it")
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise BadParams(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(sections, dict) or name not in sections:
        raise BadParams(f"{path}: the section {name} is missing{_did_you_mean(name, sections)}")
    return convert_section(name, sections[name], section, str(path))


def convert_section(name: str, values: object, section: type[Section], where: str) -> Section:
    """`values` checked against `section`'s fields, types and ranges, at every depth."""
    _refuse_unknown(name, values, section, where)
    try:
        return msgspec.convert(values, section, strict=True)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at ")
        setting = name + path.strip("`").removeprefix("$") if path else name
        raise BadParams(f"{where}: {setting}: {what[:1].lower()}{what[1:]}") from None


def _refuse_unknown(name: str, values: object, section: Any, where: str) -> None:
    if not isinstance(values, dict) or not isinstance(section, type) or not issubclass(section, msgspec.Struct):
        return
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(section)}
    for key, value in values.items():
        if key not in fields:
            raise BadParams(f"{where}: {name}.{key} is not a setting of {name}{_did_you_mean(key, fields)}")
        _refuse_unknown(f"{name}.{key}", value, fields[key], where)


def _did_you_mean(word: object, known: Any) -> str:
    close = difflib.get_close_matches(str(word), [str(key) for key in known], n=1)
    return f". Did you mean {close[0]}?" if close else f". Known: {', '.join(sorted(map(str, known)))}"
