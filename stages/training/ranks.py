"""Several processes that train one adapter together, each on its share of every batch: one for each GPU, or on the CPU over gloo.

torch's elastic launcher starts them and, when one is killed, all again; an outside launcher such as torchrun may start them instead.
"""

import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from stages.files import write_json
from stages.models import free_cores
from stages.program import BadParams, DocsmithError, ServerFailed, end_with_parent, errors, say

RESTARTS = 3  # of all processes, after one was killed or lost the others
TO_END_S = 5


def rank() -> int:
    """The place of this process among those that train together: 0 for the one that writes, and where it is alone."""
    return int(os.environ.get("RANK", 0))


def is_one_of_several() -> bool:
    """Whether a launcher, ours or another, has started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def threads() -> int:
    """How many threads this process should use: the free cores, divided by the processes of the training on this machine."""
    return max(1, free_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def join_ranks(store: Any = None) -> None:
    """Makes this process one of those that a launcher has started, each on its own GPU; nothing where it is alone.

    They meet at `store`, or where the launcher says.
    """
    import torch
    import torch.distributed as dist

    if not is_one_of_several() or dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # its own name for it, cpu:0, is one that torch.load does not know
    os.environ.setdefault("OMP_NUM_THREADS", str(threads()))  # else accelerate counts cores that are not free
    place: dict[str, Any] = {"rank": rank(), "world_size": int(os.environ["WORLD_SIZE"])} if store is not None else {}
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, **place)


def first_says(what: Callable[[], Any]) -> Any:
    """The result of `what`, which the process of rank 0 alone calls, in every process of the training."""
    import torch.distributed as dist

    answer = [what()] if rank() == 0 else [None]
    if is_one_of_several():
        dist.broadcast_object_list(answer)
    return answer[0]


def wait_for_all() -> None:
    """Returns when every process of the training has come here."""
    import torch.distributed as dist

    if is_one_of_several():
        dist.barrier()


def start_ranks(processes: int, main: Callable[..., object], *paths: Path, **sections: Any) -> None:
    """Runs `main` with the same arguments in `processes` processes of this machine, and ends with them.

    When one is killed or fails, all start again, a few times. Nothing listens beyond loopback.
    Raises at once a DocsmithError, or an OSError about a file, that one of them raised; BadParams where there are fewer GPUs, ServerFailed when starting again did not help.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise BadParams(f"train.processes is {processes}, and this machine has {torch.cuda.device_count()} GPUs; lower it")
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # such a store listens on all addresses
    with tempfile.TemporaryDirectory(prefix="docsmith-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="train",
            rdzv_backend="c10d",
            rdzv_endpoint=f"{folder}/rendezvous",
            rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1",
            max_restarts=RESTARTS,
            shutdown_timeout=TO_END_S,
        )
        refused = Path(folder, "refused")
        for name in ("torch.distributed.elastic", "torch.multiprocessing"):  # pages for a process that was killed
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            elastic_launch(config, _one)(os.getpid(), Path(folder), main, paths, sections)
        except SignalException as stopped:
            if stopped.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + stopped.sigval)
        except ChildFailedError as failed:
            _, first = failed.get_first_failure()
            if not refused.is_file():
                raise ServerFailed(
                    f"of {processes} processes one ended with exit code {first.exitcode}, also after {RESTARTS} new starts; see above, then: dvc repro"
                ) from None
        if refused.is_file():
            kind, details = msgspec.json.decode(refused.read_bytes())  # written by `_one`
            raise getattr(errors, kind, OSError)(*details)


def _one(stage: int, folder: Path, main: Callable[..., object], paths: tuple[Path, ...], sections: dict[str, Any]) -> None:
    """What each process does. What a person has to answer ends all of them: when they start again, they stop at once."""
    end_with_parent(signal.SIGKILL)  # in a collective, a process would not notice another signal
    if os.getppid() != stage:  # it ended before the call above
        return
    refused = folder / "refused"
    if refused.is_file():
        return
    import torch.distributed as dist

    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if attempt != "0" and rank() == 0:
        say(f"train: a process was lost; all start again ({attempt} of {RESTARTS} times)")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    join_ranks(dist.FileStore(f"{folder}/store-{attempt}", int(os.environ["WORLD_SIZE"])))  # type: ignore[attr-defined]
    try:
        main(*paths, **sections)
    except Exception as error:
        if isinstance(error, DocsmithError):
            write_json(refused, (type(error).__name__, [str(error)]))
        elif isinstance(error, OSError) and error.filename:
            write_json(refused, ("OSError", [error.errno, error.strerror, str(error.filename)]))
        else:
            traceback.print_exc()
        raise
    dist.destroy_process_group()
