"""The real application over a real llama.cpp server, on a port of its own."""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn
from starlette.types import ASGIApp

from stages.chats import chat_sha256
from stages.llm.endpoint import Endpoint
from stages.llm.llama_cpp import llama_server
from stages.models import load_tokenizer
from stages.params import Chat
from stages.records import Passage
from stages.release import Release, gguf_name, read_release, write_release
from stages.release.convert import convert
from stages.serving.api import application
from stages.serving.engine import EngineDown, Served
from stages.serving.feedback import Feedback
from stages.serving.limits import Connection
from stages.serving.settings import Serve
from stages.serving.sources import Found, Source

CHAT = Chat(system_prompt="Answer briefly.", max_new_tokens=16, context_tokens=512)
SERVE = Serve(
    model="models/gguf",
    host="127.0.0.1",
    port=0,
    engine="llama.cpp",
    parallel=4,
    max_waiting=8,
    requests_per_minute=100_000,
    passages=0,
    min_similarity=0.4,
)
PASSAGE = Passage(
    id="0123456789abcdef",
    path="guide.md",
    heading_path=("Guide", "Colors"),
    start=10,
    end=33,
    text="The sky is blue by day.",
    trained=(),
)


class Engine:
    """One llama.cpp server, as the API takes it; nothing restarts it."""

    def __init__(self, served: Served) -> None:
        self.served: Served | None = served
        self.ready, self.restarts, self.replicas = True, 0, 1

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[Served]:
        if not self.ready or self.served is None:
            raise EngineDown(7)
        yield self.served


class Sources:
    """One passage, as near to a question as the share of the question's words that it holds."""

    def find(self, question: str, min_similarity: float) -> Found:
        words = set(question.lower().strip("?").split())
        near = len(words & set(PASSAGE.text.lower().strip(".").split())) / max(len(words), 1)  # there is none in "?"
        place = Source("retrieved", PASSAGE.id, PASSAGE.path, PASSAGE.heading_path, 10, 33, PASSAGE.text, near)
        return Found((place,), near >= min_similarity)

    def passage(self, id: str) -> Passage | None:
        return PASSAGE if id == PASSAGE.id else None

    def prompt(self, question: str, top_k: int, fits: Any) -> str:
        prompt = f"{PASSAGE.text}\n\n{question}"
        return prompt if fits(prompt) else question


def make_release(model: Path, folder: Path) -> None:
    """Writes an export of a model as small as the one in the folder `model`, whose words differ, as one GGUF file of 16 bits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    untied = LlamaConfig.from_pretrained(model, tie_word_embeddings=False, initializer_range=0.5, max_position_embeddings=8192)
    LlamaForCausalLM(untied).save_pretrained(model.with_name("untied"))
    load_tokenizer(model).save_pretrained(model.with_name("untied"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv[:1])  # which it sets
        convert(model.with_name("untied"), folder / gguf_name("f16"))
    release = Release(
        base="tiny",
        base_sha256="",
        adapter_sha256="",
        chat_sha256=chat_sha256(load_tokenizer(model).chat_template, CHAT.system_prompt),
        system_prompt=CHAT.system_prompt,
        control_tokens=tuple(sorted(load_tokenizer(model).get_added_vocab())),
        quants=("f16",),
        serve="f16",
        context_tokens=CHAT.context_tokens,
        max_new_tokens=CHAT.max_new_tokens,
    )
    write_release(folder, release)


@contextlib.contextmanager
def running_engine(folder: Path, chat: Chat = CHAT, parallel: int = SERVE.parallel) -> Iterator[Engine]:
    release = read_release(folder)
    with llama_server(folder / gguf_name(release.serve), chat.context_tokens, parallel) as endpoint:
        yield Engine(Served(endpoint, release, folder, "docsmith/3"))


@contextlib.contextmanager
def serving(engine: Engine, feedback: Path, serve: Serve = SERVE, chat: Chat = CHAT, keys: Sequence[str] = ()) -> Iterator[str]:
    """The address of the application over `engine`."""
    app = application(engine, Sources(), Feedback(feedback), serve, chat, serve.host, keys)
    with listening(app) as address:
        yield address


@contextlib.contextmanager
def listening(app: ASGIApp, lifespan: Any = "on") -> Iterator[str]:
    """The address at which `app` listens, as `serve` lets it, in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        http=Connection,
        loop="uvloop",
        ws="none",
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield "http://{}:{}".format(*listener.getsockname()[:2])
    finally:
        server.should_exit = True
        thread.join()


def nowhere() -> Engine:
    """An engine whose address nobody listens at."""
    release = Release("", "", "", "", CHAT.system_prompt, ("<|im_end|>",), ("f16",), "f16", 512, 16)
    return Engine(Served(Endpoint(url="http://127.0.0.1:9/v1", model="none"), release, Path(), "docsmith/1"))


def children(module: str) -> dict[int, list[str]]:
    """The processes that this one has started to run `module`, with their command lines."""
    found = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end at any moment
            if module in (words := child.cmdline()):
                found[child.pid] = words
    return found
