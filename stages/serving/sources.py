"""The sections of the documentation behind an answer."""

from typing import Literal

import msgspec


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
