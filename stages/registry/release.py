"""The files of a registered version, wherever they are by now."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.files import sha256_of, sha256_of_file
from stages.program.errors import BadModelFile
from stages.release import RELEASE_FILE, SOURCES_FILE, SUMS_FILE, gguf_name, read_release
from stages.tracking import project_root


@contextlib.contextmanager
def release_of(tags: Mapping[str, str]) -> Iterator[Path]:
    """A folder with what serves the version with these tags: its GGUF file, release.json, SHA256SUMS and sources.jsonl, if it has one,
    checked against the tags.

    They are used where the version was exported, else linked from DVC's cache for as long as the block lasts, and fetched into it
    from DVC's remote where they are not there. Raises BadModelFile.
    """
    own = project_root() / tags["gguf_path"]
    fault = _fault(own, tags)
    if not fault:
        yield own
        return
    with tempfile.TemporaryDirectory(prefix="docsmith-") as folder:
        names = {RELEASE_FILE, SUMS_FILE, SOURCES_FILE, gguf_name(tags["quant"])}
        missing = _link_from_dvc(tags.get("gguf_md5", ""), names.__contains__, Path(folder))
        if missing or (missing := _fault(Path(folder), tags)):
            raise BadModelFile(f"{fault}; {missing}")
        yield Path(folder)


@contextlib.contextmanager
def adapter_of(tags: Mapping[str, str]) -> Iterator[Path]:
    """A folder with the adapter that the version with these tags was made of, found as in `release_of`. Raises BadModelFile."""
    own = project_root() / tags["adapter_path"]
    if own.is_dir() and sha256_of(own) == tags["adapter_sha256"]:
        yield own
        return
    with tempfile.TemporaryDirectory(prefix="docsmith-") as folder:
        missing = _link_from_dvc(tags.get("adapter_md5", ""), lambda name: True, Path(folder))
        if missing:
            raise BadModelFile(f"{own} is another adapter; {missing}")
        yield Path(folder)


def _fault(folder: Path, tags: Mapping[str, str]) -> str:
    """Why the files in `folder` are not the version's, or an empty string."""
    sums = folder / SUMS_FILE
    if not sums.is_file() or sha256_of_file(sums) != tags["sha256sums"]:
        return f"{folder} holds other files"
    try:
        read_release(folder)
    except BadModelFile as error:
        return str(error)
    return ""


def _link_from_dvc(md5: str, is_wanted: Callable[[str], bool], folder: Path) -> str:
    """Links the wanted files of the tree with that hash into `folder`; gives the reason where DVC has them not."""
    from dvc.repo import Repo
    from dvc_data.hashfile import load
    from dvc_data.hashfile.hash_info import HashInfo

    if not md5:
        return "DVC did not know its files when it was registered"
    whole = HashInfo("md5", md5)
    try:
        with Repo(str(project_root())) as repo:
            cache = repo.cache.local
            if not cache.exists(whole.value):
                repo.cloud.pull([whole])
            tree: Any = load(cache, whole)
            parts = {"/".join(key): part for key, _, part in tree}
            wanted = {name: part for name, part in parts.items() if is_wanted(name)}
            if absent := [part for part in wanted.values() if not cache.exists(part.value)]:
                repo.cloud.pull(absent)
            for name, part in wanted.items():
                (folder / name).symlink_to(Path(cache.oid_to_path(part.value)).resolve())
    except Exception as error:  # every kind of remote has its own; without the files, the version is known by what was kept of it
        return f"DVC has them neither in its cache nor in a remote ({' '.join(str(error).split())[:160]})"
    return ""
