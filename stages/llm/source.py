"""Who answers a stage's requests: endpoints of the user's, or a server that Docsmith starts."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import msgspec

from stages.llm.endpoint import Endpoint
from stages.models import as_hf_folder, find_model, model_sha256
from stages.program.errors import BadModelFile

Engine = Literal["auto", "vllm", "llama.cpp"]


class Source(msgspec.Struct, frozen=True):
    """The servers at `endpoints`, or, where there are none, one of ours for the model `reference`; how much each is asked at once."""

    endpoints: tuple[Endpoint, ...]
    reference: str
    engine: Engine
    context_tokens: int
    concurrency: int
    timeout_s: int

    def model(self) -> str:
        """What stands for the model in a request's key: the hash of its file, or the names that given endpoints know it by."""
        return " ".join(sorted({one.model for one in self.endpoints})) if self.endpoints else model_sha256(self.reference)


@contextlib.contextmanager
def serve_model(source: Source) -> Iterator[Endpoint]:
    """A server for `source.reference`, stopped when the block ends. `auto` is vLLM where it is installed, else llama.cpp.

    llama.cpp needs a GGUF file, vLLM a folder (a GGUF file is unpacked into one). Raises BadModelFile, ServerFailed.
    """
    from stages.llm.vllm import has_vllm, vllm_server

    if source.engine == "vllm" or (source.engine == "auto" and has_vllm()):
        with vllm_server(as_hf_folder(source.reference), source.context_tokens, source.concurrency) as endpoint:
            yield endpoint
        return
    from stages.llm.llama_cpp import llama_server

    path = find_model(source.reference)
    if path.suffix != ".gguf":
        raise BadModelFile(
            f"models: {source.reference} is not a .gguf file, which llama.cpp needs; install vLLM or name a GGUF file"
        )
    with llama_server(path, source.context_tokens, source.concurrency) as endpoint:
        yield endpoint
