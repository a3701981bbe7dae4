"""A conversation made fit for the model: turns that alternate, and the newest of them that the context has room for."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import groupby

from stages.chats import with_system
from stages.llm.endpoint import Endpoint
from stages.params import Chat
from stages.program.errors import ServerFailed
from stages.records import Message
from stages.release import Release, ask, plain_text

FRAME_TOKENS = 16  # that a chat template puts around a turn, at most
HEAD_TOKENS = 64  # and before the first one, as Llama 3's line with the date
LONGER = "maximum context length"  # what vLLM says of a prompt beyond its context, which it does not count to the end


def alternating(turns: Sequence[Message], control_tokens: tuple[str, ...]) -> list[Message]:
    """`turns` as every chat template takes them: a user's first, then an assistant's and a user's by turns, all of it plain text.

    Neighbours of one role are joined; what the assistant says before any user, and empty turns, are left out.
    """
    spoken = [turn for turn in turns if turn.content.strip()]
    joined = [(role, [turn.content for turn in same]) for role, same in groupby(spoken, key=lambda turn: turn.role)]
    if joined and joined[0][0] == "assistant":
        joined = joined[1:]
    return [Message(role, plain_text("\n\n".join(contents), control_tokens)) for role, contents in joined]


def last_turns(turns: Sequence[Message], release: Release, endpoint: Endpoint, chat: Chat) -> list[Message]:
    """The newest of `turns`, from a question on, that leave room for an answer; [] when the last question alone does not.

    Asks the engine for the number of tokens only where there could be too many. Raises ServerFailed.
    """
    dropped = bisect_left(range(0, len(turns), 2), True, key=lambda first: fits(turns[first:], release, endpoint, chat))
    return list(turns[2 * dropped :])


def surely_fits(turns: Sequence[Message], release: Release, chat: Chat) -> bool:
    """Whether `turns` leave room for an answer however many tokens their letters are: a token is a byte or more."""
    contents = [release.system_prompt, *(turn.content for turn in turns)]
    most = HEAD_TOKENS + sum(len(content.encode()) + FRAME_TOKENS for content in contents)
    return most + chat.max_new_tokens <= chat.context_tokens


def fits(turns: Sequence[Message], release: Release, endpoint: Endpoint, chat: Chat) -> bool:
    """Whether `turns` leave room for an answer. Raises ServerFailed."""
    if surely_fits(turns, release, chat):
        return True
    # of the routes that count, the one that llama.cpp and vLLM share
    body = {"model": endpoint.model, "system": release.system_prompt, "messages": with_system("", turns)[1:]}
    try:
        counted = ask(endpoint, "/v1/messages/count_tokens", body)["input_tokens"]
    except ServerFailed as error:
        if LONGER in str(error):
            return False
        raise
    return bool(counted + chat.max_new_tokens <= chat.context_tokens)
