"""The parsing process: imports every parser once, then gives each file a fork of itself under hard limits.

`python -m stages.parsers <folder>` reads <folder>/job.json, writes <folder>/<n>.json and prints n for each file that is finished.
"""

import errno
import gc
import hashlib
import logging
import os
import re
import resource
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from stages.parsers import Job, Limits, Parsed
from stages.parsers.formats import Unreadable, import_parsers, to_markdown
from stages.parsers.text import cleaned, title_of
from stages.program import end_with_parent

REFUSED_EVENTS = (
    "socket.",
    "subprocess.",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.system",
    "urllib.",
)
ENDED_BY = {
    signal.SIGALRM: "timed-out",
    signal.SIGXCPU: "timed-out",
    signal.SIGKILL: "out-of-memory",  # by the kernel, when the machine runs short of it
}


def serve(folder: Path) -> None:
    """Parses every file of the job, `at_once` at a time."""
    job = msgspec.json.decode((folder / "job.json").read_bytes(), type=Job)
    import_parsers()
    gc.disable()  # a child lives for one document, and a collection would copy the pages that all of them share
    running: dict[int, int] = {}
    for number, (path, type) in enumerate(job.files):
        if len(running) == job.at_once:
            reap(folder, running, job.limits)
        pid = os.fork()
        if pid == 0:
            run_child(Path(path), type, folder / f"{number}.json", job.limits)
        running[pid] = number
    while running:
        reap(folder, running, job.limits)


def reap(folder: Path, running: dict[int, int], limits: Limits) -> None:
    """Waits for one child, and writes the reply of a child that could not."""
    pid, status = os.wait()
    number = running.pop(pid)
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        reason = ENDED_BY.get(signal.Signals(-code), "crashed") if code < 0 else "crashed"
        detail = {
            "timed-out": f"no text after {limits.timeout_s} s (ingest.timeout_s)",
            "out-of-memory": "killed by the system",
            "crashed": f"the parser ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}",
        }[reason]
        (folder / f"{number}.json").write_bytes(msgspec.json.encode(Parsed(reason=reason, detail=detail)))
    print(number, flush=True)


def run_child(path: Path, type: str, reply: Path, limits: Limits) -> None:
    """Never returns. Exit code 0: `reply` is whole."""
    code = 1
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        confine(limits)
        encoded = msgspec.json.encode(parsed(path, type, limits))
        try:
            reply.write_bytes(encoded)
        except OSError as error:
            if error.errno != errno.EFBIG:  # RLIMIT_FSIZE
                raise
            too_large = Parsed(reason="too-large", detail=f"its text is over {limits.max_text_mb} MB (ingest.max_file_mb)")
            reply.write_bytes(msgspec.json.encode(too_large))
        code = 0
    finally:
        os._exit(code)  # no clean-up of what belongs to the parent


def confine(limits: Limits) -> None:
    """From here on: no network, no programs, limited time, memory and output, and an end with the parent's."""
    end_with_parent(signal.SIGKILL)
    if sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        memory = mapped + limits.max_memory_mb * 1_000_000
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.timeout_s + 1, limits.timeout_s + 2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.max_text_mb * 1_000_000,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default ends the process, whatever code is running
    signal.setitimer(signal.ITIMER_REAL, limits.timeout_s)
    sys.addaudithook(refuse)
    warnings.simplefilter("ignore")
    logging.disable()


def refuse(event: str, _arguments: Any) -> None:
    """An audit hook: a parser has no business with the network or with other programs."""
    if event.startswith(REFUSED_EVENTS):
        raise PermissionError(f"{event} is refused while parsing")


def parsed(path: Path, type: str, limits: Limits) -> Parsed:
    """The file's outcome; whatever a parser raises becomes a reason."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return Parsed(reason="unreadable", detail=error.strerror or "")
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        hidden = Counter[str]()
        text = cleaned(to_markdown(content, type, limits.max_memory_mb // 4, hidden), hidden)
        if not text.strip():
            raise Unreadable("no-text", "scanned pages need OCR first" if type == "pdf" else "nothing but blanks")
        return Parsed(sha256=sha256, title=title_of(text), text=text, hidden=dict(sorted(hidden.items())))
    except Unreadable as error:
        return Parsed(sha256=sha256, reason=error.reason, detail=error.detail)
    except MemoryError:
        detail = f"needs more than {limits.max_memory_mb} MB (ingest.max_memory_mb)"
        return Parsed(sha256=sha256, reason="out-of-memory", detail=detail)
    except RecursionError:
        return Parsed(sha256=sha256, reason="too-deep", detail="nested too deeply")
    except Exception as error:
        words = re.sub(r"0x[0-9a-f]{6,}", "0x…", " ".join(str(error).split()))[:200]  # addresses differ between runs
        return Parsed(sha256=sha256, reason=f"not-a-{type}", detail=f"{error.__class__.__name__}: {words}")


if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)
    warnings.simplefilter("ignore")
    serve(Path(sys.argv[1]))
