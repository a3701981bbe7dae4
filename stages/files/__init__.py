"""Files that are either the old version or the new one, never half of each; and their checksums."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends well and is removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        _sync(draft)
        os.replace(draft, path)
        _sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """As `new_file`, for a folder: an older `path` is replaced whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        for part in draft.rglob("*"):
            if part.is_file():
                _sync(part)
        _sync(draft)
        if path.exists():
            os.replace(path, aside)
        os.replace(draft, path)
        _sync(path.parent)
    finally:
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(draft, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 with Unix line ends, whole or not at all."""
    with new_file(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: object) -> None:
    """Writes `value` as indented JSON with sorted keys: the same value gives the same bytes."""
    encoded = msgspec.json.encode(value, order="deterministic")
    with new_file(path) as draft:
        draft.write_bytes(msgspec.json.format(encoded, indent=2) + b"\n")


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of the file's bytes. Raises OSError."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of(path: Path) -> str:
    """`sha256_of_file` for a file; for a folder, the SHA-256 over the sorted names and digests of its files."""
    if path.is_file():
        return sha256_of_file(path)
    digest = hashlib.sha256()
    for part in sorted(part for part in path.rglob("*") if part.is_file()):
        digest.update(f"{part.relative_to(path).as_posix()} {sha256_of_file(part)}\n".encode())
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
