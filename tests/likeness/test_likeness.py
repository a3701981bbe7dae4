"""likeness: what is alike is found and what differs in a name or number is not, by work that grows with the texts."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stages.likeness
from stages.likeness import EXACT, clusters, joined, near_duplicates, near_pairs, repeats

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]  # 150 of them
PAGE = " ".join(WORDS[:22])  # 20 triples


def unit(rows: Any) -> Any:
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def sentences(count: int) -> list[str]:
    """Sentences of 12 drawn words; of every ten, the last is the first with another word at its end, a Jaccard of 9/11."""
    draw = random.Random(5)
    found = [" ".join(draw.choices(WORDS, k=12)) for _ in range(count)]
    return [f"{found[n - 9].rsplit(' ', 1)[0]} other" if n % 10 == 9 else text for n, text in enumerate(found)]


def spread_vectors(count: int) -> Any:
    """Unit vectors of width 32; of every ten, the last is near the first."""
    draw = np.random.default_rng(5)
    rows = unit(draw.normal(size=(count, 32)))
    rows[9::10] = rows[0::10] + 0.02 * draw.normal(size=(count // 10, 32))
    return unit(rows)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Pairs of texts whose words were compared so far."""
    pairs: list[tuple[str, str]] = []
    jaccard = stages.likeness._jaccard

    def counted(one: str, other: str) -> float:
        pairs.append((one, other))
        return jaccard(one, other)

    monkeypatch.setattr("stages.likeness._jaccard", counted)
    yield pairs


def test_texts_are_near_from_the_threshold_on() -> None:
    end = PAGE.rsplit(" ", 1)[0] + " changed"  # 19 of 21 triples are shared
    middle = PAGE.replace(WORDS[11], "changed")  # 17 of 23
    assert near_duplicates([PAGE, end, middle], 0.8) == [0, 0, 2]
    assert near_duplicates([middle, PAGE], 0.74) == [0, 1]
    assert near_duplicates([middle, PAGE], 0.73) == [0, 0]


def test_case_marks_and_blanks_make_no_difference_and_order_does() -> None:
    backwards = " ".join(reversed(PAGE.split()))
    assert near_duplicates([backwards, PAGE, PAGE.upper().replace(" ", ",\n")], 1.0) == [0, 1, 1]


def test_texts_of_one_or_two_words_are_compared_whole_and_texts_without_any_are_equal() -> None:
    assert near_duplicates(["", "oil", "Oil!", "winter oil", "...", "oil winter"], 0.5) == [0, 1, 1, 3, 0, 5]


def test_a_chain_of_near_texts_is_one_cluster() -> None:
    chain = [" ".join(WORDS[start : start + 22]) for start in (0, 1, 2, 3, 4)]  # neighbours share 19 of 21, the ends 16 of 24
    assert near_duplicates([chain[0], chain[4]], 0.8) == [0, 1]
    assert near_duplicates(chain[::-1], 0.8) == [0, 0, 0, 0, 0]


def test_nothing_gives_nothing() -> None:
    nothing = np.zeros((0, 4), dtype=np.float32)
    assert near_duplicates([], 0.8) == near_pairs(nothing, 0.9) == clusters([], [], nothing, nothing, 0.9) == joined(0, []) == []


def test_numbers_are_joined_through_others_under_the_least() -> None:
    assert joined(7, [(5, 1), (6, 5), (2, 3), (4, 4)]) == [0, 1, 2, 2, 4, 1, 1]


def test_every_planted_near_duplicate_is_found_and_no_other() -> None:
    assert near_duplicates(sentences(2000), 0.8) == [n - 9 if n % 10 == 9 else n for n in range(2000)]


def test_vectors_are_paired_from_the_cosine_on() -> None:
    angles = np.radians([0, 10, 90, 19, 180])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # cos 9 = 0.988, cos 10 = 0.985, cos 19 = 0.946
    assert near_pairs(rows, 0.95) == [(0, 1), (1, 3)]
    assert near_pairs(rows, 0.94) == [(0, 1), (0, 3), (1, 3)]
    assert near_pairs(rows, 0.986) == [(1, 3)]


@pytest.mark.parametrize("count", [EXACT, EXACT + 1000])
def test_pairs_are_those_of_comparing_each_with_each(count: int) -> None:
    rows = spread_vectors(count)
    all_pairs = np.argwhere(np.triu(rows @ rows.T >= 0.95, k=1)).tolist()
    assert len(all_pairs) == count // 10
    assert near_pairs(rows, 0.95) == [tuple(pair) for pair in all_pairs]


def test_threads_change_no_pair_and_torch_in_the_same_process_does_not_hurt() -> None:
    import faiss
    import torch

    rows, before = spread_vectors(EXACT + 1000), faiss.omp_get_max_threads()
    found = []
    for threads in (1, 2):
        faiss.omp_set_num_threads(threads)
        assert float((torch.ones(300, 300) @ torch.ones(300, 300)).sum()) == 300.0**3
        found.append(near_pairs(rows, 0.5))
        assert faiss.omp_get_max_threads() == threads
    faiss.omp_set_num_threads(before)
    assert found[0] == found[1] and len(found[0]) > 300


ASKED = ("How do I set `train.r` higher?", "Set `train.r` to 32 in params.yaml, then run it again.")
NEAR, FAR = 0.96, 0.90  # cosines


@pytest.mark.parametrize(
    ("question", "answer", "question_cosine", "answer_cosine", "is_alike"),
    [
        ("how do I set train.r higher", "Set train.r to 32 in params.yaml, then run it again", FAR, FAR, True),  # the same words
        ("How can I raise `train.r`?", "In params.yaml, put 32 for `train.r`.", NEAR, NEAR, True),
        ("How can I raise `train.r`?", ASKED[1].upper().replace("TRAIN.R", "train.r"), NEAR, 0.94, True),
        ("How can I raise `train.r`?", "In params.yaml, put 32 for `train.r`.", NEAR, FAR, False),
        ("How can I raise `train.r`?", "In params.yaml, put 32 for `train.r`.", FAR, NEAR, False),
        ("How do I set `train.alpha` higher?", "Set `train.alpha` to 32 in params.yaml, then run it again.", NEAR, NEAR, False),
        ("How do I set `train.r` higher?", "Set `train.r` to 64 in params.yaml, then run it again.", NEAR, NEAR, False),
    ],
)
def test_two_pairs_are_alike_by_words_or_meaning_of_both_question_and_answer(
    question: str, answer: str, question_cosine: float, answer_cosine: float, is_alike: bool
) -> None:
    def at(cosine: float) -> Any:
        return unit([[1, 0], [cosine, (1 - cosine**2) ** 0.5]])

    found = clusters([ASKED[0], question], [ASKED[1], answer], at(question_cosine), at(answer_cosine), 0.95)
    assert found == ([0, 0] if is_alike else [0, 1])


def test_pairs_far_in_meaning_are_alike_when_nearly_all_words_are_shared() -> None:
    other = PAGE.rsplit(" ", 1)[0] + " changed"
    found = clusters([f"{PAGE}?", "Why?", f"{other}?"], [PAGE, "So.", other], *[unit(np.eye(3))] * 2, 0.95)
    assert found == [0, 1, 0]


def test_the_cosine_decides_where_words_differ() -> None:
    rows = unit([[1, 0], [0.96, 0.28]])
    questions, answers = ["How hot is tea?", "At what heat is tea made?"], ["Tea is hot.", "It is made with boiling water."]
    assert [clusters(questions, answers, rows, rows, least) for least in (0.95, 0.97)] == [[0, 0], [0, 1]]


def test_comparisons_of_texts_grow_with_their_number(compared: list[tuple[str, str]]) -> None:
    counts = []
    for count in (500, 2000):
        compared.clear()
        near_duplicates(sentences(count), 0.8)
        counts.append(len(compared))
    assert 50 <= counts[0] < 100 and 200 <= counts[1] <= 5 * counts[0]  # each with each would be 16 times as many


def test_distances_of_vectors_grow_as_n_log_n() -> None:
    import faiss

    counts = []
    for count in (2 * EXACT, 4 * EXACT):
        faiss.cvar.hnsw_stats.reset()
        near_pairs(spread_vectors(count), 0.95)
        counts.append(faiss.cvar.hnsw_stats.ndis)
    assert 0 < counts[1] < 2.4 * counts[0]  # 2 log 8000 / log 4000 = 2.17; each with each would be 4


def test_templated_questions_that_differ_in_a_name_are_not_even_compared(compared: list[tuple[str, str]]) -> None:
    names = [f"`{word}`" for word in WORDS]
    rows = unit(np.ones((len(names), 2)))
    questions, answers = ([text.format(name) for name in names] for text in ("What does the setting {} do?", "It sets {}."))
    assert clusters(questions, answers, rows, rows, 0.95) == list(range(len(names))) and not compared


def test_many_copies_of_one_text_cost_no_comparison(compared: list[tuple[str, str]]) -> None:
    assert near_duplicates([PAGE] * 1000, 0.8) == [0] * 1000 and not compared


# texts that repeat known ones


def test_a_text_repeats_a_known_one_in_the_same_words_or_nearly() -> None:
    near = PAGE.rsplit(" ", 1)[0] + " changed"  # 19 of 21 triples are shared
    far = PAGE.replace(WORDS[11], "changed")  # 17 of 23, which is below MIN_JACCARD
    assert repeats([PAGE.upper(), far, near, "something else"], [PAGE, PAGE]) == [0, 2]
    assert repeats([PAGE], []) == [] and repeats([], [PAGE]) == []


def test_near_texts_that_differ_in_a_number_or_in_code_do_not_repeat_each_other_and_marks_alone_make_no_difference() -> None:
    for one, other in (("`train.r`", "`train.seed`"), ("port 5000", "port 5001"), ("`cat`", "dog")):
        assert repeats([f"{PAGE} {one}"], [f"{PAGE} {other}"]) == [], one
        assert repeats([f"{PAGE} {one}"], [f"{PAGE} more {one.replace('`', '')}"]) == [0], one


def test_work_on_repeats_grows_with_the_texts(compared: list[tuple[str, str]]) -> None:
    texts = sentences(1000)
    counts = []
    for size in (500, 1000):
        compared.clear()
        found = repeats(texts[9:size:10], [text for number, text in enumerate(texts[:size]) if number % 10 != 9])
        assert len(found) == size / 10
        counts.append(len(compared))
    assert counts[1] < 2.5 * counts[0] < 2.5 * 500
