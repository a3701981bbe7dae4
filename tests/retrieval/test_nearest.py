"""stages.retrieval.nearest: the nearest chunks come first, always in the same order, from embeddings that are computed once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODELS

import stages.retrieval.nearest
from stages.executor import Executor
from stages.records import Chunk
from stages.retrieval import Hit, searcher
from stages.retrieval.nearest import searched

TEXTS = {
    "b": ("Kettle", "Descaling removes the lime that hard water leaves behind."),
    "a": ("Lamp", "To dim the lamp, hold the touch sensor for two seconds."),
    "d": ("Radio", "The alarm starts quietly and grows louder for one minute."),
}


def chunk(id: str, heading: str, text: str) -> Chunk:
    return Chunk(id=id, document_id="d", section_id="s", path="p.md", heading_path=(heading,), start=0, end=len(text), text=text)


CHUNKS = [chunk(id, *content) for id, content in TEXTS.items()]


def ids(hits: list[Hit]) -> list[str]:
    return [hit.chunk_id for hit in hits]


def test_the_nearest_chunks_come_best_first_and_no_more_than_asked_for(tmp_path: Path) -> None:
    search = searcher(CHUNKS, MODELS.embedder, tmp_path)
    lamp, radio = search(["How do I make the lamp less bright?", "How loud is the alarm of the radio?"], 2)
    assert (ids(lamp)[0], ids(radio)[0]) == ("a", "d") and len(lamp) == len(radio) == 2
    assert 1 >= lamp[0].cosine > lamp[1].cosine > -1
    assert len(search(["lamp"], 1)[0]) == 1 and sorted(ids(search(["lamp"], 9)[0])) == ["a", "b", "d"]
    assert search([], 2) == []


def test_the_headings_of_a_chunk_are_searched_with_its_text(tmp_path: Path) -> None:
    other = chunk("c", "Toaster", TEXTS["b"][1])
    search = searcher([*CHUNKS, other], MODELS.embedder, tmp_path)
    assert ids(search(["How do I descale the toaster?", "How do I descale the kettle?"], 1)[0]) == ["c"]
    assert ids(search(["How do I descale the kettle?"], 1)[0]) == ["b"]


def test_equally_near_chunks_come_by_id_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    twins = [chunk(id, *TEXTS["a"]) for id in ("z", "c", "m")]
    for given in (twins, twins[::-1], [*CHUNKS, *twins]):
        found = ids(searcher(given, MODELS.embedder, tmp_path)(["How do I dim the lamp?"], 3)[0])
        assert found == sorted({*found}) and set(found) < {"a", "c", "m", "z"}


def test_no_chunk_gives_no_hit(tmp_path: Path) -> None:
    assert searcher([], MODELS.embedder, tmp_path)(["lamp", "radio"], 3) == [[], []]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each call embeds from now on."""
    calls: list[int] = []
    real = stages.retrieval.nearest.embedding

    def embedding(reference: str, executor: Executor) -> Any:
        embed = real(reference)

        def counting(texts: Any) -> Any:
            calls.append(len(texts))
            return embed(texts)

        return counting

    monkeypatch.setattr("stages.retrieval.nearest.embedding", embedding)
    return calls


def test_embeddings_of_the_same_chunks_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    first = searcher(CHUNKS, MODELS.embedder, tmp_path)(["lamp"], 3)
    assert searcher(CHUNKS[::-1], MODELS.embedder, tmp_path)(["lamp"], 3) == first
    assert calls == [3, 1, 1]  # the chunks once, and each time the question
    searcher([*CHUNKS, chunk("e", "Fan", "The fan has three speeds.")], MODELS.embedder, tmp_path)
    assert calls[3:] == [4]
    (old, new) = sorted(tmp_path.glob("*.npy"), key=lambda path: path.stat().st_size)
    assert np.load(old, allow_pickle=False).shape == (3, 384) and np.load(new, allow_pickle=False).shape == (4, 384)


@pytest.mark.parametrize("keep", [0, 40, 200, -8])
def test_a_kept_file_that_was_cut_short_is_computed_anew(keep: int, tmp_path: Path) -> None:
    first = searcher(CHUNKS, MODELS.embedder, tmp_path)(["lamp"], 3)
    (path,) = tmp_path.glob("*.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert searcher(CHUNKS, MODELS.embedder, tmp_path)(["lamp"], 3) == first
    assert path.read_bytes() == whole


def test_what_is_searched_is_headings_and_text() -> None:
    assert searched(CHUNKS[1]) == "Lamp\n\nTo dim the lamp, hold the touch sensor for two seconds."
