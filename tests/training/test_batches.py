from pathlib import Path

import pytest
from conftest import CHAT

from stages.chats import with_system
from stages.models import load_tokenizer
from stages.program import LimitBroken
from stages.records import Example, Message
from stages.training.batches import pack, tokenise

TURNS = ("What is a kettle?", "An electric pot that boils a litre of water in four minutes.", "How much?", "A litre.")
MESSAGES = tuple(Message("assistant" if turn % 2 else "user", text) for turn, text in enumerate(TURNS))
EXAMPLE = Example(id="b", pair_ids=("b",), document_id="d", messages=MESSAGES)


def test_only_the_answers_are_learned(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    (row,) = tokenise([EXAMPLE], tokenizer, CHAT.system_prompt, 200)
    assert len(row.input_ids) == len(row.labels)
    assert tokenizer.decode(row.input_ids).startswith("<|im_start|>system\nAnswer briefly.<|im_end|>")
    learned = tokenizer.decode([label for label in row.labels if label != -100])
    assert learned == "An electric pot that boils a litre of water in four minutes.<|im_end|>A litre.<|im_end|>"
    assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True))


def test_an_example_that_is_too_long_is_refused_by_name_and_one_at_the_limit_is_not(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    text = tokenizer.apply_chat_template(with_system("Be brief.", EXAMPLE.messages), tokenize=False)
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert len(tokenise([EXAMPLE], tokenizer, "Be brief.", length)) == 1
    with pytest.raises(LimitBroken, match=rf"example b has {length} tokens, and train\.max_length is {length - 1}"):
        tokenise([EXAMPLE], tokenizer, "Be brief.", length - 1)


def row(ids: list[int], learned: set[int]) -> dict[str, list[int]]:
    return {"input_ids": ids, "labels": [token if place in learned else -100 for place, token in enumerate(ids)]}


def test_what_rows_begin_with_stands_once_and_labels_are_the_tokens_that_follow() -> None:
    batch = pack([row([1, 2, 5, 6, 7], {3, 4}), row([1, 2, 8, 9], {3})])
    assert batch["input_ids"].tolist() == [[1, 2, 5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 7, -100, 9, -100]]
    assert batch["shift_labels"].equal(batch["labels"])
    assert batch["tails"].tolist() == [[2, 3, 4], [5, 6, -1]]


def test_the_token_before_the_first_that_is_learned_stands_in_every_row() -> None:
    # both rows are the same up to place 2, whose label is learned in the second row only at place 3, in the first at place 2
    batch = pack([row([1, 2, 3, 4], {2, 3}), row([1, 2, 3, 9], {3})])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 2, 3, 9]]
    assert batch["labels"].tolist() == [[-100, 3, 4, -100, -100, 9, -100]]


def test_rows_without_a_common_beginning_and_a_single_row_are_batches_too() -> None:
    batch = pack([row([1, 2, 3], {2}), row([4, 5], {1})])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["tails"].tolist() == [[0, 1, 2], [3, 4, -1]]
    alone = pack([row([1, 2, 3], {2})])
    assert (alone["input_ids"].tolist(), alone["tails"].tolist()) == ([[1, 2, 3]], [[1, 2]])
    assert alone["labels"].tolist() == [[-100, 3, -100]]


def test_no_token_that_is_learned_is_lost() -> None:
    rows = [row(list(range(7)) + [place] * place, set(range(5, 7 + place))) for place in range(1, 6)]
    batch = pack(rows)
    learned = sorted(label for each in rows for label in each["labels"] if label != -100)
    assert sorted(label for label in batch["labels"][0].tolist() if label != -100) == learned
