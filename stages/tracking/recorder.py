"""A training's record for MLflow: kept in a file first and sent by a thread, so that MLflow may be down, slow or full.

Whatever stands in the file can be sent again: MLflow keeps a setting, a tag, a dataset or a point that it has already only once, and a
run is found again by its tag. So what the store has missed is sent by the next training at the latest, and nothing is there twice.
"""

import contextlib
import fcntl
import importlib
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from stages.params import Tracking
from stages.program import say
from stages.tracking import client_of, experiment_of, project_root, tracking_uri, without_secrets

INTERVAL_S = 10.0  # between two requests, and between two looks at the machine's load
WAIT_S = 30.0  # at the end, for a store that is slow
AT_ONCE = 1000  # points in one request, by MLflow's limit
KEY = "docsmith.key"  # the tag by which a run is found again

Line = dict[str, Any]  # the first describes the run; the others have params, tags, datasets, points or a status


class Recorder:
    """What one training tells MLflow. Nothing here raises or waits because of MLflow; `end` waits for a limited time."""

    def __init__(self, tracking: Tracking, name: str, resumes: bool) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the thread tries again by itself
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # MLflow prints it with its password
        # before the thread: two that import at once may meet half a module
        from mlflow.tracking.context.registry import resolve_tags

        self.run_id = ""  # known once the store has answered
        self._uri, self._client, self._monitors = tracking_uri(tracking), None, _load_monitors()
        self._said: set[str] = set()
        self._looked_at = -INTERVAL_S
        folder = project_root() / "models/unsent"
        found = next(_left(folder, f"{name}-*.jsonl", resumable=True), None) if resumes else None
        self._path, self._lines = found[:2] if found else (folder / f"{name}-{secrets.token_hex(4)}.jsonl", [])
        self._file = found[2] if found else None
        self._kept, self._sent = len(self._lines), 0  # lines that are in the file, and in MLflow
        self._size = self._file.tell() if self._file else 0
        self._seen = {(name, step) for line in self._lines for name, _, _, step in line.get("points", [])}
        if found:
            self.note(status=["RUNNING", _now()])
        else:
            with contextlib.suppress(OSError):  # `note` says so
                folder.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab", buffering=0)
                fcntl.flock(self._file, fcntl.LOCK_EX)
            tags = {**resolve_tags(), "dvc.experiment": os.environ.get("DVC_EXP_NAME", "")}
            sweep = os.environ.get("DVC_EXP_BASELINE_REV", "")
            self.note(name=name, experiment=tracking.experiment, start=_now(), sweep=sweep, tags=tags)
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._send_until_end, daemon=True)  # one that hangs does not keep the process
        self._thread.start()

    def note(self, **line: Any) -> None:
        """Keeps params and tags (by name), datasets (name, path, digest, context) and the like for MLflow."""
        self._lines.append(json.loads(json.dumps(line)))  # as it is read again: MLflow refuses ['q'] where it was told ('q',)
        waiting = self._lines[self._kept :]
        text = "".join(json.dumps(line) + "\n" for line in waiting).encode()
        try:
            if self._file is None:
                raise OSError("cannot be written")
            self._file.truncate(self._size)  # half a line, where the disk was full
            if self._file.write(text) < len(text):
                raise OSError("the disk is full")
            self._kept, self._size = self._kept + len(waiting), self._size + len(text)
        except OSError as error:
            self._say_once(
                "file", f"{self._path}: {error.strerror or error}; what MLflow does not take during this training is lost"
            )

    def points(self, figures: Mapping[str, float], step: int) -> None:
        """Keeps `figures` as points of their curves. What a resumed training computes a second time is left out."""
        new = {name: float(value) for name, value in figures.items() if (name, step) not in self._seen}
        self._seen |= {(name, step) for name in new}
        if new:
            self.note(points=[(name, value, _now(), step) for name, value in new.items()])

    def look(self, step: int) -> None:
        """Keeps the load of the processor, memory, disk, network and GPU, by MLflow's names, at most every INTERVAL_S."""
        if time.monotonic() - self._looked_at >= INTERVAL_S:
            self._looked_at = time.monotonic()
            for monitor in self._monitors:
                monitor.collect_metrics()
                self.points({f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}, step)
                monitor.clear_metrics()

    def end(self, status: str, wait_s: float) -> None:
        """Ends the run. Waits up to `wait_s` seconds for MLflow; what it has not taken by then stays in the file."""
        self.note(status=[status, _now()])
        self._is_ending.set()
        self._thread.join(wait_s)
        if self._file:
            if status == "FINISHED" and self._sent == len(self._lines):
                self._path.unlink(missing_ok=True)
            self._file.close()

    @property
    def outcome(self) -> str:
        """Where the record is, after `end`, for the line that ends a training."""
        if self._sent == len(self._lines):
            return f"MLflow run {self.run_id}"
        if self._kept == len(self._lines):
            return f"MLflow has not taken everything; {self._path} is kept, and the next training sends it"
        return f"MLflow has not taken everything, and {self._path} could not be written"

    def _send_until_end(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._is_ending.is_set()
            path = self._path
            try:
                self._client = self._client or client_of(self._uri)
                lines = self._lines[self._sent :]
                self.run_id = self.run_id or _run_of(self._client, self._path.stem, self._lines[0])
                _send(self._client, self.run_id, lines)
                self._sent += len(lines)
                for path, lines, file in _left(self._path.parent, "*.jsonl"):
                    with file:
                        _send(self._client, _run_of(self._client, path.stem, lines[0]), _ended(lines, path))
                        path.unlink()
                    say(f"train: what {path} had kept of an earlier training is in MLflow now")
                self._said.discard("store")
            except Exception as error:  # MLflow, SQLAlchemy and requests each have their own, and none may end a training
                where = without_secrets(f"MLflow at {self._uri}")
                reason = without_secrets(" ".join(str(error).split())[:160])
                self._say_once("store", f"{where} fails: {reason}; training goes on, and {path} keeps what is to be sent")
            self._is_ending.wait(INTERVAL_S)

    def _say_once(self, about: str, line: str) -> None:
        if about not in self._said:
            say(f"train: {line}")
        self._said.add(about)


@contextlib.contextmanager
def recording(tracking: Tracking, name: str, resumes: bool) -> Iterator[Recorder]:
    """A Recorder for the run `name`: a new one, or with `resumes` the last one of that name, if it was stopped."""
    recorder = Recorder(tracking, name, resumes)
    try:
        yield recorder
    except BaseException as error:
        recorder.end("FAILED" if isinstance(error, Exception) else "KILLED", 3.0)
        raise
    recorder.end("FINISHED", WAIT_S)


def _left(folder: Path, pattern: str, resumable: bool = False) -> Iterator[tuple[Path, list[Line], IO[bytes]]]:
    """Files of trainings that are at work no more, each with its lines, open and held; with `resumable`, of those that were stopped."""
    for path in sorted(folder.glob(pattern)):
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError, ValueError):  # one at work holds its own
            file = opened.enter_context(path.open("ab+", buffering=0))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.seek(0)
            whole, newline, _ = file.read().rpartition(b"\n")
            file.seek(len(whole + newline))
            file.truncate()  # half a line
            lines = [json.loads(line) for line in whole.splitlines()]
            if not lines:
                path.unlink()
            elif not (resumable and _status(lines) == "FINISHED"):
                opened.pop_all()
                yield path, lines, file


def _status(lines: Sequence[Line]) -> str:
    return next((line["status"][0] for line in reversed(lines) if "status" in line), "RUNNING")


def _ended(lines: list[Line], path: Path) -> list[Line]:
    """`lines` with an end: a training that was killed wrote none."""
    return lines if _status(lines) != "RUNNING" else [*lines, {"status": ["KILLED", int(path.stat().st_mtime * 1000)]}]


def _run_of(client: Any, key: str, first: Line) -> str:
    """The id of the run with this key, made from its `first` line where there is none; inside its sweep's run, if it has one."""
    experiment, tags = experiment_of(client, first["experiment"]), dict(first["tags"])
    if first["sweep"]:
        sweep = f"sweep-{first['sweep'][:8]}"
        parent = _found_or_made(client, experiment, sweep, sweep, {"git.commit": first["sweep"]}, first["start"])
        client.set_terminated(parent, "FINISHED")
        tags["mlflow.parentRunId"] = parent
    return _found_or_made(client, experiment, key, first["name"], tags, first["start"])


def _found_or_made(client: Any, experiment: str, key: str, name: str, tags: Mapping[str, str], start: int) -> str:
    def found() -> list[str]:
        runs = client.search_runs(
            [experiment], f"tags.`{KEY}` = '{key}'", order_by=["attributes.start_time", "attributes.run_id"]
        )
        return [run.info.run_id for run in runs]

    if not (known := found()):
        made = client.create_run(experiment, start, {**tags, KEY: key}, name).info.run_id
        known = found()
        if known[0] != made:  # another training of the sweep was faster
            client.delete_run(made)
    return str(known[0])


def _send(client: Any, run_id: str, lines: Sequence[Line]) -> None:
    """Sends `lines` to the run in few requests. Raises what MLflow raises; some of them may have arrived then."""
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined]
    from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag

    params = {name: str(value) for line in lines for name, value in line.get("params", {}).items()}
    tags = {name: str(value) for line in lines for name, value in line.get("tags", {}).items() if value != ""}
    points = [Metric(*point) for line in lines for point in line.get("points", [])]
    inputs = []
    for name, path, digest, context in (entry for line in lines for entry in line.get("datasets", [])):
        dataset = MetaDataset(LocalArtifactDatasetSource(path), name=name, digest=digest)  # type: ignore[abstract]
        inputs.append(DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", context)]))
    if params or tags:
        client.log_batch(run_id, params=[Param(*one) for one in params.items()], tags=[RunTag(*one) for one in tags.items()])
    for start in range(0, len(points), AT_ONCE):
        client.log_batch(run_id, metrics=points[start : start + AT_ONCE])
    if inputs:
        client.log_inputs(run_id, inputs)
    for status, at in (line["status"] for line in lines if "status" in line):
        client.update_run(run_id, status) if status == "RUNNING" else client.set_terminated(run_id, status, at)


def _load_monitors() -> list[Any]:
    """MLflow's monitors that work on this machine, without MLflow's thread for them, which waits for the server."""
    found = []
    for part, kind in (("cpu", "CPUMonitor"), ("disk", "DiskMonitor"), ("network", "NetworkMonitor"), ("gpu", "GPUMonitor")):
        with contextlib.suppress(Exception):  # no such device, or a system that hides its counters
            monitor = getattr(importlib.import_module(f"mlflow.system_metrics.metrics.{part}_monitor"), kind)()
            monitor.collect_metrics()  # the processor's load is what it was since the last look
            monitor.clear_metrics()
            found.append(monitor)
    return found


def _now() -> int:
    return int(time.time() * 1000)
