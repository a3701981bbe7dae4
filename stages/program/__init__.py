"""How a stage or command becomes a program: arguments from its signature, params.yaml, one-line errors, no orphans."""

from stages.program.errors import (
    BadInput,
    BadModelFile,
    BadParams,
    BadRecord,
    Busy,
    DocsmithError,
    LimitBroken,
    ServerFailed,
)
from stages.program.progress import progress, say
from stages.program.run import run

__all__ = [
    "BadInput",
    "BadModelFile",
    "BadParams",
    "BadRecord",
    "Busy",
    "DocsmithError",
    "LimitBroken",
    "ServerFailed",
    "progress",
    "run",
    "say",
]
