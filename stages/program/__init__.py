"""How a stage or command becomes a program: arguments from its signature, params.yaml, one-line errors, no orphans."""

from stages.program.errors import (
    BadInput,
    BadModelFile,
    BadParams,
    BadRecord,
    Busy,
    DocsmithError,
    LimitBroken,
    OutOfMemory,
    ServerFailed,
)
from stages.program.progress import progress, say
from stages.program.run import end_with_parent, run

__all__ = [
    "BadInput",
    "BadModelFile",
    "BadParams",
    "BadRecord",
    "Busy",
    "DocsmithError",
    "LimitBroken",
    "OutOfMemory",
    "ServerFailed",
    "end_with_parent",
    "progress",
    "run",
    "say",
]
