"""Which chunks are nearest to a question, by the cosine of their embeddings."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from stages.embedding import Embed, embedding
from stages.executor import LOCAL, Executor
from stages.files import new_file
from stages.models import model_sha256
from stages.records import Chunk, content_id

if TYPE_CHECKING:
    import numpy as np


class Hit(msgspec.Struct, frozen=True):
    """A chunk that was found, and the cosine of its embedding and the question's."""

    chunk_id: str
    cosine: float


def searcher(
    chunks: Sequence[Chunk], reference: str, store: Path, executor: Executor = LOCAL
) -> Callable[[Sequence[str], int], list[list[Hit]]]:
    """A function from questions and `top_k` to the `top_k` nearest of `chunks` for each question, best first, by the embedder `reference`.

    The search is exact. Chunks that are equally near come by id, so their order in `chunks` changes nothing. Fewer chunks than
    `top_k` all come. The embeddings of `chunks` are computed once and kept in `store`; the embedder loads when it is first needed.
    """
    chunks = sorted(chunks, key=lambda chunk: chunk.id)
    embed = embedding(reference, executor)
    vectors = kept_vectors([searched(chunk) for chunk in chunks], reference, embed, store)

    def search(questions: Sequence[str], top_k: int) -> list[list[Hit]]:
        if not questions or not chunks:
            return [[] for _ in questions]
        return [
            [Hit(chunks[place].id, cosine) for place, cosine in found]
            for found in nearest_places(embed(questions), vectors, top_k)
        ]

    return search


def nearest_places(questions: "np.ndarray", vectors: "np.ndarray", top_k: int) -> list[list[tuple[int, float]]]:
    """For each of `questions` (m, d), the places and cosines of the `top_k` nearest of `vectors` (n, d), n > 0; the first of equals first."""
    import numpy as np

    # a product is rounded in other ways in a larger batch: equal chunks must stay equal
    cosines = (questions @ vectors.T).astype(np.float64).round(5)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :top_k]
    return [[(int(place), float(row[place])) for place in places] for row, places in zip(cosines, order, strict=True)]


def searched(chunk: Chunk) -> str:
    """The text that stands for `chunk`: many a question names what only the headings say."""
    return f"{chunk.topic()}\n\n{chunk.text}"


def kept_vectors(texts: Sequence[str], reference: str, embed: Embed, store: Path) -> "np.ndarray":
    """The embeddings (n, d) of `texts`, from <store>/vectors-<hash of texts and embedder>.npy where they were computed before."""
    import numpy as np

    path = store / f"vectors-{content_id(model_sha256(reference), texts)}.npy"
    try:
        kept = np.load(path, allow_pickle=False)
        if kept.ndim == 2 and len(kept) == len(texts):
            return kept
    except (FileNotFoundError, EOFError, ValueError):  # not there, or cut short
        pass
    vectors = np.asarray(embed(texts), dtype=np.float32)
    with new_file(path) as draft, open(draft, "wb") as stream:  # a stream: np.save adds .npy to a path that has none
        np.save(stream, vectors)
    return vectors
