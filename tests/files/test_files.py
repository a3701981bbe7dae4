"""files: what is there is the old version or the new one, whichever step of the writing fails."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.files import new_file, new_folder, sha256_of, sha256_of_file, write_json, write_text

FAILING = ("open", "fsync", "replace", "rename", "rmdir", "unlink", "mkdir")


@pytest.fixture
def fail_at() -> Iterator[Callable[[int], list[str]]]:
    """fail_at(k) makes the k-th call of an os function that writes fail, once, as a full disk would; gives the list of calls."""
    with pytest.MonkeyPatch.context() as patch:

        def arrange(k: int) -> list[str]:
            patch.undo()
            calls: list[str] = []

            def failing(name: str, original: Callable[..., object]) -> Callable[..., object]:
                def call(*arguments: object, **options: object) -> object:
                    calls.append(name)
                    if len(calls) == k:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    return original(*arguments, **options)

                return call

            for name in FAILING:
                patch.setattr(os, name, failing(name, getattr(os, name)))
            return calls

        yield arrange


def write_folder(path: Path, text: str) -> None:
    with new_folder(path) as draft:
        (draft / "a.txt").write_text(text)
        (draft / "inside").mkdir()
        (draft / "inside/b.txt").write_text(text)


def content(path: Path) -> dict[str, str]:
    """Name -> text of the file, or of the folder's files, at `path`; {} when nothing is there."""
    if path.is_file():
        return {"": path.read_text()}
    return {part.relative_to(path).as_posix(): part.read_text() for part in path.rglob("*") if part.is_file()}


@pytest.mark.parametrize("write", [write_text, write_folder])
@pytest.mark.parametrize("is_there", [True, False])
def test_the_old_version_or_the_new_one_stands_whichever_step_fails(
    write: Callable[[Path, str], None], is_there: bool, tmp_path: Path, fail_at: Callable[[int], list[str]]
) -> None:
    path = tmp_path / "target"
    new = {"": "new"} if write is write_text else {"a.txt": "new", "inside/b.txt": "new"}
    old = {name: "old" for name in new} if is_there else {}
    failed: list[str] = []
    for k in range(1, 200):
        fail_at(0)
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
        if is_there:
            write(path, "old")
        calls = fail_at(k)
        try:
            write(path, "new")
        except OSError:
            failed.append(calls[k - 1])
        fail_at(0)
        assert content(path) in (old, new), f"after call {k} ({calls[-1]}) failed"
        if len(calls) < k:
            break
    assert content(path) == new
    assert {"fsync", "replace"} <= set(failed) and len(failed) >= 4
    assert [part.name for part in tmp_path.iterdir() if not part.name.startswith(".")] == ["target"]


@pytest.mark.parametrize("write", [write_text, write_folder])
def test_what_is_written_is_on_the_disk_before_it_takes_its_place(
    write: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    sync, replace = os.fsync, os.replace

    def recorded(handle: int) -> None:
        sync(handle)
        synced.add(os.fstat(handle).st_ino)

    def checked(source: Path, target: Path) -> None:
        assert {part.stat().st_ino for part in [source, *source.rglob("*")] if part.is_file() or part == source} <= synced
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "replace", checked)
    write(tmp_path / "target", "new")
    assert tmp_path.stat().st_ino in synced  # and the new name too, afterwards


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_a_block_that_raises_leaves_the_old_version_and_no_draft(make: Callable[..., object], tmp_path: Path) -> None:
    path = tmp_path / "target"
    (write_text if make is new_file else write_folder)(path, "old")
    before = content(path)
    with pytest.raises(ZeroDivisionError), make(path) as draft:  # type: ignore[attr-defined]
        if make is new_folder:
            (draft / "a.txt").write_text("half")
        else:
            draft.write_text("half")
        raise ZeroDivisionError
    assert content(path) == before
    assert [part.name for part in tmp_path.iterdir()] == ["target"]


def test_a_new_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target/stale.txt").write_text("old")
    write_folder(tmp_path / "target", "new")
    assert content(tmp_path / "target") == {"a.txt": "new", "inside/b.txt": "new"}


def test_parent_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a/b/c.txt", "é\r\n")
    assert (tmp_path / "a/b/c.txt").read_bytes() == b"\xc3\xa9\r\n"


def test_a_text_has_unix_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one\ntwo\n")
    assert (tmp_path / "a.txt").read_bytes() == b"one\ntwo\n"


def test_the_same_value_gives_the_same_json_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "one.json", {"b": 1, "a": {"d": [1.5, None], "c": "é"}})
    write_json(tmp_path / "two.json", {"a": {"c": "é", "d": [1.5, None]}, "b": 1})
    expected = '{\n  "a": {\n    "c": "é",\n    "d": [\n      1.5,\n      null\n    ]\n  },\n  "b": 1\n}\n'
    assert (tmp_path / "one.json").read_text(encoding="utf-8") == expected
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()


def test_a_files_checksum_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert sha256_of(tmp_path / "a") == sha256_of_file(tmp_path / "a")


def test_a_folders_checksum_depends_on_names_and_bytes_and_not_on_its_own_name(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, bytes]) -> str:
        for path, body in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(body)
        return sha256_of(tmp_path / name)

    first = folder("first", {"b": b"2", "x/a": b"1"})
    one, two = hashlib.sha256(b"1").hexdigest(), hashlib.sha256(b"2").hexdigest()
    assert first == hashlib.sha256(f"b {two}\nx/a {one}\n".encode()).hexdigest()
    assert folder("same", {"x/a": b"1", "b": b"2"}) == first
    others = [{"b": b"3", "x/a": b"1"}, {"c": b"2", "x/a": b"1"}, {"b": b"2", "a": b"1"}, {"b": b"1", "x/a": b"2"}, {"b": b"2"}]
    digests = {folder(f"other{number}", files) for number, files in enumerate(others)}
    assert len(digests | {first}) == 6
