"""How a question is put to a model, the same for every system: `answer` asks for the scoreboard, `promote` asks the champion again."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from stages.chats import with_system
from stages.executor import LOCAL, Executor
from stages.llm import Reply, Request, Source, Store, Tally, asking
from stages.params import Chat, Positive
from stages.records import Message

System = Literal["base", "tuned", "base_rag", "tuned_rag", "oracle"]


class Asking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The section `answer` of params.yaml."""

    systems: tuple[System, ...]  # base, tuned and each GGUF file are asked in any case
    batch_tokens: Positive  # prompts and answers at once for a system that runs in transformers
    concurrency: Positive  # requests at once for a GGUF file
    timeout_s: Positive


def requests_for(messages: Mapping[str, str], chat: Chat, model_sha256: str) -> dict[str, Request]:
    """Question id -> the request that puts its message to the model with that hash: greedy, in the one rendering."""
    return {question_id: request_for(text, chat, model_sha256) for question_id, text in messages.items()}


def request_for(text: str, chat: Chat, model_sha256: str) -> Request:
    """The request that puts `text` to the model with that hash."""
    conversation = with_system(chat.system_prompt, [Message("user", text)])
    messages = tuple((message["role"], message["content"]) for message in conversation)
    return Request(model_sha256, messages, temperature=0.0, max_tokens=chat.max_new_tokens, seed=0)


def ask_llama(
    gguf: Path, requests: Mapping[str, Request], kept: Store, chat: Chat, answer: Asking, executor: Executor = LOCAL
) -> tuple[dict[str, Reply], Tally]:
    """`ask_all` of the model in the file `gguf`, by a server that is started when a reply is missing."""
    source = Source((), str(gguf), "llama.cpp", chat.context_tokens, answer.concurrency, answer.timeout_s)
    with contextlib.ExitStack() as servers:
        return asking(source, executor, kept, servers)(requests, label=f"answer {gguf.stem}")
