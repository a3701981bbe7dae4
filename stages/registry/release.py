"""The files of a registered version, wherever they are by now."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.files import sha256_of_file
from stages.program.errors import BadModelFile
from stages.release import RELEASE_FILE, SOURCES_FILE, SUMS_FILE, gguf_name, read_release
from stages.tracking import project_root


@contextlib.contextmanager
def release_of(tags: Mapping[str, str]) -> Iterator[Path]:
    """A folder with what serves the version with these tags: its GGUF file, release.json, sources and SHA256SUMS, checked.

    They are used where the version was exported, else linked from DVC's cache for as long as the block lasts, and fetched into it
    from DVC's remote where they are not there. Raises BadModelFile.
    """
    own = project_root() / tags["gguf_path"]
    fault = _fault(own, tags)
    if not fault:
        yield own
        return
    with tempfile.TemporaryDirectory(prefix="docsmith-") as folder:
        missing = _link_from_dvc(tags, Path(folder))
        if missing or (missing := _fault(Path(folder), tags)):
            raise BadModelFile(f"{fault}; {missing}")
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


def _link_from_dvc(tags: Mapping[str, str], folder: Path) -> str:
    """Links the version's files into `folder`; gives the reason where DVC has them not."""
    from dvc.repo import Repo
    from dvc_data.hashfile import load
    from dvc_data.hashfile.hash_info import HashInfo

    if "gguf_md5" not in tags:
        return "DVC did not know its files when it was registered"
    whole = HashInfo("md5", tags["gguf_md5"])
    names = {RELEASE_FILE, SOURCES_FILE, SUMS_FILE, gguf_name(tags["quant"])}
    try:
        with Repo(str(project_root())) as repo:
            cache = repo.cache.local
            if not cache.exists(whole.value):
                repo.cloud.pull([whole])
            tree: Any = load(cache, whole)
            parts = {"/".join(key): part for key, _, part in tree}
            wanted = {name: part for name, part in parts.items() if name in names}
            if absent := [part for part in wanted.values() if not cache.exists(part.value)]:
                repo.cloud.pull(absent)
            for name, part in wanted.items():
                (folder / name).symlink_to(Path(cache.oid_to_path(part.value)).resolve())
    except Exception as error:  # every kind of remote has its own; without the files, the version is known by what was kept of it
        return f"DVC has them neither in its cache nor in a remote ({' '.join(str(error).split())[:160]})"
    return ""
