"""Language models behind HTTP: servers that Docsmith starts and stops, one client, and a store of every reply."""

import contextlib
from collections.abc import Iterator
from typing import Literal

from stages.llm.client import Tally, ask_all
from stages.llm.endpoint import Endpoint
from stages.llm.store import Reply, Request, Store, request_key
from stages.models import as_hf_folder, find_model
from stages.program.errors import BadModelFile

Engine = Literal["auto", "vllm", "llama.cpp"]

__all__ = ["Endpoint", "Engine", "Reply", "Request", "Store", "Tally", "ask_all", "request_key", "serve_model"]


@contextlib.contextmanager
def serve_model(reference: str, engine: Engine, context_tokens: int, parallel: int) -> Iterator[Endpoint]:
    """A server for the model `reference`, stopped when the block ends. `auto` is vLLM where it is installed, else llama.cpp.

    llama.cpp needs a GGUF file, vLLM a folder (a GGUF file is unpacked into one). Raises BadModelFile, ServerFailed.
    """
    from stages.llm.vllm import has_vllm, vllm_server

    if engine == "vllm" or (engine == "auto" and has_vllm()):
        with vllm_server(as_hf_folder(reference), context_tokens, parallel) as endpoint:
            yield endpoint
        return
    from stages.llm.llama_cpp import llama_server

    path = find_model(reference)
    if path.suffix != ".gguf":
        raise BadModelFile(f"models: {reference} is not a .gguf file, which llama.cpp needs; install vLLM or name a GGUF file")
    with llama_server(path, context_tokens, parallel) as endpoint:
        yield endpoint
