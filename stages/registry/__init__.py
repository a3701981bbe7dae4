"""The versions of the model in MLflow's registry: which of them is champion, and how that changes."""

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from stages.params import Tracking
from stages.program import BadInput, Busy, say
from stages.tracking import client_of, connect, tracking_uri, without_secrets

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
HOLDER, CHANGE = "holder", "change"  # tags of the lock
KILLED_AFTER_S = 60  # a change takes a second or two; a lock that stays for so long belongs to a process that was killed
WAIT_S = 180
LOOK_AGAIN_S = 0.3


@contextlib.contextmanager
def connected(tracking: Tracking) -> Iterator[Any]:
    """An MlflowClient on the store of `tracking`. What the store refuses becomes a BadInput that names it."""
    with _refusals_of(tracking):
        yield connect(tracking)


@contextlib.contextmanager
def _refusals_of(tracking: Tracking) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
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


def find_version(tracking: Tracking, name: str, alias: str, number: str, timeout_s: int) -> Any:
    """The version of the model `name` that `alias` points to, or the one with that number. Raises BadInput where there is none.

    For programs that look often: two queries, each of which a server is asked once, for `timeout_s` seconds at most.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(timeout_s))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with _refusals_of(tracking):
        client = client_of(tracking_uri(tracking))
        found = version_named(client, name, alias) if alias else client.get_model_version(name, number)
    if found is None:
        raise BadInput(f"the model {name} has no version {alias}. Promote one with: make promote")
    return found


def version_of(client: Any, name: str, sums_sha256: str) -> Any | None:
    """The version that was made of the files with that hash of their SHA256SUMS, or None."""
    found = client.search_model_versions(f"name = '{name}' and tag.sha256sums = '{sums_sha256}'")
    return min(found, key=lambda version: int(version.version), default=None)


class Turn(NamedTuple):
    """A process's turn to change the versions of a model."""

    at: str  # by the store's clock, as 2026-01-31T12:00:00.000+00:00
    finished: dict[str, str]  # aliases that a process which was killed had begun to set, and that are set now


@contextlib.contextmanager
def changing(client: Any, name: str) -> Iterator[Turn]:
    """Lets one process at a time change the versions of `name`, on whatever machine it runs.

    Setting an alias overwrites, so two could each believe that theirs is champion. The lock is a model in the registry, since a
    name is what MLflow gives to only one of two; it holds what is being changed, so whoever takes it from a process that was killed
    finishes that. Raises Busy.
    """
    lock, holder = f"{name}.lock", f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}"
    finished = _take(client, name, holder)
    try:
        (taken,) = _model(client, lock)
        yield Turn(datetime.fromtimestamp(taken.creation_timestamp / 1000, UTC).isoformat(timespec="milliseconds"), finished)
    except BaseException:
        if not _tag(client, lock, CHANGE):  # else the next one finishes it
            client.delete_registered_model(lock)
        raise
    client.delete_registered_model(lock)


def mend(client: Any, name: str) -> None:
    """Finishes what a killed process had begun, if anything."""
    if _tag(client, f"{name}.lock", CHANGE):
        with changing(client, name):
            pass


def _take(client: Any, name: str, holder: str) -> dict[str, str]:
    """Makes the lock. Gives the aliases that a killed process had begun to set, and that are set now."""
    from mlflow.exceptions import MlflowException

    lock, finished = f"{name}.lock", dict[str, str]()
    began = seen_since = time.monotonic()
    seen = ""
    while True:
        try:
            client.create_registered_model(lock, tags={HOLDER: holder})
            return finished
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        other, now = _tag(client, lock, HOLDER), time.monotonic()
        if other and other != seen:
            say(f"promote: waiting for another promotion ({other}), which is changing the registered models")
            seen, seen_since = other, now
        elif other and now - seen_since > KILLED_AFTER_S:
            with contextlib.suppress(MlflowException):  # of two that wait, the other one was faster
                client.set_registered_model_tag(lock, HOLDER, holder)
                time.sleep(LOOK_AGAIN_S)
                if _tag(client, lock, HOLDER) == holder:
                    if begun := _tag(client, lock, CHANGE):
                        finished = _apply(client, name, json.loads(begun))
                    client.delete_registered_model(lock)
                    continue
        if now - began > WAIT_S:
            raise Busy(f"another promotion ({other}) is changing the registered models; nothing was changed. Run it again later")
        time.sleep(LOOK_AGAIN_S)


def _tag(client: Any, name: str, key: str) -> str:
    """The tag `key` of the registered model `name`; empty where there is none."""
    return next((str(model.tags.get(key, "")) for model in _model(client, name)), "")


def _model(client: Any, name: str) -> list[Any]:
    """The registered model `name`, or nothing."""
    return list(client.search_registered_models(f"name = '{name}'"))


def change(client: Any, name: str, to: Mapping[str, str], tags: Mapping[str, Mapping[str, str]]) -> None:
    """In `changing`: points each alias to its version in `to`, and sets `tags` by version; all of it, if need be by the next one.

    Raises Busy when an alias is not what was set, since somebody moves it by hand.
    """
    lock = f"{name}.lock"
    wanted = {"aliases": dict(to), "tags": {version: dict(own) for version, own in tags.items()}}
    client.set_registered_model_tag(lock, CHANGE, json.dumps(wanted))
    _apply(client, name, wanted)
    found = aliases(client, name)
    for alias, version in to.items():
        if found.get(alias) != version:
            client.delete_registered_model_tag(lock, CHANGE)
            raise Busy(f"the alias {alias} was moved to version {found.get(alias)} at the same time. Look, then run it again")


def _apply(client: Any, name: str, wanted: dict[str, Any]) -> dict[str, str]:
    for version, own in wanted["tags"].items():
        for key, value in own.items():
            client.set_model_version_tag(name, version, key, value)
    for alias, version in wanted["aliases"].items():
        client.set_registered_model_alias(name, alias, version)
    return dict(wanted["aliases"])
