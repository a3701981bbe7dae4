"""Conversations as tokens, and batches of them without padding."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stages.chats import tokens_and_mask, with_system
from stages.program import LimitBroken
from stages.records import Example

IGNORED = -100  # a label that nothing is learned from


class Tokens(msgspec.Struct, frozen=True):
    """One conversation as the trainer takes it: token ids, and labels that are -100 where nothing is to be learned."""

    input_ids: list[int]
    labels: list[int]


def tokenise(examples: Sequence[Example], tokenizer: Any, system_prompt: str, max_length: int) -> list[Tokens]:
    """`examples` as tokens, in their order. Raises LimitBroken for one longer than `max_length`: nothing is cut silently."""
    rows = []
    for example in examples:
        ids, mask = tokens_and_mask(tokenizer, with_system(system_prompt, example.messages))
        if len(ids) > max_length:
            raise LimitBroken(
                f"example {example.id} has {len(ids)} tokens, and train.max_length is {max_length}; raise it, or lower split.turns"
            )
        rows.append(Tokens(ids, [token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)]))
    return rows


def pack(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
    """`rows` (input_ids and labels of each) as one batch for `stages.training.packed`.

    What all rows begin with stands once, then the rest of each row: causal attention makes it the same for all of them. The tensors:
    input_ids, position_ids and labels, (1, tokens), where a label is the token that follows in its row, or -100; the same as shift_labels,
    which transformers counts; and tails, (rows, longest rest), the places of each row's rest among the tokens, filled up with -1.
    """
    import torch

    columns = zip(*(row["input_ids"] for row in rows), strict=False)
    alike = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    # the token before the first that is learned stands in each row: its label may differ
    shared = min(alike, *(next((place for place, label in enumerate(row["labels"][1:]) if label != IGNORED), 0) for row in rows))
    ids, positions, labels = list(rows[0]["input_ids"][:shared]), list(range(shared)), [IGNORED] * shared
    tails = torch.full((len(rows), max(len(row["input_ids"]) for row in rows) - shared), -1)
    for tail, row in zip(tails, rows, strict=True):
        rest = row["input_ids"][shared:]
        tail[: len(rest)] = torch.arange(len(ids), len(ids) + len(rest))
        ids += rest
        positions += range(shared, shared + len(rest))
        labels += [*row["labels"][shared + 1 :], IGNORED]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([labels]),
        "shift_labels": torch.tensor([labels]),
        "tails": tails,
    }
