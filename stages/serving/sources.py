"""The sections of the documentation behind an answer."""

import functools
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from stages.evidence import locate, sentences_of, words
from stages.program import say
from stages.records import Chunk, Passage, by_id, read_records
from stages.release import REBUILD, SOURCES_FILE
from stages.retrieval import kept_vectors, nearest_places, searched, with_passages

# Of questions whose evidence is known, these four have it as often as three of either kind, which are six: trained evidence is seldom
# right but at the first place, and is never right for a question of which nothing was trained.
MOST_TRAINED, MOST_RETRIEVED = 1, 3


class Source(msgspec.Struct, frozen=True):
    """A place in the documentation, and how near it is to the question: similarity, which is no proof of where an answer comes from."""

    kind: Literal["trained", "retrieved"]  # the evidence of a pair that was trained, or a chunk
    passage_id: str  # of the passage that GET /passages/<id> shows
    path: str
    heading_path: tuple[str, ...]
    start: int  # characters into the document
    end: int
    quote: str
    similarity: float  # cosine of the embeddings of the question and of the pair's question, or of the chunk


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
    search runs at a time and takes some 10 ms of one core, so that a server calls them in a thread beside its event loop.
    """

    def __init__(self, passages: Sequence[Passage], embedder: str, store: Path) -> None:
        self._passages = by_id(sorted(passages, key=lambda passage: passage.id))
        if not passages:
            return
        import torch
        from transformers.utils.logging import disable_progress_bar

        from stages.models import load_embedder

        # torch's threads spin while they wait, as llama.cpp's do: beside it, a search with two of them took 20 times as long
        torch.set_num_threads(1)
        disable_progress_bar()  # it would run through what a person types in the chat
        model = load_embedder(embedder)
        self._embed: Callable[[Sequence[str]], Any] = lambda texts: model.encode(list(texts), normalize_embeddings=True)
        self._searching = threading.Lock()  # a tokenizer may be used by one thread at a time
        self._chunks = [_as_chunk(passage) for passage in self._passages.values()]
        self._trained = [(passage, pair) for passage in self._passages.values() for pair in passage.trained]
        self._chunk_vectors = kept_vectors([searched(chunk) for chunk in self._chunks], embedder, self._embed, store)
        self._trained_vectors = kept_vectors([pair.question for _, pair in self._trained], embedder, self._embed, store)
        holders = Counter(word for chunk in self._chunks for word in set(words(chunk.text).split()))
        self._weight = {word: math.log(1 + len(self._chunks) / count) for word, count in holders.items()}

    def find(self, question: str, min_similarity: float) -> Found:
        """The trained evidence and the passages nearest to `question`: at most four, no passage twice, and none where nothing is as near
        as `min_similarity`. Without passages, nothing is known of what the documentation covers, and any question counts as covered.
        """
        if not self._passages:
            return Found((), covered=True)
        with self._searching:
            asked = self._embed([question])
        found = []
        if self._trained:
            for place, cosine in nearest_places(asked, self._trained_vectors, MOST_TRAINED)[0]:
                passage, pair = self._trained[place]
                found.append(_source("trained", passage, pair.start, pair.end, pair.quote, cosine))
        for place, cosine in nearest_places(asked, self._chunk_vectors, MOST_RETRIEVED)[0]:
            passage = self._passages[self._chunks[place].id]
            if all(one.passage_id != passage.id for one in found):
                found.append(_source("retrieved", passage, *self._best_quote(question, passage), cosine))
        found.sort(key=lambda source: -source.similarity)
        covered = found[0].similarity >= min_similarity
        return Found(tuple(found) if covered else (), covered)

    def passage(self, id: str) -> Passage | None:
        """The passage with that id, or None."""
        return self._passages.get(id)

    def prompt(self, question: str, top_k: int, fits: Callable[[str], bool]) -> str:
        """`question` with the `top_k` passages nearest to it, as the system `tuned_rag` is asked; fewer of them where they do not fit."""
        if not self._passages:
            return question
        with self._searching:
            asked = self._embed([question])
        return with_passages(
            question, [self._chunks[place] for place, _ in nearest_places(asked, self._chunk_vectors, top_k)[0]], fits
        )[0]

    def _best_quote(self, question: str, passage: Passage) -> tuple[int, int, str]:
        """The sentence of `passage` that shares most words with `question`, rare words counting more: its start, end and text.

        Embeddings choose hardly better, and take as long as the rest of the search for each sentence.
        """
        asked = set(words(question).split())

        def shared(sentence: str) -> float:
            return sum(self._weight.get(word, 0.0) for word in asked & set(words(sentence).split()))

        quote = max(_sentences(passage.text), key=shared)
        place = locate(quote, passage.text)
        if place is None or len(passage.text) != passage.end - passage.start:  # a mark in place of a secret moves what follows
            return passage.start, passage.end, quote
        return passage.start + place[0], passage.start + place[1], quote


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


@functools.lru_cache(1024)
def _sentences(text: str) -> list[str]:
    """The sentences of `text`, or its lines where it has none, as a table; never none."""
    return sentences_of(text) or [line for line in text.splitlines() if line.strip()] or [text]


def _source(kind: Literal["trained", "retrieved"], passage: Passage, start: int, end: int, quote: str, cosine: float) -> Source:
    return Source(kind, passage.id, passage.path, passage.heading_path, start, end, quote, cosine)
