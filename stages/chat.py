"""models/gguf -> a conversation in the terminal, with the sources of each answer. /sources 1 shows the first source, /quit or Ctrl-D leaves.

Questions may also be piped in, one a line. Costs the memory of the GGUF file, of one context and of the embedder. The oldest turns are
forgotten when the context is full.
"""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec

from stages.chats import with_system
from stages.llm.endpoint import Endpoint
from stages.params import Chat, Models
from stages.program import ServerFailed, run, say
from stages.records import Message
from stages.release import REQUEST_S, Release, plain_text, running_release
from stages.serving.settings import Serve
from stages.serving.sources import Found, Source, Sources, read_passages
from stages.serving.turns import fits, last_turns


def main(serve: Serve, chat: Chat, models: Models, gguf: Path = Path("models/gguf"), store: Path = Path("data/store")) -> None:
    turns: list[Message] = []
    found = Found((), covered=True)
    try:
        with running_release(gguf, chat, parallel=1) as (release, endpoint), ThreadPoolExecutor(1) as loading:
            # in a thread: the embedder takes seconds to load, and so does a person to type
            sources = loading.submit(Sources, read_passages(gguf), models.embedder, store)
            for question in questions():
                if question.startswith("/sources"):
                    print(printable(shown(question, found.sources, sources.result())))
                    continue
                asked = question
                if serve.passages:
                    asked = sources.result().prompt(question, serve.passages, partial(has_room, release, endpoint, chat))
                put = Message(role="user", content=plain_text(asked, release.control_tokens))
                kept = last_turns([*turns, put], release, endpoint, chat)
                if not kept:
                    say(f"chat: the question is longer than the context of {chat.context_tokens} tokens; ask a shorter one")
                    continue
                turns = kept
                answer = ""
                for piece in stream_answer(turns, release, endpoint, chat):
                    answer += piece
                    print(printable(piece), end="", flush=True)
                found = sources.result().find(question, serve.min_similarity)
                print("", *map(printable, lines_of(found)), sep="\n", flush=True)
                # what was said stays in the conversation, without its passages; silence would leave two questions in a row
                said = Message(role="user", content=plain_text(question, release.control_tokens))
                turns = [*turns[:-1], said, Message(role="assistant", content=answer)] if answer else turns[:-1]
    except KeyboardInterrupt:
        print()


def has_room(release: Release, endpoint: Endpoint, chat: Chat, text: str) -> bool:
    """Whether the question `text` leaves room for an answer in an empty conversation. Raises ServerFailed."""
    return fits([Message(role="user", content=plain_text(text, release.control_tokens))], release, endpoint, chat)


def lines_of(found: Found) -> list[str]:
    """What stands below an answer: a line for each source, as "[1] serving.md > Serving (0.83)", or that there is none."""
    if not found.covered:
        return ["the documentation does not seem to cover this"]
    return [
        f"[{number}] {' > '.join((source.path, *source.heading_path))} ({source.similarity:.2f})"
        for number, source in enumerate(found.sources, start=1)
    ]


def shown(command: str, listed: Sequence[Source], sources: Sources) -> str:
    """The passage behind the source that `command`, as "/sources 2", names, or which ones there are."""
    number = command.removeprefix("/sources").strip()
    if number not in map(str, range(1, len(listed) + 1)):
        return f"there are the sources 1 to {len(listed)}, as in: /sources 1" if listed else "the last answer has no sources"
    passage = sources.passage(listed[int(number) - 1].passage_id)
    return passage.text.strip() if passage else ""


def questions() -> Iterator[str]:
    """What the person types, or what is piped in, without blank lines; ends at /quit and at the end of input."""
    prompt = "you> " if sys.stdin.isatty() else ""
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a byte that is no UTF-8 is the question's fault, not ours
    while True:
        try:
            question = input(prompt).strip()
        except EOFError:
            if prompt:
                print()
            return
        if question == "/quit":
            return
        if question:
            yield question


def stream_answer(turns: list[Message], release: Release, endpoint: Endpoint, chat: Chat) -> Iterator[str]:
    """The answer to `turns`, piece by piece as it is written. Raises ServerFailed when the engine fails."""
    import httpx

    body = {
        "messages": with_system(release.system_prompt, turns),
        "max_tokens": chat.max_new_tokens,
        "temperature": 0,
        "stream": True,
    }
    try:
        with httpx.stream("POST", f"{endpoint.url}/chat/completions", json=body, timeout=REQUEST_S, trust_env=False) as reply:
            for line in reply.iter_lines():
                kind, _, content = line.partition(": ")
                if reply.is_error or kind == "error":
                    raise ServerFailed(f"the engine failed: {line[:300]}")
                if kind == "data" and content != "[DONE]":
                    choices = msgspec.json.decode(content)["choices"]
                    yield (choices[0]["delta"].get("content") or "") if choices else ""
    except httpx.HTTPError as error:
        raise ServerFailed(f"the engine failed: {type(error).__name__}") from None


def printable(text: str) -> str:
    """`text` without control characters: an answer must not move the cursor or rename the window."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


if __name__ == "__main__":
    run(main)
