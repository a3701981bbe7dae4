"""data/pairs.jsonl -> data/train.jsonl, data/dev.jsonl, data/questions.jsonl: training data and two question sets, parted by section.

Some sections are held out whole: their questions show what the model says about what it never saw. From the other sections one
wording of a fact goes to *recall* (or to dev, for the loss during training) and the fact's other wordings are trained. No question has
a near-duplicate in training; before anything is written, the rules in split_suite.yaml are held against it. General conversations of
general.yaml may be trained with them, against forgetting. Costs seconds.
"""

import random
import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from stages.evidence import key_facts, words
from stages.files import write_json
from stages.general import read_general
from stages.likeness import MIN_JACCARD, joined, near_duplicates
from stages.params import Count, Share
from stages.program import LimitBroken, run, say
from stages.records import Example, Message, Pair, Question, by_id, content_id, read_records, write_records
from stages.rules import checking, read_rules

SUITE = Path(__file__).with_name("split_suite.yaml")
FEW_DOCUMENTS = 4  # of fewer, the largest may well hold most of what there is to know
SAME_QUOTE = 0.8  # Jaccard similarity of two quotes that say one thing


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    seed: Count
    held_out_share: Share
    max_recall: Count
    max_held_out: Count
    max_dev: Count
    turns: Annotated[int, msgspec.Meta(ge=2)]
    multi_turn_share: Share
    max_document_share: Share
    general_share: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]


class Parts(msgspec.Struct, frozen=True):
    """Where each pair went: to one part, or to the unused ones under a reason. Multi-turn examples repeat trained pairs."""

    train: list[Pair]
    dev: list[Pair]
    recall: list[Pair]
    held_out: list[Pair]
    unused: dict[str, list[Pair]]


def drawn_share(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on `seed` and `name` alone: what is added elsewhere does not move it."""
    return int(content_id(seed, name), 16) / 16**16


def part(pairs: Sequence[Pair], split: Params) -> Parts:
    """`pairs` parted by section and fact. A fact with one wording is trained; one with more gives one of them to recall or dev.

    That one is no near-duplicate of the others where there is such a wording; without one, the whole fact is trained.
    Reasons for not using a pair:
    held-out-overlap: of a held-out section, but its question or its quote also stands in a trained one
    held-out-surplus: one more wording of a held-out question, or beyond `max_held_out`: to train on it would be to show the section
    like-a-question: a near-duplicate of a question in recall or dev
    document-share: of a document with more than `max_document_share` of the trained pairs; the lowest similarities go
    fact-untrained: a question whose fact lost its trained wordings to `document-share`
    """
    pairs = sorted(pairs, key=lambda pair: (pair.fact_id, pair.wording, pair.id))
    groups = dict(zip((pair.id for pair in pairs), alike(pairs), strict=True))
    quotes = dict(zip((pair.id for pair in pairs), near_duplicates([pair.quote for pair in pairs], SAME_QUOTE), strict=True))
    unused: dict[str, list[Pair]] = defaultdict(list)
    held: list[Pair] = []
    rest: list[Pair] = []
    for pair in pairs:
        (held if drawn_share(split.seed, pair.section_id) < split.held_out_share else rest).append(pair)

    known_groups, known_quotes = {groups[pair.id] for pair in rest}, {quotes[pair.id] for pair in rest}
    one_each: dict[str, Pair] = {}
    for pair in held:
        if groups[pair.id] in known_groups or quotes[pair.id] in known_quotes:
            unused["held-out-overlap"].append(pair)
        elif one_each.setdefault(pair.fact_id, pair) is not pair:
            unused["held-out-surplus"].append(pair)
    chosen = sorted(one_each.values(), key=lambda pair: drawn_share(split.seed, pair.id))
    unused["held-out-surplus"] += chosen[split.max_held_out :]

    spare = sorted(unlike_the_rest(rest, groups), key=lambda pair: drawn_share(split.seed, pair.id))
    # dev comes out of what is left behind recall, and recall is never less than half of the spare wordings
    recall = spare[: max(len(spare) - split.max_dev, (len(spare) + 1) // 2)][: split.max_recall]
    dev = spare[len(recall) :][: split.max_dev]
    asked = {groups[pair.id]: pair for pair in recall + dev}
    unused["like-a-question"] = [pair for pair in rest if asked.get(groups[pair.id], pair) is not pair]
    train, unused["document-share"] = within_share(
        [pair for pair in rest if groups[pair.id] not in asked], allowed_share(len({pair.document_id for pair in pairs}), split)
    )
    trained = {pair.fact_id for pair in train}
    unused["fact-untrained"] = [pair for pair in recall + dev if pair.fact_id not in trained]
    return Parts(
        train=train,
        dev=[pair for pair in dev if pair.fact_id in trained],
        recall=[pair for pair in recall if pair.fact_id in trained],
        held_out=chosen[: split.max_held_out],
        unused={reason: found for reason, found in unused.items() if found},
    )


def alike(pairs: Sequence[Pair]) -> list[int]:
    """The group of each pair: those of one cluster are in one, and those whose questions have the same words."""
    firsts: dict[tuple[str, str], int] = {}
    keys = [
        (number, key) for number, pair in enumerate(pairs) for key in (("cluster", pair.cluster), ("words", words(pair.question)))
    ]
    return joined(len(pairs), [(firsts.setdefault(key, number), number) for number, key in keys])


def unlike_the_rest(pairs: Sequence[Pair], groups: Mapping[str, int]) -> list[Pair]:
    """For each fact the wording to ask: the last one that is alone in its group, else one of the smallest group of this fact alone.

    A fact whose wordings are all in one group, or in groups with other facts, has none.
    """
    facts: dict[str, list[Pair]] = defaultdict(list)
    owners: dict[int, list[str]] = defaultdict(list)
    for pair in pairs:
        facts[pair.fact_id].append(pair)
        owners[groups[pair.id]].append(pair.fact_id)
    shared = {group for group, fact_ids in owners.items() if len(set(fact_ids)) > 1}
    found = []
    for wordings in facts.values():
        own = [pair for pair in wordings if groups[pair.id] not in shared]
        if own and len({groups[pair.id] for pair in wordings}) > 1:
            found.append(min(reversed(own), key=lambda pair: len(owners[groups[pair.id]])))
    return found


def within_share(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """The pairs that can be trained while no document gives more than `share` of them, and the others, in the given order."""
    ranked: dict[str, list[Pair]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda pair: (-pair.similarity, pair.id)):
        ranked[pair.document_id].append(pair)
    sizes = [len(found) for found in ranked.values()]
    most = bisect_right(
        range(1, max(sizes, default=0) + 1), share, key=lambda most: most / sum(min(size, most) for size in sizes)
    )
    kept = {pair.id for found in ranked.values() for pair in found[:most]}
    return [pair for pair in pairs if pair.id in kept], [pair for pair in pairs if pair.id not in kept]


def allowed_share(documents: int, split: Params) -> float:
    """`max_document_share`, or 1 where there are few documents, or so few that they cannot all stay within it."""
    is_bound = documents >= FEW_DOCUMENTS and documents * split.max_document_share >= 1
    return split.max_document_share if is_bound else 1.0


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


def general_examples(examples: int, asked: Sequence[str], split: Params) -> list[Example]:
    """Examples of general.yaml's set `train` so that, beside `examples` others, they are `general_share` of all; fewer where it holds fewer.

    None is like a question of `asked`. A larger share adds to what a smaller one chose.
    """
    if not split.general_share:
        return []
    known = [one for one in read_general() if one.set == "train"]
    like = near_duplicates([*asked, *(one.question for one in known)], MIN_JACCARD)[len(asked) :]
    free = [one for one, first in zip(known, like, strict=True) if first >= len(asked)]
    wanted = round(examples * split.general_share / (1 - split.general_share))
    chosen = sorted(free, key=lambda one: drawn_share(split.seed, one.question))[:wanted]
    return [
        Example(
            id=content_id("general", one.question, one.answer),
            pair_ids=(),
            document_id="general",
            messages=(Message("user", one.question), Message("assistant", one.answer)),
        )
        for one in chosen
    ]


def question_of(pair: Pair, name: str) -> Question:
    return Question(
        id=content_id(name, pair.id),
        set=name,  # type: ignore[arg-type]
        pair_id=pair.id,
        section_id=pair.section_id,
        type=pair.type,
        question=pair.question,
        reference=pair.answer,
        key_facts=key_facts(pair.answer, pair.quote, pair.question),
        quote=pair.quote,
        chunk_id=pair.chunk_id,
    )


def table(train: Sequence[Example], dev: Sequence[Example], questions: Sequence[Question], pairs: Mapping[str, Pair]) -> Any:
    """A DataFrame with a row for each example and question, computed from these alone, so that a slip of `part` shows."""
    import pandas

    trained = [pairs[pair_id] for pair_id in {pair_id for example in train for pair_id in example.pair_ids}]
    trained_words = {words(message.content) for example in train for message in example.messages if message.role == "user"}
    clusters, sections = {pair.cluster for pair in trained}, {pair.section_id for pair in trained}
    sizes = Counter(pair.document_id for pair in trained)
    asked = [(one.id, one.set, pairs[one.pair_id], one.question) for one in questions]
    asked += [(one.id, "dev", pairs[one.pair_ids[0]], one.messages[0].content) for one in dev]  # type: ignore[misc]
    faultless = {
        "question_is_trained": False,
        "near_duplicate_is_trained": False,
        "held_out_section_is_trained": False,
        "document_share": 0.0,
    }
    rows = [faultless | {"id": one.id, "document_share": sizes[one.document_id] / len(trained)} for one in train]
    rows += [
        faultless
        | {
            "id": row_id,
            "question_is_trained": words(question) in trained_words,
            "near_duplicate_is_trained": pair.cluster in clusters,
            "held_out_section_is_trained": name == "held_out" and pair.section_id in sections,
        }
        for row_id, name, pair, question in asked
    ]
    return pandas.DataFrame(rows)


def main(pairs: Path, train: Path, dev: Path, questions: Path, metrics: Path, *, split: Params) -> None:
    every = read_records(pairs, Pair)
    parts = part(every, split)
    if not parts.recall or not parts.train:
        raise LimitBroken(
            f"{pairs}: {len(every)} pairs leave {len(parts.train)} to train on and {len(parts.recall)} to test with; "
            "add documents, or raise generate.wordings or generate.pairs_per_chunk"
        )
    examples = conversations(parts.train, split)
    watched = conversations(parts.dev, msgspec.structs.replace(split, multi_turn_share=0.0))
    asked = [question_of(pair, "recall") for pair in parts.recall] + [question_of(pair, "held_out") for pair in parts.held_out]
    general = general_examples(len(examples), [one.question for one in [*parts.dev, *parts.recall, *parts.held_out]], split)
    documents = len({pair.document_id for pair in every})
    rules = read_rules(SUITE, split=msgspec.structs.replace(split, max_document_share=allowed_share(documents, split)))
    with tempfile.TemporaryDirectory() as unread, checking(Path(unread)) as check:
        check("split", table([*examples, *general], watched, asked, by_id(every)), rules)
    write_records(train, [*examples, *general])
    write_records(dev, watched)
    write_records(questions, asked)
    sizes = {name: len(getattr(parts, name)) for name in ("train", "dev", "recall", "held_out")}
    reasons = {reason: len(found) for reason, found in sorted(parts.unused.items())}
    unused = sum(reasons.values())
    kinds = {"multi_turn": len(examples) - len(parts.train), "general": len(general)}
    counts = {"pairs": len(every), "unused": unused, "examples": len(examples) + len(general)}
    write_json(metrics, counts | kinds | sizes | {"unused_by_reason": reasons})
    say(
        f"split: {len(every)} pairs = {sizes['train']} train + {sizes['dev']} dev + {sizes['recall']} recall"
        f" + {sizes['held_out']} held out + {unused} unused; {kinds['multi_turn']} multi-turn and {kinds['general']} general examples"
    )


if __name__ == "__main__":
    run(main)
