"""split: no section is both held out and trained, no question both trained and asked, and nothing is lost uncounted."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stages.general import read_general
from stages.likeness import near_duplicates
from stages.program import LimitBroken
from stages.records import Example, Message, Pair, Question, by_id, content_id, evolve, read_records, write_records
from stages.split import Params, Parts, conversations, drawn_share, general_examples, main, part, question_of

SPLIT = Params(
    seed=1,
    held_out_share=0.2,
    max_recall=100,
    max_held_out=100,
    max_dev=5,
    turns=3,
    multi_turn_share=0.5,
    max_document_share=0.5,
    general_share=0.0,
)
ALL_TRAINED = msgspec.structs.replace(SPLIT, held_out_share=0.0, max_document_share=1.0)
# what turning each setting must move; the value differs enough from SPLIT's to show in 80 facts
CHANGES = {
    "seed": 2,
    "held_out_share": 0.5,
    "max_recall": 3,
    "max_held_out": 2,
    "max_dev": 9,
    "turns": 2,
    "multi_turn_share": 1.0,
    "max_document_share": 0.25,
    "general_share": 0.1,
}
ASKED = ("dev", "recall", "held_out")


def pair(section: str, fact: int, wording: int, document: str) -> Pair:
    fact_id = f"{section}-f{fact}"
    return Pair(
        id=content_id(fact_id, wording),
        chunk_id=f"{section}-c",
        fact_id=fact_id,
        section_id=section,
        document_id=document,
        path=f"{document}.md",
        heading_path=(section,),
        question=f"{fact_id}, asked in way {wording}?",
        answer=f"The answer of {fact_id}.",
        quote=f"The answer of {fact_id}.",
        quote_start=0,
        quote_end=10,
        type="factual",
        model="m",
        similarity=0.9,
        wording=wording,
        cluster=content_id(fact_id, wording),
        flags=(),
        reviewed=False,
    )


def corpus(documents: int = 4, name: str = "d") -> list[Pair]:
    """`documents` of 5 sections of 4 facts, with 1, 2, 3 and 4 wordings."""
    return [
        pair(f"{name}{document}-s{section}", fact, wording, f"{name}{document}")
        for document in range(documents)
        for section in range(5)
        for fact in range(4)
        for wording in range(1, fact + 2)
    ]


def outputs(
    folder: Path, pairs: list[Pair], split: Params
) -> tuple[list[Example], list[Example], list[Question], dict[str, Any]]:
    write_records(folder / "pairs.jsonl", pairs)
    paths = [folder / name for name in ("pairs.jsonl", "train.jsonl", "dev.jsonl", "questions.jsonl", "metrics.json")]
    main(*paths, split=split)
    train, dev, questions = paths[1:4]
    metrics = json.loads(paths[4].read_bytes())
    return read_records(train, Example), read_records(dev, Example), read_records(questions, Question), metrics


def test_no_section_is_held_out_and_trained() -> None:
    parts = part(corpus(), SPLIT)
    held_out = {one.section_id for one in parts.held_out}
    rest = {one.section_id for name in ("train", "dev", "recall") for one in getattr(parts, name)}
    assert held_out == {s for s in {one.section_id for one in corpus()} if drawn_share(1, s) < 0.2}
    assert held_out and rest and not held_out & rest and len(held_out | rest) == 20


def test_a_held_out_fact_is_asked_once_in_its_first_wording() -> None:
    held_out = part(corpus(), SPLIT).held_out
    assert {one.wording for one in held_out} == {1}
    assert len(held_out) == len({one.fact_id for one in held_out}) == 4 * len({one.section_id for one in held_out})


def test_no_question_is_trained_and_asked_and_every_asked_fact_is_trained_in_other_words() -> None:
    parts = part(corpus(), SPLIT)
    trained = {one.fact_id for one in parts.train}
    for asked in (parts.recall, parts.dev):
        assert asked and {one.fact_id for one in asked} <= trained
        assert not {one.question for one in asked} & {one.question for one in parts.train}
    assert not {one.fact_id for one in parts.recall} & {one.fact_id for one in parts.dev}


def test_a_fact_with_one_wording_is_trained_and_the_last_of_several_is_asked() -> None:
    alone, first, second, third = (pair("s", fact, wording, "d") for fact, wording in ((0, 1), (1, 1), (1, 2), (1, 3)))
    parts = part([third, alone, second, first], ALL_TRAINED)
    assert parts == Parts(train=[alone, first, second], dev=[], recall=[third], held_out=[], unused={})


def test_recall_is_never_less_than_half_of_the_spare_wordings() -> None:
    pairs = [pair(f"s{section}", 0, wording, "d") for section in range(7) for wording in (1, 2)]
    parts = part(pairs, msgspec.structs.replace(ALL_TRAINED, max_dev=5))
    assert (len(parts.train), len(parts.recall), len(parts.dev)) == (7, 4, 3)
    parts = part(pairs, msgspec.structs.replace(ALL_TRAINED, max_dev=1, max_recall=4))
    assert (len(parts.train), len(parts.recall), len(parts.dev)) == (9, 4, 1)  # 2 spare wordings are trained after all


def test_turns_of_a_conversation_come_from_one_document_and_different_facts() -> None:
    pairs = by_id(corpus())
    examples = conversations(list(pairs.values()), SPLIT)
    several = [example for example in examples if len(example.pair_ids) > 1]
    # a share of 0.5 would be 33 conversations; the 20 facts of each of 4 documents make 6 groups of 3
    assert (len(examples) - len(several), len(several)) == (200, 24)
    for example in several:
        turns = [pairs[id] for id in example.pair_ids]
        assert {turn.document_id for turn in turns} == {example.document_id}
        assert len({turn.fact_id for turn in turns}) == 3
        said = [(message.role, message.content) for message in example.messages]
        assert said == [line for turn in turns for line in (("user", turn.question), ("assistant", turn.answer))]


def test_the_share_of_pairs_bounds_the_conversations() -> None:
    examples = conversations(corpus(), msgspec.structs.replace(SPLIT, multi_turn_share=0.1))
    assert len(examples) - 200 == 6  # 200 * 0.1 / 3


def test_new_pages_leave_the_choice_of_held_out_sections_unchanged() -> None:
    before = {one.id for one in part(corpus(), SPLIT).held_out}
    after = {one.id for one in part(corpus(documents=3, name="new") + corpus(), SPLIT).held_out}
    assert before < after and before == {one.id for one in part(corpus(), SPLIT).held_out} & after
    assert not after & {one.id for one in part(corpus(), SPLIT).train}


def test_a_drawn_share_is_even_and_follows_the_seed() -> None:
    drawn = [drawn_share(3407, f"section {number}") for number in range(1000)]
    assert all(0 <= share < 1 for share in drawn) and 450 < sum(share < 0.5 for share in drawn) < 550
    assert drawn_share(3407, "a") == int(content_id(3407, "a"), 16) / 16**16 != drawn_share(3408, "a")


def test_the_counts_add_up_to_the_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = msgspec.structs.replace(SPLIT, max_held_out=3)
    train, dev, questions, metrics = outputs(tmp_path, corpus(), split)
    recall = [question for question in questions if question.set == "recall"]
    assert metrics["pairs"] == 200 == sum(metrics[name] for name in ("train", "dev", "recall", "held_out", "unused"))
    assert (metrics["recall"], metrics["held_out"]) == (len(recall), 3) and len(questions) == len(recall) + 3
    assert (metrics["examples"], metrics["dev"]) == (len(train), len(dev))
    assert metrics["multi_turn"] == metrics["examples"] - metrics["train"] > 0
    held_sections = {one.section_id for one in part(corpus(), SPLIT).held_out}
    assert metrics["unused"] == 10 * len(held_sections) - 3  # a section has 1 + 2 + 3 + 4 pairs
    assert metrics["unused_by_reason"] == {"held-out-surplus": metrics["unused"]}
    said = capsys.readouterr().out
    assert said.startswith("split: 200 pairs = ") and said.count("\n") == 1 and f" + {metrics['unused']} unused; " in said


def test_the_files_keep_questions_and_training_apart(tmp_path: Path) -> None:
    train, dev, questions, _ = outputs(tmp_path, corpus(), SPLIT)
    pairs = by_id(corpus())
    trained = {id for example in train for id in example.pair_ids}
    assert all(len(example.pair_ids) == 1 for example in dev) and any(len(example.pair_ids) == 3 for example in train)
    assert not trained & {question.pair_id for question in questions}
    assert not trained & {id for example in dev for id in example.pair_ids}
    for question in questions:
        source = pairs[question.pair_id]
        assert (question.question, question.reference, question.section_id) == (source.question, source.answer, source.section_id)
        assert (source.section_id in {pairs[id].section_id for id in trained}) == (question.set == "recall")


def test_a_question_carries_its_evidence_and_the_facts_of_its_answer_that_stand_there() -> None:
    one = evolve(
        pair("s", 1, 1, "d"),
        question="How do I run `dvc repro` on 4 cores?",
        answer="Run `dvc repro` with `--jobs` and 4, or 16 where `params.yaml` says so.",
        quote="`dvc repro` takes --jobs\nand a number such as 4, which params.yaml keeps.",
    )
    asked = question_of(one, "held_out")
    assert asked.key_facts == ("--jobs", "params.yaml")
    assert (asked.set, asked.quote, asked.chunk_id) == ("held_out", one.quote, "s-c")


@pytest.mark.parametrize(("name", "value"), CHANGES.items())
def test_each_setting_changes_the_output(name: str, value: Any) -> None:
    def output(split: Params) -> tuple[Parts, list[Example], list[Example]]:
        parts = part(corpus(), split)
        return parts, conversations(parts.train, split), general_examples(100, [], split)

    assert output(msgspec.structs.replace(SPLIT, **{name: value})) != output(SPLIT)


def test_every_setting_has_such_a_test() -> None:
    assert set(CHANGES) == set(Params.__struct_fields__)


def test_the_order_of_pairs_changes_nothing() -> None:
    def ids(parts: Parts) -> dict[str, list[str]]:
        everything = {name: getattr(parts, name) for name in ("train", *ASKED)} | parts.unused
        return {name: sorted(one.id for one in found) for name, found in everything.items()}

    assert ids(part(corpus()[::-1], SPLIT)) == ids(part(corpus(), SPLIT))


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    outputs(tmp_path, corpus(), SPLIT)
    names = ("train.jsonl", "dev.jsonl", "questions.jsonl", "metrics.json")
    first = [(tmp_path / name).read_bytes() for name in names]
    outputs(tmp_path, corpus(), SPLIT)
    assert [(tmp_path / name).read_bytes() for name in names] == first


def test_too_few_pairs_are_one_clear_error_and_nothing_is_written(tmp_path: Path) -> None:
    alone = [pair("s", fact, 1, "d") for fact in range(3)]
    with pytest.raises(
        LimitBroken, match=r"pairs\.jsonl: 3 pairs leave 3 to train on and 0 to test with; add documents, or raise"
    ):
        outputs(tmp_path, alone, ALL_TRAINED)
    with pytest.raises(LimitBroken, match="0 pairs leave 0 to train on"):
        outputs(tmp_path, [], SPLIT)
    assert not (tmp_path / "train.jsonl").exists()


def test_a_text_changed_elsewhere_does_not_move_a_pair() -> None:
    pairs = corpus()
    reworded = [evolve(pairs[0], answer="Another answer."), *pairs[1:]]
    assert [one.id for one in part(pairs, SPLIT).recall] == [one.id for one in part(reworded, SPLIT).recall]


# near-duplicates, overlap and one document's share


def test_the_wording_asked_is_the_last_that_is_no_near_duplicate_of_a_trained_one() -> None:
    first, second, third, fourth = (pair("s", 1, wording, "d") for wording in (1, 2, 3, 4))
    twin = evolve(fourth, cluster=second.cluster)
    assert part([first, second, third, twin], ALL_TRAINED) == Parts(
        train=[first, second, twin], dev=[], recall=[third], held_out=[], unused={}
    )


def test_wordings_like_the_one_asked_are_unused_when_no_wording_stands_alone() -> None:
    first, second, third, fourth = (pair("s", 1, wording, "d") for wording in (1, 2, 3, 4))
    both = [evolve(second, cluster=first.cluster), evolve(fourth, cluster=third.cluster)]
    parts = part([first, third, *both], ALL_TRAINED)
    assert (parts.train, parts.recall, parts.unused) == ([first, both[0]], [both[1]], {"like-a-question": [third]})


def test_a_fact_whose_wordings_are_all_alike_is_trained_and_not_asked() -> None:
    pairs = [evolve(pair("s", 1, wording, "d"), cluster="one") for wording in (1, 2, 3)]
    assert part(pairs, ALL_TRAINED) == Parts(train=pairs, dev=[], recall=[], held_out=[], unused={})


def test_a_wording_like_another_facts_or_with_the_words_of_its_question_is_not_asked() -> None:
    first, second, other = pair("s", 1, 1, "d"), pair("s", 1, 2, "d"), pair("s", 2, 1, "d")
    assert part([first, second, other], ALL_TRAINED).recall == [second]
    for like in (evolve(other, cluster=second.cluster), evolve(other, question=second.question.upper() + "!")):
        assert part([first, second, like], ALL_TRAINED).recall == [first]


def sections_by_share() -> tuple[str, str]:
    """A section that SPLIT holds out, and one that it trains."""
    names = [f"section-{number}" for number in range(50)]
    return next(n for n in names if drawn_share(1, n) < 0.2), next(n for n in names if drawn_share(1, n) >= 0.2)


def test_a_held_out_pair_that_a_trained_section_also_has_is_unused() -> None:
    held, trained = sections_by_share()
    quote = "The gearbox of the old machine needs four grams of clean winter oil for each year of work."
    known = evolve(pair(trained, 0, 1, "d"), quote=quote)
    kept, *overlapping = [
        pair(held, 1, 1, "e"),
        evolve(pair(held, 2, 1, "e"), cluster=known.cluster),
        evolve(pair(held, 3, 1, "e"), quote=quote.replace(" ", "\n")),
        evolve(pair(held, 4, 1, "e"), quote=quote.replace("work", "service")),  # 15 of 17 word triples
        evolve(pair(held, 5, 1, "e"), question=known.question.upper()),
    ]
    parts = part([known, kept, *overlapping], SPLIT)
    assert (parts.train, parts.held_out, parts.unused) == ([known], [kept], {"held-out-overlap": overlapping})


def of_documents(*sizes: int) -> list[Pair]:
    """A trained pair for each fact of documents of such sizes; the similarity falls with the fact's number."""
    return [
        evolve(pair(f"d{document}-s", fact, 1, f"d{document}"), similarity=1 - fact / 1000)
        for document, size in enumerate(sizes)
        for fact in range(size)
    ]


@pytest.mark.parametrize(
    ("sizes", "share", "kept"),
    [
        ((90, 20, 10, 10), 0.5, [40, 20, 10, 10]),  # 40 of 80
        ((90, 20, 10, 10), 0.4, [26, 20, 10, 10]),  # 26 of 66; a 27th would be 27 of 67, above 0.4
        ((90, 20, 10, 10), 0.75, [90, 20, 10, 10]),
        ((90, 20, 10, 10), 0.2, [90, 20, 10, 10]),  # four documents cannot all stay below a quarter
        ((90,), 0.5, [90]),
        ((90, 20, 10), 0.5, [90, 20, 10]),
    ],
)
def test_a_document_gives_at_most_its_share_of_the_trained_pairs(sizes: tuple[int, ...], share: float, kept: list[int]) -> None:
    parts = part(of_documents(*sizes), msgspec.structs.replace(ALL_TRAINED, max_document_share=share))
    by_document = [[one for one in parts.train if one.document_id == f"d{number}"] for number in range(len(sizes))]
    assert [len(found) for found in by_document] == kept
    assert len(parts.unused.get("document-share", [])) == sum(sizes) - sum(kept)
    assert {one.similarity for one in by_document[0]} == {1 - fact / 1000 for fact in range(kept[0])}


def test_a_question_whose_fact_is_no_longer_trained_is_unused() -> None:
    weak = [evolve(pair("d0-s", 99, wording, "d0"), similarity=0.1) for wording in (1, 2)]
    parts = part([*of_documents(30, 10, 1, 1), *weak], msgspec.structs.replace(ALL_TRAINED, max_document_share=0.5))
    assert len(parts.train) == 24 and not parts.recall
    assert {reason: len(found) for reason, found in parts.unused.items()} == {"document-share": 19, "fact-untrained": 1}
    assert parts.unused["fact-untrained"] == [weak[1]]


# planted leaks: what `part` would do with a bug in it


def leak_of(name: str, parts: Parts) -> Parts:
    """`parts` with a leak in them."""
    one, asked = parts.train[0], parts.recall[0]
    if name == "recall":
        return msgspec.structs.replace(parts, recall=[evolve(asked, question=f"{one.question.upper()} ")])
    if name == "dev":
        return msgspec.structs.replace(parts, dev=[evolve(parts.dev[0], question=one.question)])
    if name == "held out":
        return msgspec.structs.replace(parts, held_out=[evolve(parts.held_out[0], question=one.question)])
    if name == "section":
        return msgspec.structs.replace(parts, train=[*parts.train, *parts.unused["held-out-surplus"][:1]])
    if name == "document":
        others = [pair for pair in parts.train if pair.document_id != "d0"][:3]
        return msgspec.structs.replace(parts, train=[pair for pair in parts.train if pair.document_id == "d0"] + others)
    return parts


@pytest.mark.parametrize(
    ("leak", "rule"),
    [
        ("recall", "question-trained failed for 1 rows"),
        ("dev", "question-trained failed for 1 rows"),
        ("held out", "question-trained failed for 1 rows"),
        ("section", "held-out-section-trained failed for"),
        ("document", "document-above-share failed for"),
    ],
)
def test_a_leak_in_the_parts_fails_the_stage_by_the_rules_name(
    leak: str, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaky = leak_of(leak, part(corpus(), SPLIT))
    monkeypatch.setattr("stages.split.part", lambda pairs, split: leaky)
    with pytest.raises(LimitBroken, match=f"the critical rule {rule}"):
        outputs(tmp_path, corpus(), SPLIT)
    assert not list(tmp_path.glob("*.json")) and [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize("name", ASKED)
def test_a_question_with_a_near_duplicate_in_training_fails_the_stage(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = part(corpus(), SPLIT)
    asked = getattr(parts, name)[0]
    monkeypatch.setattr("stages.split.part", lambda pairs, split: parts)
    clustered = [evolve(one, cluster=asked.id) if one == parts.train[-1] else one for one in corpus()]
    with pytest.raises(LimitBroken, match=r"the critical rule near-duplicate-trained failed for 1 rows, first \w{16}: "):
        outputs(tmp_path, clustered, SPLIT)
    assert not (tmp_path / "train.jsonl").exists()


def test_pairs_with_planted_leaks_are_parted_so_that_no_rule_fails(tmp_path: Path) -> None:
    pairs = corpus()
    pairs = [evolve(one, cluster=pairs[number - number % 7].cluster) for number, one in enumerate(pairs)]
    pairs = [evolve(one, question=pairs[number - 3].question) if number % 40 == 39 else one for number, one in enumerate(pairs)]
    train, _, questions, metrics = outputs(tmp_path, pairs, SPLIT)
    assert train and {"recall", "held_out"} == {question.set for question in questions}
    assert metrics["unused_by_reason"]["held-out-overlap"] > 0 and metrics["unused_by_reason"]["like-a-question"] > 0
    assert metrics["pairs"] == 200 == sum(metrics[name] for name in ("train", *ASKED, "unused"))
    assert metrics["unused"] == sum(metrics["unused_by_reason"].values())


# general examples


def with_share(share: float, seed: int = 1) -> Params:
    return msgspec.structs.replace(SPLIT, general_share=share, seed=seed)


def said_in(example: Example) -> tuple[str, str]:
    user, assistant = example.messages
    assert (user.role, assistant.role) == ("user", "assistant")
    return user.content, assistant.content


def test_general_conversations_are_60_to_train_and_40_to_test_and_no_two_are_alike() -> None:
    known = read_general()
    assert [sum(one.set == name for one in known) for name in ("train", "test")] == [60, 40] and len(known) == 100
    questions = [one.question for one in known]
    assert near_duplicates(questions, 0.4) == list(range(100))  # the rules of pairs ask for 0.8
    assert len({one.answer.lower() for one in known}) == 100
    for one in known:
        assert one.question == one.question.strip() and one.answer == one.answer.strip() and one.answer
        assert len(one.answer.split()) <= 45, one.answer


def test_answers_in_json_are_json() -> None:
    answers = [one.answer for one in read_general() if "JSON" in one.question]
    assert [json.loads(answer) for answer in sorted(answers)] == [
        ["Saturday", "Sunday"],
        {"city": "Oslo"},
        {"name": "Anna", "age": 31},
    ]


def test_general_examples_reach_their_share_of_all_examples() -> None:
    assert [len(general_examples(count, [], with_share(0.1))) for count in (0, 90, 100, 360)] == [0, 10, 11, 40]
    assert len(general_examples(30, [], with_share(0.25))) == 10
    assert len(general_examples(5000, [], with_share(0.9))) == 60  # none is trained twice
    assert general_examples(90, [], with_share(0.0)) == []


def test_general_examples_are_of_the_set_train_and_never_of_the_set_test() -> None:
    known = {name: {(one.question, one.answer) for one in read_general() if one.set == name} for name in ("train", "test")}
    every = general_examples(5000, [], with_share(0.5))
    assert {said_in(one) for one in every} == known["train"] and not {said_in(one) for one in every} & known["test"]
    assert {(one.pair_ids, one.document_id) for one in every} == {((), "general")} and len({one.id for one in every}) == 60


def test_the_seed_chooses_general_examples_and_a_larger_share_adds_to_a_smaller() -> None:
    chosen = [{one.id for one in general_examples(90, [], with_share(*how))} for how in ((0.1, 1), (0.1, 1), (0.1, 2), (0.2, 1))]
    assert chosen[0] == chosen[1] != chosen[2] and chosen[0] < chosen[3] and len(chosen[3]) == 22


def test_a_general_conversation_like_a_question_that_is_asked_is_not_trained() -> None:
    asked = ["what is the CAPITAL of japan", "What is the largest ocean on earth?", "Something else?"]
    trained = [said_in(one)[0] for one in general_examples(5000, asked, with_share(0.5))]
    assert len(trained) == 59 and "What is the capital of Japan?" not in trained


@pytest.mark.parametrize("name", ASKED)
def test_what_a_set_asks_is_left_out_of_the_general_examples_of_the_stage(name: str, tmp_path: Path) -> None:
    one = getattr(part(corpus(), SPLIT), name)[0]
    pairs = [evolve(pair, question="What is the capital of Japan?") if pair == one else pair for pair in corpus()]
    assert outputs(tmp_path, pairs, with_share(0.9))[3]["general"] == 59


def test_general_examples_are_added_to_the_training_file_and_change_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, dev, questions, metrics = outputs(tmp_path, corpus(), SPLIT)
    more, same_dev, same_questions, counted = outputs(tmp_path, corpus(), with_share(0.1))
    general = [one for one in more if not one.pair_ids]
    assert [one for one in more if one.pair_ids] == train and (same_dev, same_questions) == (dev, questions)
    assert len(general) == counted["general"] == round(len(train) / 9) > 10 and metrics["general"] == 0
    assert abs(len(general) / len(more) - 0.1) < 0.005
    assert counted == metrics | {"general": len(general), "examples": len(more)}
    assert f" multi-turn and {len(general)} general examples\n" in capsys.readouterr().out


def test_a_general_example_that_asks_a_question_of_a_set_fails_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Message("user", part(corpus(), SPLIT).held_out[0].question.upper()), Message("assistant", "Yes.")
    leak = Example(id="leak", pair_ids=(), document_id="general", messages=turns)
    monkeypatch.setattr("stages.split.general_examples", lambda examples, asked, split: [leak])
    with pytest.raises(LimitBroken, match="the critical rule question-trained failed for 1 rows"):
        outputs(tmp_path, corpus(), SPLIT)
