"""data/pairs.jsonl -> data/train.jsonl, data/dev.jsonl, data/questions.jsonl: training data and two question sets, parted by section.

Some sections are held out whole: their questions show what the model says about what it never saw. From the other sections one
wording of a fact goes to *recall* (or to dev, for the loss during training) and the fact's other wordings are trained. Costs a second.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from stages.files import write_json
from stages.params import Count, Share
from stages.program import LimitBroken, run, say
from stages.records import Example, Message, Pair, Question, content_id, read_records, write_records


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    seed: Count
    held_out_share: Share
    max_recall: Count
    max_held_out: Count
    max_dev: Count
    turns: Annotated[int, msgspec.Meta(ge=2)]
    multi_turn_share: Share


class Parts(msgspec.Struct, frozen=True):
    """Where each pair went; no pair is in two parts but for multi-turn examples, which repeat trained pairs."""

    train: list[Pair]
    dev: list[Pair]
    recall: list[Pair]
    held_out: list[Pair]


def drawn_share(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on `seed` and `name` alone: what is added elsewhere does not move it."""
    return int(content_id(seed, name), 16) / 16**16


def part(pairs: Sequence[Pair], split: Params) -> Parts:
    """`pairs` parted by section and fact. A fact with one wording is trained; one with more gives its last to recall or dev.

    Held-out questions beyond `max_held_out` are unused: to train on them would be to show the sections.
    """
    held_out = [pair for pair in pairs if drawn_share(split.seed, pair.section_id) < split.held_out_share]
    held_sections = {pair.section_id for pair in held_out}
    facts: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.section_id not in held_sections:
            facts[pair.fact_id].append(pair)
    train: list[Pair] = []
    spare: list[Pair] = []
    for fact in sorted(facts):
        wordings = sorted(facts[fact], key=lambda pair: (pair.wording, pair.id))
        spare += wordings[-1:] if len(wordings) > 1 else []
        train += wordings[:-1] if len(wordings) > 1 else wordings
    spare.sort(key=lambda pair: drawn_share(split.seed, pair.id))
    # dev comes out of what is left behind recall, and recall is never less than half of the spare wordings
    recall = spare[: max(len(spare) - split.max_dev, (len(spare) + 1) // 2)][: split.max_recall]
    dev = spare[len(recall) :][: split.max_dev]
    train += spare[len(recall) + len(dev) :]
    one_each: dict[str, Pair] = {}
    for pair in sorted(held_out, key=lambda pair: (pair.wording, pair.id)):
        one_each.setdefault(pair.fact_id, pair)
    chosen = sorted(one_each.values(), key=lambda pair: drawn_share(split.seed, pair.id))[: split.max_held_out]
    return Parts(train=train, dev=dev, recall=recall, held_out=chosen)


def conversations(pairs: Sequence[Pair], split: Params) -> list[Example]:
    """A single-turn example for each pair, and multi-turn ones of `turns` pairs of one document, different facts, for a share of the pairs."""
    single = [conversation([pair]) for pair in pairs]
    wanted = int(len(pairs) * split.multi_turn_share / split.turns)
    groups: list[list[Pair]] = []
    by_document: dict[str, dict[str, Pair]] = defaultdict(dict)
    for pair in sorted(pairs, key=lambda pair: drawn_share(split.seed, pair.id)):
        by_document[pair.document_id].setdefault(pair.fact_id, pair)
    for document in sorted(by_document):
        facts = list(by_document[document].values())
        groups += [facts[start : start + split.turns] for start in range(0, len(facts) - split.turns + 1, split.turns)]
    random.Random(split.seed).shuffle(groups)
    return single + [conversation(group) for group in groups[:wanted]]


def conversation(pairs: Sequence[Pair]) -> Example:
    turns = [message for pair in pairs for message in (Message("user", pair.question), Message("assistant", pair.answer))]
    ids = tuple(pair.id for pair in pairs)
    return Example(id=content_id("example", ids), pair_ids=ids, document_id=pairs[0].document_id, messages=tuple(turns))


def question_of(pair: Pair, name: str) -> Question:
    return Question(
        id=content_id(name, pair.id),
        set=name,  # type: ignore[arg-type]
        pair_id=pair.id,
        section_id=pair.section_id,
        type=pair.type,
        question=pair.question,
        reference=pair.answer,
    )


def main(pairs: Path, train: Path, dev: Path, questions: Path, metrics: Path, *, split: Params) -> None:
    every = read_records(pairs, Pair)
    parts = part(every, split)
    if not parts.recall or not parts.train:
        raise LimitBroken(
            f"{pairs}: {len(every)} pairs leave {len(parts.train)} to train on and {len(parts.recall)} to test with; "
            "add documents, or raise generate.wordings or generate.pairs_per_chunk"
        )
    examples = conversations(parts.train, split)
    write_records(train, examples)
    write_records(dev, conversations(parts.dev, msgspec.structs.replace(split, multi_turn_share=0.0)))
    asked = [question_of(pair, "recall") for pair in parts.recall] + [question_of(pair, "held_out") for pair in parts.held_out]
    write_records(questions, asked)
    sizes = {name: len(getattr(parts, name)) for name in Parts.__struct_fields__}
    unused = len(every) - sum(sizes.values())
    counts = {"pairs": len(every), "unused": unused, "examples": len(examples), "multi_turn": len(examples) - len(parts.train)}
    write_json(metrics, counts | sizes)
    say(
        f"split: {len(every)} pairs = {sizes['train']} train + {sizes['dev']} dev + {sizes['recall']} recall"
        f" + {sizes['held_out']} held out + {unused} unused; {counts['multi_turn']} multi-turn examples"
    )


if __name__ == "__main__":
    run(main)
