"""The folder that `export` writes and that serve, chat and promote open: GGUF files, a Modelfile, release.json, SHA256SUMS."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from stages.chats import chat_sha256
from stages.chats.template import check_template
from stages.files import sha256_of_file, write_json, write_text
from stages.llm.child import Started
from stages.llm.endpoint import Endpoint
from stages.models.gguf import read_gguf
from stages.params import Chat
from stages.program.errors import BadModelFile, BadParams, ServerFailed

RELEASE_FILE = "release.json"
SUMS_FILE = "SHA256SUMS"
SOURCES_FILE = "sources.jsonl"  # a Passage a line
CARD_FILE = "README.md"
ADAPTER_FILE = "docsmith-adapter.gguf"  # the adapter alone, for llama.cpp with a GGUF file of the base model
REBUILD = "rebuild it with: dvc repro --force export"
REQUEST_S = 600  # for one answer; a long queue on two cores takes minutes


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the GGUF files of one export were made from, and how they are to be asked."""

    base: str  # model reference
    base_sha256: str
    adapter_sha256: str
    chat_sha256: str  # of chat template and system prompt
    system_prompt: str
    control_tokens: tuple[str, ...]  # texts that stand for one token each, as "<|im_end|>"
    quants: tuple[str, ...]
    serve: str  # the one of `quants` that serve and chat run
    context_tokens: int
    max_new_tokens: int


def gguf_name(quant: str) -> str:
    """The file name of the GGUF file in the format `quant`."""
    return f"docsmith-{quant}.gguf"


def write_release(folder: Path, release: Release) -> None:
    """Adds release.json, and then SHA256SUMS over every other file (what `sha256sum -c` reads)."""
    write_json(folder / RELEASE_FILE, release)
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS_FILE)
    write_text(folder / SUMS_FILE, "".join(f"{sha256_of_file(folder / name)}  {name}\n" for name in names))


def read_release(folder: Path) -> Release:
    """The release in `folder`: release.json, sources and the served file checked against SHA256SUMS, and what that file is.

    Raises BadModelFile; after it, an engine may open the served file.
    """
    if not (folder / SUMS_FILE).is_file():
        raise BadModelFile(f"{folder} has no {SUMS_FILE}, so it is not an export; build it with: dvc repro export")
    sums = _read_sums(folder / SUMS_FILE)
    _check_sum(folder, RELEASE_FILE, sums)
    try:
        release = msgspec.json.decode((folder / RELEASE_FILE).read_bytes(), type=Release)
    except msgspec.DecodeError as error:
        raise BadModelFile(f"{folder / RELEASE_FILE} is not a release: {error}; {REBUILD}") from None
    served = gguf_name(release.serve)
    for name in [served, SOURCES_FILE] if SOURCES_FILE in sums else [served]:
        _check_sum(folder, name, sums)
    check_served(folder / served, release)
    return release


def check_served(gguf: Path, release: Release) -> None:
    """Raises BadModelFile unless `gguf` is safe to open, and its chat template is the release's and renders a chat in a sandbox."""
    chat_template = read_gguf(gguf).values.get("tokenizer.chat_template", "")
    if chat_sha256(chat_template, release.system_prompt) != release.chat_sha256:
        raise BadModelFile(f"{gguf.parent}: the chat template in {gguf.name} is not the release's; {REBUILD}")
    check_template(chat_template, str(gguf))


def _read_sums(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _check_sum(folder: Path, name: str, sums: dict[str, str]) -> None:
    path = folder / name
    if not path.is_file() or name not in sums:
        raise BadModelFile(f"{path} is missing or not in {SUMS_FILE}; {REBUILD}")
    found = _sha256(path, stamp_of(path))
    if found != sums[name]:
        raise BadModelFile(f"{path} is damaged: its SHA-256 is {found[:12]}…, {SUMS_FILE} says {sums[name][:12]}…; {REBUILD}")


def stamp_of(path: Path) -> tuple[int, ...]:
    """What changes when the file at `path` is written or replaced; () where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@functools.lru_cache
def _sha256(path: Path, _stamp: tuple[int, ...]) -> str:
    """The SHA-256 of a file, which is read once while it stays as it is: an engine that is restarted does not wait for it."""
    return sha256_of_file(path)


@contextlib.contextmanager
def running_release(
    folder: Path, chat: Chat, parallel: int, started: Started = lambda child: None
) -> Iterator[tuple[Release, Endpoint]]:
    """The release in `folder` and an engine that serves its `serve` file until the block ends.

    Raises BadModelFile for a damaged folder or a template that is not the release's, BadParams when params.yaml has another
    system prompt than the model was trained and exported with, ServerFailed when the engine does not start.
    """
    from stages.llm.llama_cpp import llama_server

    release = release_for(folder, chat)
    with llama_server(folder / gguf_name(release.serve), chat.context_tokens, parallel, started) as endpoint:
        if chat_sha256(embedded_template(endpoint), chat.system_prompt) != release.chat_sha256:
            raise BadModelFile(f"{folder}: the chat template in {gguf_name(release.serve)} is not the release's; {REBUILD}")
        yield release, endpoint


def release_for(folder: Path, chat: Chat) -> Release:
    """As `read_release`. Raises BadParams when params.yaml has another system prompt than the model was exported with."""
    release = read_release(folder)
    if chat.system_prompt != release.system_prompt:
        raise BadParams(
            f"params.yaml: chat.system_prompt is not the one that {folder} was exported with "
            f"({release.system_prompt[:60]!r}); bring the model up to date with: dvc repro export"
        )
    return release


def embedded_template(endpoint: Endpoint) -> str:
    """The chat template by which llama.cpp, behind `endpoint`, renders conversations."""
    return str(ask(endpoint, "/props")["chat_template"])


def ask(endpoint: Endpoint, path: str, body: dict[str, Any] | None = None, timeout_s: float = REQUEST_S) -> Any:
    """The reply of llama.cpp or vLLM to a GET of `path`, or to a POST of `body`. Raises ServerFailed."""
    import httpx

    try:
        # no proxy stands between two local processes, and loading certificates would take longer than most replies
        with httpx.Client(trust_env=False, verify=False, timeout=timeout_s) as client:
            address = server_address(endpoint) + path
            reply = client.get(address) if body is None else client.post(address, json=body)
    except httpx.HTTPError as error:
        raise ServerFailed(f"the engine did not answer {path}: {' '.join(str(error).split())}") from None
    if reply.is_error:
        raise ServerFailed(f"the engine answered {path} with {reply.status_code}: {reply.text[:300]}")
    return reply.json()


def server_address(endpoint: Endpoint) -> str:
    """The address of llama.cpp's own routes, beside /v1."""
    return endpoint.url.removesuffix("/v1")


def plain_text(text: str, control_tokens: tuple[str, ...]) -> str:
    """`text` with a space in each control token, which makes it text: nobody who asks can end a turn or speak as the system."""
    for token in control_tokens:
        text = text.replace(token, f"{token[:1]} {token[1:]}")
    return text
