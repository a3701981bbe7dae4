"""models/gguf -> a conversation in the terminal. /quit or Ctrl-D leaves; questions may also be piped in, one a line.

Costs the memory of the GGUF file and of one context. The oldest turns are forgotten when the context is full.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stages.chats import with_system
from stages.llm.endpoint import Endpoint
from stages.params import Chat
from stages.program import ServerFailed, run, say
from stages.records import Message
from stages.release import REQUEST_S, Release, plain_text, running_release
from stages.serving.turns import last_turns


def main(chat: Chat, gguf: Path = Path("models/gguf")) -> None:
    turns: list[Message] = []
    try:
        with running_release(gguf, chat, parallel=1) as (release, endpoint):
            for question in questions():
                turns.append(Message(role="user", content=plain_text(question, release.control_tokens)))
                turns = last_turns(turns, release, endpoint, chat)
                if not turns:
                    say(f"chat: the question is longer than the context of {chat.context_tokens} tokens; ask a shorter one")
                    continue
                answer = ""
                for piece in stream_answer(turns, release, endpoint, chat):
                    answer += piece
                    print(printable(piece), end="", flush=True)
                print(flush=True)
                # what was said stays in the conversation; silence would leave two questions in a row
                turns = [*turns, Message(role="assistant", content=answer)] if answer else turns[:-1]
    except KeyboardInterrupt:
        print()


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
