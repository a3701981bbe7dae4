"""stages.serving.sources: the nearest evidence and passages come with their places in the document, and a strange question with none."""

import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import MODELS

from stages.program import BadRecord
from stages.records import Chunk, Passage, Trained, write_records
from stages.release import SOURCES_FILE
from stages.retrieval import searcher, with_passages
from stages.serving.sources import Found, Sources, read_passages

DOCUMENT = """# Lamp

The lamp stands on three feet. To dim the lamp, hold the touch sensor for
two seconds. A red light shows that the battery is empty.

# Radio

The alarm starts quietly and grows louder for one minute. The radio keeps ten stations in its memory.

# Kettle

Descaling removes the lime that hard water leaves behind. Fill the kettle with vinegar and wait an hour.

# Cells

| model | battery |
|---|---|
| lamp | three AA cells |
| radio | one nine volt block |
"""


def passage(heading: str, *trained: tuple[str, str]) -> Passage:
    start = DOCUMENT.index(f"# {heading}")
    end = DOCUMENT.find("\n# ", start)
    end = end + 1 if end >= 0 else len(DOCUMENT)
    pairs = []
    for question, quote in trained:
        at = DOCUMENT.index(quote)
        pairs.append(Trained(question=question, quote=quote, start=at, end=at + len(quote)))
    return Passage(
        id=heading.lower(),
        path="manual.md",
        heading_path=(heading,),
        start=start,
        end=end,
        text=DOCUMENT[start:end],
        trained=tuple(pairs),
    )


PASSAGES = [
    passage("Radio", ("How does the alarm of the radio sound?", "The alarm starts quietly and grows louder for one minute.")),
    passage(
        "Kettle",
        ("What does descaling do?", "Descaling removes the lime that hard water leaves behind."),
        ("How do I descale the kettle?", "Fill the kettle with vinegar and wait an hour."),
    ),
    passage("Lamp"),
    passage("Cells"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def sources(store: Path) -> Sources:
    return Sources(PASSAGES, MODELS.embedder, store)


def test_the_sources_of_the_next_version_use_the_embedder_that_is_loaded(tmp_path: Path) -> None:
    first, second = (Sources([passage(heading)], MODELS.embedder, tmp_path) for heading in ("Lamp", "Radio"))
    assert first._embed is second._embed
    texts = [f"{number} lamps" for number in range(33)]  # more than it embeds at once
    assert np.allclose(first._embed(texts)[32], first._embed(texts[32:])[0], atol=1e-5) and len(first._embed(texts)) == 33


def test_who_waits_for_embeddings_sees_a_bar_of_each_kind_and_the_vectors_are_the_same(
    sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Sources(PASSAGES, MODELS.embedder, tmp_path, with_bars=True)
    bars = capsys.readouterr().err
    assert all(f"sources: {what}: 100%" in bars for what in ("passages", "questions", "sentences"))
    assert (shown._sentence_vectors == sources._sentence_vectors).all()
    Sources(PASSAGES, MODELS.embedder, tmp_path, with_bars=True)
    assert capsys.readouterr().err == "", "kept ones need no bar"


def test_the_evidence_of_the_nearest_trained_question_comes_before_passages_and_each_passage_once(sources: Sources) -> None:
    found = sources.find("How can I descale my kettle?", 0.45)
    first, *others = found.sources
    assert found.covered
    assert (first.kind, first.passage_id, first.quote) == ("trained", "kettle", "Fill the kettle with vinegar and wait an hour.")
    assert 0.8 < first.similarity < 1
    assert {source.kind for source in others} == {"retrieved"} and "kettle" not in {source.passage_id for source in others}
    similarities = [source.similarity for source in found.sources]
    assert similarities == sorted(similarities, reverse=True)
    assert len({source.passage_id for source in found.sources}) == len(found.sources) <= 4


def test_a_question_of_which_nothing_was_trained_finds_the_passage_and_the_sentence_that_answers_it(sources: Sources) -> None:
    first = sources.find("How do I dim the lamp?", 0.45).sources[0]
    assert (first.kind, first.passage_id, first.path, first.heading_path) == ("retrieved", "lamp", "manual.md", ("Lamp",))
    assert first.quote == "To dim the lamp, hold the touch sensor for two seconds."
    assert sources.find("How do I see that the battery of the lamp is empty?", 0.3).sources[0].quote.startswith("A red light")


def test_the_offsets_of_a_source_lead_to_its_quote_in_the_document(sources: Sources) -> None:
    for question in ("How do I dim the lamp?", "How do I descale the kettle?", "How many stations does the radio keep?"):
        found = sources.find(question, 0.1)
        assert len(found.sources) >= 3
        for source in found.sources:
            assert " ".join(DOCUMENT[source.start : source.end].split()) == source.quote


def test_a_passage_without_a_sentence_is_quoted_by_its_nearest_line(sources: Sources) -> None:
    found = {source.passage_id: source for source in sources.find("Which battery has the radio, a nine volt block?", 0.1).sources}
    assert found["cells"].quote == "| radio | one nine volt block |"
    assert DOCUMENT[found["cells"].start : found["cells"].end] == "| radio | one nine volt block |"


def test_a_quote_behind_a_removed_secret_leads_to_the_whole_passage(tmp_path: Path) -> None:
    text = "The key is [password removed] by default. The lamp dims when you hold its sensor."
    one = Passage(id="a", path="a.md", heading_path=("Lamp",), start=100, end=174, text=text, trained=())
    (source,) = Sources([one], MODELS.embedder, tmp_path).find("How does the lamp dim?", 0.3).sources
    assert source.quote == "The lamp dims when you hold its sensor."
    assert (source.start, source.end) == (100, 174)


def test_a_long_passage_is_found_by_what_it_says_in_passing(tmp_path: Path) -> None:
    parts = ["The radio keeps ten stations.", "The alarm is loud.", "The display is green.", "The antenna turns."] * 2
    long = " ".join([*parts, "Vinegar removes lime from the kettle.", *parts])
    texts = {"long": long, "other": "Lime settles in pipes. Old pipes of steel rust."}
    passages = [
        Passage(id=id, path="a.md", heading_path=(), start=0, end=len(text), text=text, trained=()) for id, text in texts.items()
    ]
    first = Sources(passages, MODELS.embedder, tmp_path).find("What removes lime from the kettle?", 0.3).sources[0]
    assert (first.passage_id, first.quote) == ("long", "Vinegar removes lime from the kettle.")
    chunks = [
        Chunk(id=one.id, document_id="d", section_id="s", path="a.md", heading_path=(), start=0, end=1, text=one.text)
        for one in passages
    ]
    hits = searcher(chunks, MODELS.embedder, tmp_path)(["What removes lime from the kettle?"], 2)[0]
    assert [hit.chunk_id for hit in hits] == ["other", "long"]  # by the whole text alone


def test_what_no_passage_is_near_is_not_covered_and_has_no_sources(sources: Sources) -> None:
    assert sources.find("Which vaccinations do I need for a trip to Kenya?", 0.45) == Found((), covered=False)
    near = sources.find("How do I descale the kettle?", 0.45).sources[0].similarity
    assert near > 0.99
    assert sources.find("How can I descale my kettle?", 1.0).covered is False


def test_without_passages_nothing_is_found_and_nothing_is_said_to_be_missing(tmp_path: Path) -> None:
    none = Sources([], "no/such/embedder", tmp_path)
    assert none.find("How do I dim the lamp?", 0.45) == Found((), covered=True)
    assert none.passage("lamp") is None
    assert none.prompt("How do I dim the lamp?", 2, lambda text: True) == "How do I dim the lamp?"


def test_passages_without_a_trained_pair_are_found_all_the_same(tmp_path: Path) -> None:
    found = Sources([passage("Lamp"), passage("Radio")], MODELS.embedder, tmp_path).find("How do I dim the lamp?", 0.45)
    assert [(source.kind, source.passage_id) for source in found.sources] == [("retrieved", "lamp"), ("retrieved", "radio")]


def test_a_passage_is_had_by_its_id(sources: Sources) -> None:
    assert sources.passage("lamp") == PASSAGES[2]
    assert sources.passage("../lamp") is None


def test_the_prompt_is_the_one_that_the_evaluation_asks_with(sources: Sources, tmp_path: Path) -> None:
    chunks = [
        Chunk(
            id=one.id,
            document_id="d",
            section_id="s",
            path=one.path,
            heading_path=one.heading_path,
            start=0,
            end=1,
            text=one.text,
        )
        for one in PASSAGES
    ]
    known = {chunk.id: chunk for chunk in chunks}
    question = "How do I dim the lamp?"
    hits = searcher(chunks, MODELS.embedder, tmp_path)([question], 2)[0]
    scored, shown = with_passages(question, [known[hit.chunk_id] for hit in hits], lambda text: True)
    assert shown == 2
    assert sources.prompt(question, 2, lambda text: True) == scored
    assert sources.prompt(question, 2, lambda text: False) == question
    assert sources.prompt(question, 1, lambda text: True).count("[") == 1


def test_embeddings_are_computed_once_and_those_of_the_chunks_are_shared_with_the_stages(sources: Sources, store: Path) -> None:
    kept = sorted(np.load(path, allow_pickle=False).shape for path in store.glob("*.npy"))
    assert kept == [(3, 384), (4, 384), (12, 384)]  # trained questions, chunks, and their sentences and lines
    before = {path: path.stat().st_mtime_ns for path in store.glob("*.npy")}
    again = Sources(PASSAGES[::-1], MODELS.embedder, store)
    assert again.find("How do I dim the lamp?", 0.45) == sources.find("How do I dim the lamp?", 0.45)
    assert {path: path.stat().st_mtime_ns for path in store.glob("*.npy")} == before


def test_searches_from_many_threads_agree_and_take_one_core(sources: Sources) -> None:
    import threadpoolctl
    import torch

    threads, found = [], []

    def search() -> None:
        found.append(sources.find("How do I descale the kettle?", 0.45))
        threads.append(torch.get_num_threads())

    started = [threading.Thread(target=search) for _ in range(8)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert found == [sources.find("How do I descale the kettle?", 0.45)] * 8
    assert threads == [1] * 8
    blas = [library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
    assert blas and set(blas) == {1}


def test_a_release_without_passages_is_said_and_has_none_and_a_damaged_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_passages(tmp_path) == []
    assert capsys.readouterr().out == (
        f"{tmp_path} has no sources.jsonl, so answers come without sources; rebuild it with: dvc repro --force export\n"
    )
    write_records(tmp_path / SOURCES_FILE, PASSAGES)
    assert read_passages(tmp_path) == sorted(PASSAGES, key=lambda one: one.id)
    assert capsys.readouterr().out == ""
    with open(tmp_path / SOURCES_FILE, "a", encoding="utf-8") as lines:
        lines.write('{"id": "x"}\n')
    with pytest.raises(BadRecord, match=r"sources.jsonl:5: not a Passage: .* Rebuild it with: dvc repro --force export"):
        read_passages(tmp_path)
