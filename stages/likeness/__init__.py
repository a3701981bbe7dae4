"""Which texts say nearly the same: by their words (MinHash LSH) and by their meaning (nearest embeddings), in clusters.

Only texts that an index finds near each other are compared, so that work grows with the texts and not with the pairs of them.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from stages.evidence import words

if TYPE_CHECKING:
    import numpy as np

SHINGLE_WORDS = 3
PERMUTATIONS = 256  # with half as many, seven times as many templated texts, of Jaccard 0.3, would be compared
MIN_JACCARD = 0.8  # of two questions or answers that are alike by their words
EXACT = 2000  # up to so many vectors, each is compared with each
NEIGHBOURS = 64  # of a vector among more, which are looked at
MARKS = re.compile(r"`+([^`]+)`+|(\d+(?:[.,:]\d+)*)")


def near_duplicates(texts: Sequence[str], threshold: float) -> list[int]:
    """The cluster of each text: the least index of those it is near to, directly or through others.

    Two texts are near when the Jaccard similarity of their word triples, without case and marks, is at least `threshold`. A pair at
    the threshold is found with a chance above 0.99. Texts without a word are equal to each other. No text gives [].
    """
    firsts: dict[str, int] = {}
    equal = [(firsts.setdefault(words(text), number), number) for number, text in enumerate(texts)]
    kept = list(firsts.values())
    near = _near_by_words([texts[number] for number in kept], threshold)
    found = [(kept[one], kept[other]) for one, other in near if _jaccard(texts[kept[one]], texts[kept[other]]) >= threshold]
    return joined(len(texts), equal + found)


def repeats(texts: Sequence[str], known: Iterable[str]) -> list[int]:
    """The places, in order, of those of `texts` that say what one of `known` says: in the same words, or near to it by MIN_JACCARD.

    Near texts that differ in a number, or in a word that one of them sets as `code`, are two: of templated questions, many do.
    """
    others = list(dict.fromkeys(known))
    equal = {words(text) for text in others}
    found = {place for place, text in enumerate(texts) if words(text) in equal}
    for one, place in _near_by_words([*others, *texts], MIN_JACCARD):
        if one < len(others) <= place and (text := texts[place - len(others)]) and _jaccard(others[one], text) >= MIN_JACCARD:
            differing = set(words(others[one]).split()) ^ set(words(text).split())
            marked = words(" ".join("".join(mark) for mark in MARKS.findall(f"{others[one]}\n{text}"))).split()
            found |= set() if differing & set(marked) else {place - len(others)}
    return sorted(found)


def near_pairs(vectors: "np.ndarray", min_cosine: float) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, sorted, of rows of `vectors` (n, d), of unit length, whose cosine is at least `min_cosine`.

    Up to EXACT rows every pair is found; beyond, an HNSW graph finds nearly all among the NEIGHBOURS nearest of each row. The number
    of threads changes nothing.
    """
    import numpy as np

    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    least = min_cosine - 1e-5  # products and distances are rounded in other ways than the cosine below
    if len(rows) <= EXACT:
        found = np.argwhere(rows @ rows.T >= least)
    else:
        import faiss

        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # several would add to the graph in an order that differs between runs
        index = faiss.IndexHNSWFlat(rows.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        index.add(rows)
        faiss.omp_set_num_threads(threads)
        index.hnsw.efSearch = NEIGHBOURS
        cosines, others = index.search(rows, NEIGHBOURS)  # its range_search ends the process after some thousand rows
        places = np.argwhere(cosines >= least)
        found = np.stack([places[:, 0], others[places[:, 0], places[:, 1]]], axis=1)
    pairs = np.unique(np.sort(found[found[:, 0] != found[:, 1]], axis=1), axis=0)
    exact = np.einsum("ij,ij->i", rows[pairs[:, 0]], rows[pairs[:, 1]])
    return [(int(one), int(other)) for one, other in pairs[exact >= min_cosine]]


def clusters(
    questions: Sequence[str],
    answers: Sequence[str],
    question_vectors: "np.ndarray",
    answer_vectors: "np.ndarray",
    min_cosine: float,
) -> list[int]:
    """The cluster of each question with its answer: the least index of those it is alike to, directly or through others.

    Two are alike when both questions and answers have equal words, a Jaccard similarity of MIN_JACCARD or more, or a cosine of
    `min_cosine` or more, and when what they set as `code` and their numbers are equal: of templated questions, many differ in one name.
    """
    import numpy as np

    firsts: dict[tuple[str, str], int] = {}
    both = list(zip(questions, answers, strict=True))
    equal = [(firsts.setdefault((words(one), words(other)), number), number) for number, (one, other) in enumerate(both)]
    marked: dict[tuple[frozenset[str], ...], list[int]] = defaultdict(list)
    for number in firsts.values():
        marked[tuple(frozenset(MARKS.findall(text)) for text in both[number])].append(number)
    near: set[tuple[int, int]] = set()
    order = [number for group in marked.values() for number in group]
    kinds = [kind for kind, group in enumerate(marked.values()) for _ in group]
    for one, other in _near_by_words([f"{questions[number]}\n{answers[number]}" for number in order], MIN_JACCARD, kinds):
        near.add((order[one], order[other]))
    for group in marked.values():
        if len(group) > 1:
            # where both cosines reach the threshold, so does that of question and answer put end to end; where one is alike by its
            # words alone, it is a little lower
            rows = np.hstack([question_vectors[group], answer_vectors[group]]) / np.sqrt(2)
            near.update((group[one], group[other]) for one, other in near_pairs(rows, min_cosine - 0.02))
    return joined(
        len(both),
        equal
        + [
            (one, other)
            for one, other in sorted(near)
            if _alike(questions[one], questions[other], question_vectors[one] @ question_vectors[other], min_cosine)
            and _alike(answers[one], answers[other], answer_vectors[one] @ answer_vectors[other], min_cosine)
        ],
    )


def joined(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` numbers the least number that `pairs` join it with, directly or through others."""
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ones, others = np.array(list(pairs), dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(ones), dtype=bool), (ones, others)), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    firsts = np.unique(labels, return_index=True)[1]
    return [int(number) for number in firsts[labels]]


def _near_by_words(texts: Sequence[str], threshold: float, kinds: Sequence[int] | None = None) -> Iterator[tuple[int, int]]:
    """Pairs of texts of one kind that are likely to reach `threshold`, and others that are not."""
    from datasketch import MinHash, MinHashLSH

    # the kind is part of a shingle, so that texts of different kinds share none and never meet in the index
    shingled = (
        [f"{kind} {one}".encode() for one in _shingles(text)] for text, kind in zip(texts, kinds or [0] * len(texts), strict=True)
    )
    # a missed pair is lost, a needless one is compared and dropped; beyond 0.95 the index would have a single band
    index = MinHashLSH(min(threshold, 0.95), num_perm=PERMUTATIONS, weights=(0.002, 0.998))
    for number, sketch in enumerate(MinHash.generator(shingled, num_perm=PERMUTATIONS)):
        yield from ((earlier, number) for earlier in index.query(sketch))
        index.insert(number, sketch, check_duplication=False)


@functools.lru_cache(maxsize=2**16)  # a text is compared with several
def _shingles(text: str) -> frozenset[str]:
    found = words(text).split()
    return frozenset(" ".join(found[start : start + SHINGLE_WORDS]) for start in range(max(1, len(found) - SHINGLE_WORDS + 1)))


def _jaccard(one: str, other: str) -> float:
    first, second = _shingles(one), _shingles(other)
    return len(first & second) / len(first | second)


def _alike(one: str, other: str, cosine: float, min_cosine: float) -> bool:
    return bool(cosine >= min_cosine) or _jaccard(one, other) >= MIN_JACCARD
