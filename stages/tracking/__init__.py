"""The connection to MLflow, for training and promotion."""

import os
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
    file = Path(path).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{file}"


def connect(tracking: Tracking) -> Any:
    """An MlflowClient for the tracking store, with the experiment in place; mlflow's own functions use the same store."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import logging

    import mlflow

    for name in ("alembic", "mlflow.store.db.utils"):  # a line for every migration of a fresh database
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(tracking)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    if mlflow.get_experiment_by_name(tracking.experiment) is None:
        # artifacts lie beside the database; a server decides for itself
        place = Path("models/mlruns").resolve().as_uri() if uri.startswith("sqlite") else None
        mlflow.create_experiment(tracking.experiment, artifact_location=place)
    mlflow.set_experiment(tracking.experiment)
    return mlflow.MlflowClient()


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
