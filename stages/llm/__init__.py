"""Language models behind HTTP: servers that Docsmith starts and stops, one client, and a store of every reply."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

from stages.llm.client import Keep, Tally, ask_all, ask_missing
from stages.llm.endpoint import Endpoint
from stages.llm.store import Rate, Reply, Request, Store, request_key
from stages.models import as_hf_folder, find_model, model_sha256
from stages.program.errors import BadModelFile

Engine = Literal["auto", "vllm", "llama.cpp"]

__all__ = [
    "Endpoint",
    "Engine",
    "Keep",
    "Rate",
    "Reply",
    "Request",
    "Store",
    "Tally",
    "ask_all",
    "ask_missing",
    "endpoints_for",
    "request_key",
    "serve_model",
    "served_model",
]


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


def endpoints_for(
    servers: contextlib.ExitStack, given: Sequence[Endpoint], reference: str, engine: Engine, context_tokens: int, parallel: int
) -> Sequence[Endpoint]:
    """`given`, or, where that is empty, a server of ours for the model `reference`, which ends with `servers`."""
    return given or [servers.enter_context(serve_model(reference, engine, context_tokens, parallel))]


def served_model(given: Sequence[Endpoint], reference: str) -> str:
    """What stands for the model in a request's key: the hash of its file, or the names that given endpoints know it by."""
    return " ".join(sorted({endpoint.model for endpoint in given})) if given else model_sha256(reference)
