"""The sections of the documentation behind an answer."""

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from stages.evidence import locate, sentences_of
from stages.program import progress, say
from stages.records import Chunk, Passage, by_id, read_records
from stages.release import REBUILD, SOURCES_FILE
from stages.retrieval import kept_vectors, nearest_places, searched, with_passages

if TYPE_CHECKING:
    import numpy as np

# Of questions whose evidence is known, these four have it hardly less often than three of each kind, which are six: trained evidence is
# seldom right but at the first place, and never for a question of which nothing was trained.
MOST_TRAINED, MOST_RETRIEVED = 1, 3
EMBEDDED_AT_ONCE = 32  # texts


class Source(msgspec.Struct, frozen=True):
    """A place in the documentation, and how near it is to the question: similarity, which is no proof of where an answer comes from."""

    kind: Literal["trained", "retrieved"]  # the evidence of a pair that was trained, or a chunk
    passage_id: str  # of the passage that GET /passages/<id> shows
    path: str
    heading_path: tuple[str, ...]
    start: int  # characters into the document
    end: int
    quote: str
    similarity: float  # cosine of the question and the pair's question, or the mean of those with the chunk and with the quote


class Found(msgspec.Struct, frozen=True):
    """What the documentation has on a question, nearest first."""

    sources: tuple[Source, ...]
    covered: bool  # False: nothing is as near as serve.min_similarity


def read_passages(folder: Path) -> list[Passage]:
    """The passages of the release in `folder`; for a release without them, which an older export wrote, [] and a line that says so."""
    if (folder / SOURCES_FILE).is_file():
        return read_records(folder / SOURCES_FILE, Passage, REBUILD.capitalize())
    say(f"{folder} has no {SOURCES_FILE}, so answers come without sources; {REBUILD}")
    return []


class Sources:
    """Looks questions up in `passages`, by the embedder `embedder`, whose embeddings of them are kept in `store`.

    Making one takes seconds, and minutes for thousands of passages that are new to `store`. Its methods may be called in any thread; one
    question is embedded at a time, which takes some 10 ms of one core, so that a server calls them in a thread beside its event loop.
    """

    def __init__(self, passages: Sequence[Passage], embedder: str, store: Path, *, with_bars: bool = False) -> None:
        self._passages = by_id(sorted(passages, key=lambda passage: passage.id))
        if not passages:
            return
        self._embed = _embedding(embedder)

        def kept(what: str, texts: Sequence[str]) -> "np.ndarray":
            embed = functools.partial(self._embed, bar=f"sources: {what}" if with_bars else "")
            return kept_vectors(texts, embedder, embed, store)

        self._chunks = [_as_chunk(passage) for passage in self._passages.values()]
        self._trained = [(passage, pair) for passage in self._passages.values() for pair in passage.trained]
        self._chunk_vectors = kept("passages", [searched(chunk) for chunk in self._chunks])
        self._trained_vectors = kept("questions", [pair.question for _, pair in self._trained])
        parts = [_sentences(passage.text) for passage in self._passages.values()]
        self._sentences = [sentence for part in parts for sentence in part]
        self._firsts = [0, *itertools.accumulate(map(len, parts))]  # the place of each passage's first sentence, and the end
        self._sentence_vectors = kept("sentences", self._sentences)

    def find(self, question: str, min_similarity: float) -> Found:
        """The trained evidence and the passages nearest to `question`: at most four, no passage twice, and none where nothing is as near
        as `min_similarity`. Without passages, nothing is known of what the documentation covers, and any question counts as covered.
        """
        if not self._passages:
            return Found((), covered=True)
        asked = self._embed([question])
        # of one passage the nearest stays, and evidence where both are as near
        ordered = sorted([*self._retrieved(asked), *self._trained_near(asked)], key=lambda source: source.similarity)
        if ordered[-1].similarity < min_similarity:
            return Found((), covered=False)
        once = {source.passage_id: source for source in ordered}
        return Found(tuple(sorted(once.values(), key=lambda source: -source.similarity)), covered=True)

    def _trained_near(self, asked: "np.ndarray") -> Iterator[Source]:
        """The evidence of the trained questions nearest to the question with the embedding `asked` (1, d)."""
        for place, cosine in nearest_places(asked, self._trained_vectors, MOST_TRAINED)[0] if self._trained else ():
            passage, pair = self._trained[place]
            yield _source("trained", passage, pair.start, pair.end, pair.quote, cosine)

    def _retrieved(self, asked: "np.ndarray") -> Iterator[Source]:
        """The passages nearest to the question with the embedding `asked` (1, d), each with its nearest sentence.

        Near is the mean of the whole and of that sentence: the whole alone hides what a long passage says in passing, and a sentence
        alone is near to much that it has nothing to do with.
        """
        import numpy as np

        by_sentence = (asked @ self._sentence_vectors.T)[0]
        whole = (asked @ self._chunk_vectors.T)[0]
        near = ((whole + np.maximum.reduceat(by_sentence, self._firsts[:-1])) / 2).astype(np.float64).round(5)
        for place in np.argsort(-near, kind="stable")[:MOST_RETRIEVED]:
            first, end = self._firsts[place : place + 2]
            quote = self._sentences[first + int(by_sentence[first:end].argmax())]
            passage = self._passages[self._chunks[place].id]
            yield _source("retrieved", passage, *_place_of(quote, passage), quote, float(near[place]))

    def passage(self, id: str) -> Passage | None:
        """The passage with that id, or None."""
        return self._passages.get(id)

    def prompt(self, question: str, top_k: int, fits: Callable[[str], bool]) -> str:
        """`question` with the `top_k` passages nearest to it, as the system `tuned_rag` is asked; fewer of them where they do not fit."""
        if not self._passages:
            return question
        asked = self._embed([question])
        return with_passages(
            question, [self._chunks[place] for place, _ in nearest_places(asked, self._chunk_vectors, top_k)[0]], fits
        )[0]


@functools.cache  # the sources of the next version use it too, and memory does not grow with each
def _embedding(reference: str) -> Callable[..., Any]:
    """What embeds texts, in one thread at a time, since a tokenizer may not be used by two, and a few at a time, since others wait.

    It shows a progress bar of the name `bar`, where one is given.
    """
    import numpy as np
    import threadpoolctl
    import torch
    from transformers.utils.logging import disable_progress_bar

    from stages.models import load_embedder

    disable_progress_bar()  # type: ignore[no-untyped-call]  # it would run through what a person types in the chat
    model, embedding = load_embedder(reference), threading.Lock()
    # their threads spin while they wait, as llama.cpp's do: beside it, two of torch's took 20 times as long as one, two of numpy's 300
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1, user_api="blas")  # of the libraries that are loaded by now

    def embed(texts: Sequence[str], bar: str = "") -> Any:
        parts = []
        firsts = range(0, max(len(texts), 1), EMBEDDED_AT_ONCE)
        for first in progress(firsts, bar, unit="batch") if bar else firsts:
            with embedding:
                parts.append(model.encode(list(texts[first : first + EMBEDDED_AT_ONCE]), normalize_embeddings=True))
        return np.concatenate(parts)

    return embed


def _place_of(quote: str, passage: Passage) -> tuple[int, int]:
    """Where `quote`, of the passage's text, stands in the document; the whole passage where that cannot be said."""
    found = locate(quote, passage.text)
    if found is None or len(passage.text) != passage.end - passage.start:  # a mark in place of a secret moves what follows
        return passage.start, passage.end
    return passage.start + found[0], passage.start + found[1]


def _as_chunk(passage: Passage) -> Chunk:
    return Chunk(
        id=passage.id,
        document_id=passage.path,
        section_id=passage.path,
        path=passage.path,
        heading_path=passage.heading_path,
        start=passage.start,
        end=passage.end,
        text=passage.text,
    )


def _sentences(text: str) -> list[str]:
    """The sentences of `text`, or its lines where it has none, as a table; never none."""
    return sentences_of(text) or [line for line in text.splitlines() if line.strip()] or [text]


def _source(kind: Literal["trained", "retrieved"], passage: Passage, start: int, end: int, quote: str, cosine: float) -> Source:
    return Source(kind, passage.id, passage.path, passage.heading_path, start, end, quote, cosine)
