"""Files of many formats as Markdown text, each parsed in a process of its own that can be slow, greedy or killed without harm."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

TYPE_OF_SUFFIX = {
    ".csv": "csv",
    ".docx": "docx",
    ".htm": "html",
    ".html": "html",
    ".ipynb": "ipynb",
    ".markdown": "md",
    ".md": "md",
    ".mdx": "md",
    ".pdf": "pdf",
    ".pptx": "pptx",
    ".rst": "rst",
    ".text": "txt",
    ".txt": "txt",
}


class Limits(msgspec.Struct, frozen=True):
    """What one file may take: wall time, memory beyond the parsers' own, and the size of the text it gives."""

    timeout_s: int
    max_memory_mb: int
    max_text_mb: int


class Parsed(msgspec.Struct, frozen=True):
    """A file's Markdown, or, where `reason` is set, a stable slug and a line that say why there is none."""

    sha256: str = ""  # of the bytes that were parsed
    title: str = ""
    text: str = ""
    hidden: dict[str, int] = {}  # what a reader does not see and was removed: kind -> characters
    reason: str = ""
    detail: str = ""


class Job(msgspec.Struct, frozen=True):
    """What the parsing process is told."""

    files: list[tuple[str, str]]  # path, type
    limits: Limits
    at_once: int


def parse(files: Sequence[tuple[Path, str]], limits: Limits) -> Iterator[tuple[int, Parsed]]:
    """The index in `files` (path, type as in TYPE_OF_SUFFIX) and the outcome of each, in the order they finish.

    Every file gets its own process without network. Importing the parsers takes about a second, once.
    Raises RuntimeError when the parsing process itself ends early.
    """
    if not files:
        return
    at_once = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    job = Job(files=[(str(path.resolve()), type) for path, type in files], limits=limits, at_once=at_once)
    # one thread: a process with more cannot be forked safely. The hash seed keeps sets in one order.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory(prefix="docsmith-", ignore_cleanup_errors=True) as folder:
        Path(folder, "job.json").write_bytes(msgspec.json.encode(job))
        server = subprocess.Popen(
            [sys.executable, "-m", "stages.parsers", folder],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        with server:
            try:
                finished = 0
                for line in server.stdout or ():
                    reply = Path(folder, f"{int(line)}.json")
                    yield int(line), msgspec.json.decode(reply.read_bytes(), type=Parsed)
                    reply.unlink()
                    finished += 1
            finally:
                server.kill()
        if finished != len(files):
            raise RuntimeError(f"the parsing process ended after {finished} of {len(files)} files")
