"""What a person sees while a stage works."""

import os
import sys
from collections.abc import Iterable
from typing import Any


def say(line: str) -> None:
    """Prints one line at once, so that DVC's output and ours keep their order."""
    print(line, flush=True)


def progress(items: Iterable[Any] | None, label: str, total: int | None = None, unit: str = "it", done: int = 0) -> Any:
    """A tqdm bar with ETA over `items`, of which `done` were there before; silent where `quieten` found nobody to look at it."""
    from tqdm import tqdm

    return tqdm(items, desc=label, total=total, unit=unit, initial=done, smoothing=0.1)


def quieten() -> None:
    """Silences every library's bars in CI and where stderr is not a terminal, and their chatter everywhere."""
    if os.environ.get("CI") or not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "1")
