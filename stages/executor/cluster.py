"""One attempt at units of work by Ray Data: a pool of actors, and results as they come."""

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import stages
from stages.executor import Done, Executor, Work
from stages.program import errors
from stages.program.errors import BadParams, DocsmithError, ServerFailed

CONNECT_S = 5


class ResultLost(Exception):
    """An attempt ended early: a node took a result with it that had not been fetched."""


def connect(executor: Executor) -> None:
    """Connects this process to the cluster, whose workers then run the code of this process. Once is enough."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # a cluster that anybody may use runs anybody's code
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "5")  # tries to connect, a second each
    try:
        import ray
    except ModuleNotFoundError:
        raise BadParams("params.yaml: executor.engine is ray, which is not installed. Install it with: make team") from None
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or executor.address
    if not address:
        raise BadParams("params.yaml: executor.engine is ray; set executor.address or RAY_ADDRESS to the cluster's host:port")
    code = {"py_modules": [str(Path(stages.__file__).parent)], "excludes": ["**/__pycache__"]}
    with tempfile.TemporaryFile() as log:
        try:
            on_sigterm = signal.getsignal(signal.SIGTERM)
            with _stderr_in(log):
                if address != "auto":
                    _check_head(address)
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=code)
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own prints a trace and exits with 15
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:  # a ConnectionError is an OSError
            log.seek(0)
            if b"AuthToken" in log.read() or isinstance(error, ray.exceptions.AuthenticationError):
                reason, advice = "it asks for another token", "Name the file that holds it in RAY_AUTH_TOKEN_PATH"
            else:
                reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
                advice = "Start one with ray start, set executor.address to its head, or executor.engine to local"
            raise ServerFailed(f"the Ray cluster at {address} cannot be used ({reason}). {advice}") from None


def _check_head(address: str) -> None:
    """Asks for the cluster's id, as Ray does first; but where something else listens, Ray waits for minutes.

    Raises ConnectionError, and ray's AuthenticationError where the token is missing or another one.
    """
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel  # adds the token, and TLS where RAY_USE_TLS asks for it

    with init_grpc_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=CONNECT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise ray.exceptions.AuthenticationError(error.details()) from None
            raise ConnectionError("no head of a Ray cluster answers there") from None


@contextlib.contextmanager
def _stderr_in(log: IO[bytes]) -> Iterator[None]:
    """Until the block ends, all that this process writes to stderr goes to `log`: Ray's C++ says each try there."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _one_line(error: Exception) -> str:
    """The kind of `error`, and the beginning of what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class Starts:
    """An actor that counts the starts of workers since one last got ready: a worker that ends is started again without end."""

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0

    def begin(self) -> bool:
        """Whether one more may start."""
        self.count += 1
        return self.count <= self.most

    def succeed(self) -> None:
        self.count = 0


class Worker:
    """What an actor of Ray Data runs: makes its Work once, and does the units that it is given.

    Where `starts` allows no more, it refuses them all instead.
    """

    def __init__(self, make: Callable[..., Work], arguments: tuple[Any, ...], folder: str, starts: Any) -> None:
        import ray

        self.refusal: DocsmithError | None = None
        if Path(folder).is_dir():  # the project, where the nodes share its disk
            os.chdir(folder)
        try:
            if not ray.get(starts.begin.remote()):
                raise ServerFailed("workers end again and again while they start: killed, or out of memory. Look in Ray's logs")
            self.work = make(*arguments)
            ray.get(starts.succeed.remote())
        except DocsmithError as error:
            self.refusal = error
        except Exception as error:
            self.refusal = ServerFailed(f"the worker could not start ({_one_line(error)})")

    def __call__(self, rows: Any) -> Any:
        import pyarrow

        (name,), (unit,) = rows["name"].to_pylist(), rows["unit"].to_pylist()
        result, stop, failed = b"", "", ""
        try:
            if self.refusal:
                raise self.refusal
            result = self.work(unit)
        except DocsmithError as error:
            stop, failed = type(error).__name__, f"on {socket.gethostname()}: {error}"
        except Exception as error:  # whatever it is, another attempt may go better, and the reason is shown if none does
            failed = _one_line(error)
        text = {"name": [name], "stop": [stop], "failed": [failed]}
        return pyarrow.table(text | {"result": pyarrow.array([result], pyarrow.binary())})


def attempt(
    units: Mapping[str, bytes],
    make: Callable[..., Work],
    arguments: tuple[Any, ...],
    executor: Executor,
    at_once: int,
    waiting: int,
    has_model: bool,
) -> Iterator[Done]:
    """Those of `units` that came to an end; one whose worker ended is left out.

    Raises the DocsmithError of a worker, and ResultLost. A worker does `at_once` units at a time, and has `waiting` more at hand.
    """
    import ray.data

    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = False
    settings.max_errored_blocks = -1  # a unit whose worker ended is left to the next attempt
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # of 2.60; no other argument limits retries
    rows: list[Any] = [{"name": name, "unit": unit} for name, unit in units.items()]
    on_gpu = has_model and _has_gpu()
    most = ray.put(executor.workers * executor.attempts)
    # of the first actor, Ray says on stderr that its arguments must stay as long as it may be started again; they do
    with tempfile.TemporaryFile() as log, _stderr_in(log):
        starts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Starts).remote(most)
    found = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Worker,
        fn_constructor_args=(make, arguments, os.getcwd(), starts),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=min(executor.workers, len(rows)),
            max_tasks_in_flight_per_actor=at_once + waiting,
            max_concurrent_calls_per_actor=at_once,
            enable_true_multi_threading=True,
        ),
        num_cpus=0 if on_gpu else 1,
        num_gpus=1 if on_gpu else 0,
        max_restarts=-1,  # Ray Data replaces none, and waits for ever once all have ended
        max_task_retries=0,  # of which there is no end either
    )
    arriving: Any = found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    try:
        for block in arriving:
            for row in block.to_pylist():
                if row["stop"]:
                    raise getattr(errors, row["stop"])(row["failed"])
                yield Done(row["name"], row["result"], row["failed"])
    except ray.exceptions.RayError as error:
        raise ResultLost(str(error).splitlines()[0].rstrip(".")) from None


def _has_gpu() -> bool:
    import ray

    resources: Any = ray.cluster_resources  # it has no types
    return bool(resources().get("GPU"))
