"""vLLM's OpenAI-style server, on the CPU or the GPU as it was installed."""

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.llm.child import Started, running_server
from stages.llm.endpoint import Endpoint, free_port
from stages.program.errors import BadParams

START_S = 600  # a large model from a slow disk; a small one on two cores takes a minute
ADAPTED = "docsmith"  # the name of the model with the adapter; the folder's name is the model without it
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for


def has_vllm() -> bool:
    """Whether vLLM is installed; it is not imported for the answer."""
    return importlib.util.find_spec("vllm") is not None


@contextlib.contextmanager
def vllm_server(
    folder: Path,
    context_tokens: int,
    parallel: int,
    adapter: Path | None = None,
    started: Started = lambda child: None,
    replica: int | None = None,
) -> Iterator[Endpoint]:
    """Serves the model in `folder`, with the LoRA weights in `adapter` if given, to `parallel` requests at once.

    The replica `replica`, counted from 0, takes the GPU of that number for itself. Raises ServerFailed when it does not start,
    BadParams when there is no such GPU.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--served-model-name", folder.name]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "bfloat16", "--max-model-len", str(context_tokens), "--max-num-seqs", str(parallel)]
    command += ["--disable-log-stats", "--disable-uvicorn-access-log"]  # else a server of weeks fills /tmp with its health checks
    if adapter:
        rank = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        room = next((size for size in LORA_RANKS if size >= rank), rank)
        command += ["--enable-lora", "--max-lora-rank", str(room), "--lora-modules", f"{ADAPTED}={adapter.resolve()}"]
    environment = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    if not _has_cuda():
        command += ["--enforce-eager"]  # compiled starts a minute later, and a run here takes only a few
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": _own_cores(), "VLLM_CPU_KVCACHE_SPACE": "2"}
    elif replica is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu_of(replica, _gpus())
    with running_server("vLLM", command, environment, f"http://127.0.0.1:{port}/health", START_S, started):
        yield Endpoint(url=f"http://127.0.0.1:{port}/v1", model=ADAPTED if adapter else folder.name)


def gpu_of(replica: int, gpus: Sequence[str]) -> str:
    """The one of `gpus` that the replica of that number, from 0 on, runs on. Raises BadParams when there are too few."""
    if replica >= len(gpus):
        raise BadParams(f"params.yaml: each of serve.replicas needs a GPU under vLLM; this machine shows {len(gpus)}")
    return gpus[replica]


def _gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _own_cores() -> str:
    return ",".join(map(str, sorted(os.sched_getaffinity(0))))  # the default keeps one core idle for the server itself
