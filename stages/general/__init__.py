"""Short conversations about nothing in particular: `split` may train some of them, `exam` asks the others."""

from pathlib import Path
from typing import Literal

import msgspec

from stages.records import Text

GENERAL = Path(__file__).with_name("general.yaml")


class General(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A conversation of one turn that no document says anything about. What is of the set `test` is never trained."""

    set: Literal["train", "test"]
    question: Text
    answer: Text


def read_general() -> list[General]:
    """The conversations of general.yaml, in file order."""
    import yaml

    return msgspec.convert(yaml.safe_load(GENERAL.read_text(encoding="utf-8")), list[General])
