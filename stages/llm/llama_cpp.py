"""llama.cpp's OpenAI-style server, which xllamacpp runs inside a Python process: ours runs it in a child of its own."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from stages.llm.child import Started, running_server
from stages.llm.endpoint import Endpoint, free_port
from stages.models.gguf import read_gguf
from stages.program.errors import BadModelFile

START_S = 300  # a few GB from a slow disk
SPINS = "1000"  # of a thread that waits for the others, before it sleeps
SPARE_CONNECTIONS = 64  # beside one for each answer: for /health, and for what waits here while other replicas are down


@contextlib.contextmanager
def llama_server(gguf: Path, context_tokens: int, parallel: int, started: Started = lambda child: None) -> Iterator[Endpoint]:
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
    # the child finds `stages` from any working directory. Threads that spin while others use their cores as well hold each other up:
    # on two busy cores, two wrote 1 to 9 tokens/s, with the limit 24, and one alone 30
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "GOMP_SPINCOUNT": SPINS}
    address = f"http://127.0.0.1:{port}"
    with running_server("llama.cpp", command, environment, f"{address}/health", START_S, started):
        yield Endpoint(url=f"{address}/v1", model=gguf.stem)


def _serve(gguf: Path, port: int, context_tokens: int, parallel: int) -> None:
    """Serves until a signal ends the process."""
    import xllamacpp

    from stages.models import free_cores

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.model_alias = {gguf.stem}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_ctx = context_tokens * parallel  # llama.cpp rounds each slot's share up to a multiple of 256
    params.n_parallel = parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = free_cores()
    params.n_threads_http = parallel + SPARE_CONNECTIONS  # each request holds one until it is answered
    # a conversation goes on in the slot that holds two fifths of it. By the default, a tenth, all have their system prompt in common: three in
    # turn took one slot from each other, and at the fourth question 166 tokens were read where 21 were new, in 600 ms in place of 130
    params.slot_prompt_similarity = 0.4  # at 0.5, a second question as long as the first was read in another slot
    params.cache_ram_mib = 0  # the default keeps up to 8 GB of what others asked
    params.verbosity = 1  # errors; the default writes 1 KB for each request
    params.use_jinja = True
    params.ui = params.endpoint_slots = False  # /slots shows what others asked
    params.cors_origins = f"http://127.0.0.1:{port}"  # the default lets any page in a browser read the answers
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        sys.exit(f"Error: {gguf} is not a GGUF model that it can load")
    while server.listening_address:
        signal.pause()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), *map(int, sys.argv[2:]))
