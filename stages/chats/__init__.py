"""The one place where a conversation becomes text or tokens: training, evaluation, export and serving all call it."""

import hashlib
from collections.abc import Sequence
from typing import Any

from stages.records import Message


def with_system(system_prompt: str, messages: Sequence[Message]) -> list[dict[str, str]]:
    """`messages` behind the system prompt, as the dicts that chat templates and OpenAI-style servers take."""
    return [{"role": "system", "content": system_prompt}] + [
        {"role": message.role, "content": message.content} for message in messages
    ]


def tokens_and_mask(tokenizer: Any, conversation: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of `conversation` and, of the same length, 1 where a token is to be learned and 0 elsewhere.

    Learned are the assistant's words and the token that ends its turn; what surrounds them is the template's.
    Raises ValueError when the template does not render a turn as a prefix of the next one's text.
    """
    ids: list[int] = []
    mask: list[int] = []
    for turn, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, conversation[:turn], is_prompt=True)
        until = _render(tokenizer, conversation[: turn + 1], is_prompt=False)
        if before[: len(ids)] != ids or until[: len(before)] != before:
            raise ValueError("the chat template rewrites earlier turns; such a template cannot be trained on answers only")
        answer = until[len(before) :]
        end = answer.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in answer else len(answer)
        mask += [0] * (len(before) - len(ids)) + [1] * end + [0] * (len(answer) - end)
        ids = until
    return ids, mask


def _render(tokenizer: Any, conversation: list[dict[str, str]], is_prompt: bool) -> list[int]:
    rendered = tokenizer.apply_chat_template(conversation, add_generation_prompt=is_prompt, tokenize=True, return_dict=True)
    return list(rendered["input_ids"])


def chat_sha256(chat_template: str, system_prompt: str) -> str:
    """What two parts of the system must agree on to see the same conversation: a hash of template and system prompt."""
    return hashlib.sha256(f"{chat_template}\0{system_prompt}".encode()).hexdigest()
