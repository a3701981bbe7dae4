"""The model that answers: loaded, checked, supervised, and replaced when another version becomes champion."""

from pathlib import Path
from typing import NamedTuple

from stages.llm.endpoint import Endpoint
from stages.release import Release


class Served(NamedTuple):
    """A model that answers at `endpoint`."""

    endpoint: Endpoint
    release: Release
    folder: Path  # of the release
    version: str  # in the registry, as "docsmith/3"; of a folder, the first 12 digits of the SHA-256 of its SHA256SUMS


class EngineDown(Exception):
    """No model answers now; `retry_after_s` says when to ask again."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the engine is being restarted; ask again in {retry_after_s} s")
        self.retry_after_s = retry_after_s
