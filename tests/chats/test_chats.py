"""chats: exactly what the assistant says is learned, and a changed system prompt is another chat."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from stages.chats import chat_sha256, tokens_and_mask, with_system
from stages.models import load_tokenizer
from stages.records import Message

ASKED = Message("user", "Which port does the server use?")
SAID = Message("assistant", "It uses port 5000.")


@pytest.fixture(scope="module")
def tokenizer(base_folder: Path) -> Any:
    return load_tokenizer(base_folder)


def learned(tokenizer: Any, ids: list[int], mask: list[int]) -> str:
    return str(tokenizer.decode([token for token, is_learned in zip(ids, mask, strict=True) if is_learned]))


def test_the_system_prompt_comes_first() -> None:
    assert with_system("Be brief.", [ASKED, SAID]) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which port does the server use?"},
        {"role": "assistant", "content": "It uses port 5000."},
    ]


def test_one_turn_learns_the_answer_and_the_token_that_ends_it(tokenizer: Any) -> None:
    ids, mask = tokens_and_mask(tokenizer, with_system("Be brief.", [ASKED, SAID]))
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhich port does the server use?<|im_end|>\n"
        "<|im_start|>assistant\nIt uses port 5000.<|im_end|>\n"
    )
    assert learned(tokenizer, ids, mask) == "It uses port 5000.<|im_end|>"
    assert mask[-1] == 0 and sum(mask) == len(tokenizer("It uses port 5000.")["input_ids"]) + 1


def test_several_turns_learn_every_answer_and_no_question(tokenizer: Any) -> None:
    turns = [ASKED, SAID, Message("user", "And the host?"), Message("assistant", "127.0.0.1, so only this machine.")]
    ids, mask = tokens_and_mask(tokenizer, with_system("Be brief.", turns))
    assert learned(tokenizer, ids, mask) == "It uses port 5000.<|im_end|>127.0.0.1, so only this machine.<|im_end|>"
    rendered = tokenizer.apply_chat_template(with_system("Be brief.", turns), tokenize=True, return_dict=True)
    assert ids == list(rendered["input_ids"])


def test_a_conversation_without_an_answer_has_nothing_to_learn(tokenizer: Any) -> None:
    assert tokens_and_mask(tokenizer, with_system("Be brief.", [ASKED])) == ([], [])


def test_a_template_that_rewrites_earlier_turns_is_refused(base_folder: Path) -> None:
    tokenizer = load_tokenizer(base_folder)
    tokenizer.chat_template = "{{ messages | length }}{% for message in messages %} {{ message.content }}{% endfor %}"
    turns = [ASKED, SAID, Message("user", "And the host?"), Message("assistant", "127.0.0.1.")]
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        tokens_and_mask(tokenizer, with_system("Be brief.", turns))


def test_the_hash_follows_the_template_and_the_system_prompt() -> None:
    assert chat_sha256("template", "Be brief.") == hashlib.sha256(b"template\0Be brief.").hexdigest()
    assert (
        len({chat_sha256("template", "Be brief."), chat_sha256("template", "Be exact."), chat_sha256("other", "Be brief.")}) == 3
    )
