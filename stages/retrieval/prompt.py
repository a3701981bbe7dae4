"""The one place where passages become a prompt. It is no part of stages/chats, since another wording must not train a model again."""

from bisect import bisect_right
from collections.abc import Callable, Sequence

from stages.evidence import SENTENCE_END
from stages.records import Chunk

ASK = (
    "Answer the question from these passages of the documentation. If they do not hold the answer, say that it is not documented."
)


def with_passages(question: str, passages: Sequence[Chunk], fits: Callable[[str], bool]) -> tuple[str, int]:
    """What a user says to have `question` answered from `passages`, best first, and how many of them it holds.

    `fits` tells whether such a text leaves room for the answer. Whole passages are left out from the end until it does; one alone
    that is too long is cut behind a sentence or line. Where nothing of it fits, the question stands alone, with 0 passages.
    """
    for count in range(len(passages), 0, -1):
        text = _prompt(question, [(chunk.topic(), chunk.markdown()) for chunk in passages[:count]])
        if fits(text):
            return text, count
    if not passages:
        return question, 0
    topic, whole = passages[0].topic(), passages[0].markdown()
    ends = sorted(
        {found.start() for found in SENTENCE_END.finditer(whole)} | {at for at, sign in enumerate(whole) if sign == "\n"}
    )
    ends = [end for end in ends if whole[:end].strip()]
    most = bisect_right(ends, False, key=lambda end: not fits(_prompt(question, [(topic, whole[:end])])))
    return (_prompt(question, [(topic, whole[: ends[most - 1]])]), 1) if most else (question, 0)


def _prompt(question: str, passages: Sequence[tuple[str, str]]) -> str:
    shown = "\n\n".join(f"[{topic}]\n{text.strip()}" for topic, text in passages)
    return f"{ASK}\n\n{shown}\n\nQuestion: {question}"
