"""The connection to MLflow, for training and promotion."""

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from stages.params import Tracking

DVC_LOCK = Path("dvc.lock")


def tracking_uri(tracking: Tracking) -> str:
    """MLFLOW_TRACKING_URI when it is set, else `tracking.uri` with a relative SQLite path made absolute: MLflow keeps it as given."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri
    head, _, path = uri.partition(":///")
    if head != "sqlite" or path.startswith("/"):
        return uri
    file = (project_root() / path).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{file}"


def project_root() -> Path:
    """The folder of the project: also inside `dvc exp run --queue`, whose runs work in a copy that is removed when they end."""
    return Path(os.environ.get("DVC_ROOT", "."))


def without_secrets(text: str) -> str:
    """`text` without the users, passwords and queries of its URLs."""
    return re.sub(r"(://)[^/\s]*@|(?<=\S)\?\S+", r"\1", text)


def client_of(uri: str) -> Any:
    """An MlflowClient for the store at `uri`, which is made where it is missing. Raises what MLflow raises."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import logging

    import mlflow

    for name in ("alembic", "mlflow.store.db.utils"):  # a line for every migration of a fresh database
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow.MlflowClient(uri, uri)


def experiment_of(client: Any, name: str) -> str:
    """The id of the experiment `name`, which is made where it is missing."""
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    # artifacts lie beside the database; a server decides for itself
    place = (project_root() / "models/mlruns").resolve().as_uri() if client.tracking_uri.startswith("sqlite") else None
    from mlflow.exceptions import MlflowException

    try:
        return str(client.create_experiment(name, artifact_location=place))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return str(client.get_experiment_by_name(name).experiment_id)  # another process was first


def connect(tracking: Tracking) -> Any:
    """An MlflowClient for the tracking store, with the experiment in place; mlflow's own functions use the same store."""
    uri = tracking_uri(tracking)
    client = client_of(uri)
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    mlflow.set_experiment(experiment_id=experiment_of(client, tracking.experiment))
    return client


def git_commit() -> str:
    """The commit that is checked out, or an empty string outside git and before the first commit."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else ""


def dvc_md5(path: str, lock: Path = DVC_LOCK) -> str:
    """The md5 that dvc.lock has for the out or dep `path`, or an empty string."""
    import yaml

    stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {}) if lock.is_file() else {}
    entries = [entry for stage in stages.values() for kind in ("outs", "deps") for entry in stage.get(kind, [])]
    return next((entry["md5"] for entry in entries if entry["path"] == path and "md5" in entry), "")


def folder_md5(folder: Path) -> str:
    """The hash that DVC gives to a folder: the md5 of a JSON list of its files' md5s and paths, by path."""
    parts = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    listed = []
    for name, path in parts:
        with open(path, "rb") as stream:
            listed.append({"md5": hashlib.file_digest(stream, "md5").hexdigest(), "relpath": name})
    return hashlib.md5(json.dumps(listed).encode()).hexdigest() + ".dir"
