"""How a question is put to a model, the same for every system: `answer` asks for the scoreboard, `promote` asks the champion again."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.chats import with_system
from stages.llm import Endpoint, Reply, Request, Store, Tally, ask_all
from stages.llm.llama_cpp import llama_server
from stages.params import Chat
from stages.records import Message, Question


def requests_for(questions: Sequence[Question], chat: Chat, model_sha256: str) -> dict[str, Request]:
    """Question id -> the request that puts the question to the model with that hash: greedy, in the one rendering."""
    requests = {}
    for question in questions:
        conversation = with_system(chat.system_prompt, [Message("user", question.question)])
        messages = tuple((message["role"], message["content"]) for message in conversation)
        requests[question.id] = Request(model_sha256, messages, temperature=0.0, max_tokens=chat.max_new_tokens, seed=0)
    return requests


def ask_llama(
    gguf: Path, requests: Mapping[str, Request], kept: Store, chat: Chat, concurrency: int, timeout_s: float
) -> tuple[dict[str, Reply], Tally]:
    """`ask_all` of the model in the file `gguf`, by a server that is started when a reply is missing."""
    with contextlib.ExitStack() as servers:

        def endpoints() -> list[Endpoint]:
            return [servers.enter_context(llama_server(gguf, chat.context_tokens, concurrency))]

        return ask_all(requests, kept, endpoints, concurrency, timeout_s, f"answer {gguf.stem}")
