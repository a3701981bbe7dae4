"""The versions of the model in MLflow's registry: which one is champion, how that changes, and where a version's files are."""

import contextlib
import json
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages.files import sha256_of_file
from stages.params import Tracking
from stages.program.errors import BadInput, BadModelFile, Busy
from stages.release import RELEASE_FILE, SUMS_FILE, gguf_name, read_release
from stages.tracking import connect, project_root, tracking_uri, without_secrets

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
UNFINISHED = "unfinished_change"  # a tag of the model
KILLED_AFTER_S = 60  # a change takes a second or two; a lock that stays for so long belongs to a process that was killed
WAIT_S = 180
LOOK_AGAIN_S = 0.3


@contextlib.contextmanager
def connected(tracking: Tracking) -> Iterator[Any]:
    """An MlflowClient on the store of `tracking`. What the store refuses becomes a BadInput that names it."""
    from mlflow.exceptions import MlflowException

    try:
        yield connect(tracking)
    except MlflowException as error:
        reason = without_secrets(str(error).splitlines()[0])
        where = without_secrets(tracking_uri(tracking))
        raise BadInput(f"MLflow at {where}: {reason}. Check tracking in params.yaml") from None


def aliases(client: Any, name: str) -> dict[str, str]:
    """The version that each alias of the model `name` points to; {} where there is no such model."""
    return {alias: str(version) for model in _model(client, name) for alias, version in model.aliases.items()}


def version_named(client: Any, name: str, alias: str) -> Any | None:
    """The version that `alias` points to, or None."""
    number = aliases(client, name).get(alias)
    return client.get_model_version(name, number) if number else None


def version_of(client: Any, name: str, sums_sha256: str) -> Any | None:
    """The version that was made of the files with that hash of their SHA256SUMS, or None."""
    found = client.search_model_versions(f"name = '{name}' and tag.sha256sums = '{sums_sha256}'")
    return min(found, key=lambda version: int(version.version), default=None)


@contextlib.contextmanager
def changing(client: Any, name: str) -> Iterator[str]:
    """Lets one process at a time change the versions of `name`, on whatever machine it runs. Gives the time, by the store's clock.

    Setting an alias overwrites, so two could each believe that theirs is champion. The lock is a model in the registry, since a
    name is what MLflow gives to only one of two. What a killed process had begun is finished first. Raises Busy.
    """
    lock, holder = f"{name}.lock", f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}"
    _take(client, lock, holder)
    try:
        (model,) = _model(client, lock)
        for changed in _model(client, name):
            if UNFINISHED in changed.tags:
                _apply(client, name, json.loads(changed.tags[UNFINISHED]))
        yield datetime.fromtimestamp(model.creation_timestamp / 1000, UTC).isoformat(timespec="seconds")
    finally:
        if _holder(client, lock) == holder:
            client.delete_registered_model(lock)


def _take(client: Any, lock: str, holder: str) -> None:
    from mlflow.exceptions import MlflowException

    began = seen_since = time.monotonic()
    seen = ""
    while True:
        try:
            client.create_registered_model(lock, tags={"holder": holder})
            return
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        other, now = _holder(client, lock), time.monotonic()
        if other != seen:
            seen, seen_since = other, now
        elif other and now - seen_since > KILLED_AFTER_S:
            client.delete_registered_model(lock)
        if now - began > WAIT_S:
            raise Busy(f"another promotion ({other}) is changing the registered models; nothing was changed. Run it again later")
        time.sleep(LOOK_AGAIN_S)


def _holder(client: Any, lock: str) -> str:
    return next((str(model.tags.get("holder")) for model in _model(client, lock)), "")


def _model(client: Any, name: str) -> list[Any]:
    """The registered model `name`, or nothing."""
    return list(client.search_registered_models(f"name = '{name}'"))


def change(client: Any, name: str, to: Mapping[str, str], tags: Mapping[str, Mapping[str, str]]) -> None:
    """Points each alias to its version in `to`, and sets `tags` by version: all of it, or after a crash by the next `changing`.

    Raises Busy when the aliases are not what was set, since somebody else moves them, as by hand.
    """
    wanted = {"aliases": dict(to), "tags": {version: dict(own) for version, own in tags.items()}}
    client.set_registered_model_tag(name, UNFINISHED, json.dumps(wanted))
    _apply(client, name, wanted)
    found = aliases(client, name)
    for alias, version in to.items():
        if found.get(alias) != version:
            raise Busy(f"the alias {alias} was moved to version {found.get(alias)} at the same time. Look, then run it again")


def _apply(client: Any, name: str, wanted: dict[str, Any]) -> None:
    for version, own in wanted["tags"].items():
        for key, value in own.items():
            client.set_model_version_tag(name, version, key, value)
    for alias, version in wanted["aliases"].items():
        client.set_registered_model_alias(name, alias, version)
    client.delete_registered_model_tag(name, UNFINISHED)


@contextlib.contextmanager
def release_of(tags: Mapping[str, str]) -> Iterator[Path]:
    """A folder with what serves the version with these tags: its GGUF file, release.json and SHA256SUMS, checked against the tags.

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
    names = {RELEASE_FILE, SUMS_FILE, gguf_name(tags["quant"])}
    try:
        with Repo(str(project_root())) as repo:
            cache = repo.cache.local
            if not cache.exists(whole.value):
                repo.cloud.pull([whole])
            parts = {"/".join(key): part for key, _, part in load(cache, whole)}
            wanted = {name: part for name, part in parts.items() if name in names}
            if absent := [part for part in wanted.values() if not cache.exists(part.value)]:
                repo.cloud.pull(absent)
            for name, part in wanted.items():
                (folder / name).symlink_to(Path(cache.oid_to_path(part.value)).resolve())
    except Exception as error:  # every kind of remote has its own; without the files, the version is known by what was kept of it
        return f"DVC has them neither in its cache nor in a remote ({' '.join(str(error).split())[:160]})"
    return ""
