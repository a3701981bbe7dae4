"""Runs a stage's `main`: its signature is the command line, its Struct arguments are sections of params.yaml."""

import argparse
import contextlib
import ctypes
import fcntl
import inspect
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from stages.program.errors import Busy, DocsmithError
from stages.program.progress import quieten

PR_SET_PDEATHSIG = 1  # prctl(2)


def run(main: Callable[..., object], argv: list[str] | None = None) -> None:
    """Runs `main` and exits with its code.

    A `Path` or `str` argument of `main` is a positional argument of the command, or an option when it has a default; a bool with a
    default is a flag; an argument annotated with a Struct is the section of params.yaml with the argument's name. Without any
    positional argument, a stage takes its paths from its command in dvc.yaml.
    Exit codes: 0 done, 1 DocsmithError, 2 usage, 75 another run holds the lock, 130 and 143 interrupted.
    """
    name = _name_of(main)
    signature = inspect.signature(main, eval_str=True)
    parser = _parser(name, main, signature)
    arguments = _with_paths(parser, vars(parser.parse_args(argv)), name, signature)
    quieten()
    parent = os.getppid()
    if parent != 1:
        end_with_parent()  # a killed `dvc repro` must not leave a stage that goes on writing
        if os.getppid() != parent:  # it ended before the call above
            sys.exit(143)
    signal.signal(signal.SIGTERM, _exit_on_signal)
    signal.signal(signal.SIGHUP, _exit_on_signal)
    try:
        with _only_run_of(name):
            main(**arguments, **_sections(signature))
    except DocsmithError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; finished work is kept. Resume with: dvc repro", file=sys.stderr, flush=True)
        sys.exit(130)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"{name}: {error.filename}: {error.strerror}. {_advice(error)}", file=sys.stderr, flush=True)
        sys.exit(1)


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """This process gets the signal `number` when the thread that started it ends, where the system is Linux; also for `preexec_fn`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _name_of(main: Callable[..., object]) -> str:
    return Path(inspect.getfile(main)).stem


def _parser(name: str, main: Callable[..., object], signature: inspect.Signature) -> argparse.ArgumentParser:
    doc = inspect.getdoc(inspect.getmodule(main)) or ""
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for argument in signature.parameters.values():
        option = "--" + argument.name.replace("_", "-")
        if _is_section(argument):
            continue
        if argument.annotation is bool:
            parser.add_argument(option, action="store_true")
        elif argument.default is inspect.Parameter.empty:
            parser.add_argument(argument.name, type=argument.annotation, nargs="?")
        else:
            parser.add_argument(option, type=type(argument.default), default=argument.default)
    return parser


def _with_paths(
    parser: argparse.ArgumentParser, given: dict[str, Any], name: str, signature: inspect.Signature
) -> dict[str, Any]:
    wanted = [one for one in signature.parameters.values() if one.default is inspect.Parameter.empty and not _is_section(one)]
    absent = [one.name for one in wanted if given[one.name] is None]
    if absent and len(absent) == len(wanted):
        given |= zip(absent, map(Path, _paths_in_dvc_yaml(name)), strict=False)
        absent = [one for one in absent if given[one] is None]
    if absent:
        parser.error(f"the following arguments are required: {', '.join(absent)}")
    return given


def _paths_in_dvc_yaml(name: str) -> list[str]:
    """The paths in the command of the stage `name`; [] where there is no such stage here."""
    import yaml

    if not Path("dvc.yaml").is_file():
        return []
    stages = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    _, _, paths = stages.get(name, {}).get("cmd", "").partition(f"-m stages.{name} ")
    return shlex.split(paths)


def _is_section(argument: inspect.Parameter) -> bool:
    return isinstance(argument.annotation, type) and issubclass(argument.annotation, msgspec.Struct)


def _sections(signature: inspect.Signature) -> dict[str, Any]:
    from stages.params import read_section

    wanted = [argument for argument in signature.parameters.values() if _is_section(argument)]
    return {argument.name: read_section(argument.name, argument.annotation) for argument in wanted}


def _exit_on_signal(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)  # SystemExit unwinds `finally` blocks: servers are stopped, temporary files removed


@contextlib.contextmanager
def _only_run_of(name: str) -> Iterator[None]:
    """Holds .dvc/tmp/<name>.lock for the length of the run, or raises Busy with the holder's pid."""
    folder = Path(".dvc/tmp")
    is_follower = os.environ.get("RANK", "0") != "0"  # of processes that train together, the first holds it for all
    if not folder.parent.is_dir() or name in ("serve", "chat", "doctor") or is_follower:
        yield
        return
    folder.mkdir(exist_ok=True)
    with open(folder / f"docsmith-{name}.lock", "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise Busy(f"another run of it (pid {lock.read().strip() or 'unknown'}) is at work here; wait or stop it") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _advice(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "Build it with: dvc repro"
    if error.errno == 28:  # ENOSPC
        return "Free disk space, then: dvc repro"
    return "Check the path and its permissions."
