"""llama.cpp's OpenAI-style server, which xllamacpp runs inside a Python process: ours runs it in a child of its own."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from stages.llm.child import running_server
from stages.llm.endpoint import Endpoint, free_port
from stages.models.gguf import read_gguf
from stages.program.errors import BadModelFile

START_S = 300  # a few GB from a slow disk
SAMPLE_S = 0.3


@contextlib.contextmanager
def llama_server(gguf: Path, context_tokens: int, parallel: int) -> Iterator[Endpoint]:
    """Serves `gguf` to `parallel` requests at once, each with `context_tokens` of context, by the chat template in the file.

    Beside /v1, the server answers llama.cpp's own /props, /tokenize and /apply-template. Control tokens in a user's text
    ("<|im_end|>") count as control tokens there; `stages.release.plain_text` breaks them up.
    Raises BadModelFile when the file is not there or not safe to open, ServerFailed when llama.cpp does not start.
    """
    if not gguf.is_file():
        raise BadModelFile(f"{gguf} is missing; build it with: dvc repro export")
    read_gguf(gguf)
    port = free_port()
    command = [sys.executable, "-m", "stages.llm.llama_cpp", str(gguf), str(port), str(context_tokens), str(parallel)]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}  # the child finds `stages` from any working directory
    address = f"http://127.0.0.1:{port}"
    with running_server("llama.cpp", command, environment, f"{address}/health", START_S):
        yield Endpoint(url=f"{address}/v1", model=gguf.stem)


def _serve(gguf: Path, port: int, context_tokens: int, parallel: int) -> None:
    """Serves until a signal ends the process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.model_alias = {gguf.stem}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_ctx = context_tokens * parallel  # llama.cpp rounds each slot's share up to a multiple of 256
    params.n_parallel = parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = idle_cores()
    params.use_jinja = True
    params.ui = params.endpoint_slots = False  # /slots shows what others asked
    params.cors_origins = f"http://127.0.0.1:{port}"  # the default lets any page in a browser read the answers
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        sys.exit(f"Error: {gguf} is not a GGUF model that it can load")
    while server.listening_address:
        signal.pause()


def idle_cores() -> int:
    """How many of this process's cores were idle for the last third of a second, at least 1; all of them where nobody counts.

    llama.cpp's threads spin while they wait for each other. Two of them on two cores that others used as well wrote 8 tokens/s,
    one wrote 55.
    """
    from stages.models import free_cores

    try:
        before = _core_times()
        time.sleep(SAMPLE_S)
        after = _core_times()
    except OSError:  # no /proc
        return free_cores()
    idle = sum(after[core][0] - before[core][0] for core in after)
    passed = sum(after[core][1] - before[core][1] for core in after)
    return max(1, round(idle / passed * free_cores())) if passed else free_cores()


def _core_times() -> dict[str, tuple[int, int]]:
    """The idle and the whole time, in ticks since the machine started, of each core that this process may run on."""
    ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    lines = [line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines() if line.startswith("cpu")]
    return {name: (int(ticks[3]), sum(map(int, ticks[:8]))) for name, *ticks in lines if name in ours}


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), *map(int, sys.argv[2:]))
