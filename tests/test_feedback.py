"""feedback: ratings become items for review and candidates for gold, by the documentation that is nearest to them."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import MODELS

from stages.exam import read_gold
from stages.feedback import complaint_of, gold_of, main
from stages.program import BadRecord
from stages.records import Complaint, Gold, Passage, Trained, read_records, write_records
from stages.serving.feedback import Feedback, Rated
from stages.serving.settings import Serve
from stages.serving.sources import Found, Source

PORT, CHUNK = "The server listens on port 5000.", "A chunk is a piece of a document."
SERVE = Serve(
    model="models/gguf",
    host="127.0.0.1",
    port=0,
    engine="llama.cpp",
    parallel=1,
    max_waiting=1,
    requests_per_minute=1,
    passages=0,
    min_similarity=0.4,
)


def passage(id: str, path: str, text: str, question: str) -> Passage:
    return Passage(
        id=id,
        path=path,
        heading_path=("Guide",),
        start=0,
        end=len(text),
        text=text,
        trained=(Trained(question=question, quote=text, start=0, end=len(text)),),
    )


PASSAGES = [
    passage("c1", "serving.md", PORT, "Which port does the server use?"),
    passage("c2", "chunks.md", CHUNK, "What is a chunk?"),
]


def rated(rating: Any = "down", comment: str = "", question: str | None = None, answer: str | None = None) -> Rated:
    return Rated("a1", "docsmith/3", rating, comment, question, answer, "2026-11-23T10:00:00Z")


def found(covered: bool = True) -> Found:
    source = Source("trained", "c1", "serving.md", ("Guide",), 0, 5, PORT, 0.8)
    return Found((source,), covered)


# ---- one rating


def test_an_answer_rated_down_becomes_an_item_with_the_place_nearest_to_its_question() -> None:
    asked: list[str] = []

    def find(text: str) -> Found:
        asked.append(text)
        return found()

    expected = Complaint(
        id="a1",
        said_at="2026-11-23T10:00:00Z",
        model="docsmith/3",
        comment="no",
        question="Which port?",
        answer="Port 1.",
        chunk_id="c1",
        quote=PORT,
        similarity=0.8,
        covered=True,
    )
    assert complaint_of(rated("down", "no", "Which port?", "Port 1."), find) == expected
    assert complaint_of(rated("down", "no"), find) == msgspec.structs.replace(expected, question="", answer="")
    assert asked == ["Which port?", "no"]


def test_a_thumb_alone_tells_nothing_to_look_at() -> None:
    assert complaint_of(rated("down", " "), lambda text: found()) is None


def test_an_answer_rated_up_becomes_a_gold_question_with_its_evidence_and_key_facts() -> None:
    gold = gold_of(rated("up", "", "Which port?", "It is port 5000."), lambda text: found())
    assert gold is not None
    assert (gold.question, gold.answer, gold.quote, gold.path) == ("Which port?", "It is port 5000.", PORT, "serving.md")
    assert (gold.kind, gold.key_facts) == ("asked", ("5000",))


def test_what_the_documentation_does_not_cover_is_a_candidate_out_of_scope_without_evidence() -> None:
    gold = gold_of(rated("up", "", "Will it rain?", "That is not documented."), lambda text: found(covered=False))
    assert gold is not None
    assert (gold.kind, gold.quote, gold.path, gold.key_facts) == ("out_of_scope", "", "", ())


@pytest.mark.parametrize(("question", "answer"), [(None, None), ("Which port?", None), ("Which port?", "")])
def test_without_consent_there_is_no_gold_candidate(question: str | None, answer: str | None) -> None:
    assert gold_of(rated("up", "great", question, answer), lambda text: found()) is None


# ---- the command


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_records(Path("models/gguf/sources.jsonl"), PASSAGES)
    store = Feedback(Path("data/feedback.sqlite"))
    store.add("a1", "docsmith/3", "down", "It is 5000.", "Which port does the server listen on?", "Port 1.")
    store.add("a2", "docsmith/3", "down", "what it says of chunks is wrong")
    store.add("a7", "docsmith/3", "down", "", "Who won the chess match of 1972?", "Nobody.")
    store.add("a3", "docsmith/4", "down", "")
    store.add("a4", "docsmith/4", "up", "", "What is a chunk?", CHUNK)
    store.add("a5", "docsmith/4", "up", "thanks")
    store.add("a6", "docsmith/4", "up", "", "What is a chunk?", CHUNK)
    return tmp_path


def test_ratings_become_items_and_candidates_and_the_same_ones_give_the_same_files(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(MODELS, SERVE)
    assert capsys.readouterr().out == (
        "feedback: docsmith/3 has 0 up and 3 down, docsmith/4 has 3 up and 1 down -> 3 in data/feedback.jsonl for make review "
        "(1 more without a word), 1 in data/gold_candidates.jsonl to be read and moved to data/gold.jsonl\n"
    )
    items = read_records(Path("data/feedback.jsonl"), Complaint)
    assert [(one.id, one.chunk_id, one.quote, one.covered) for one in items[:2]] == [
        ("a1", "c1", PORT, True),
        ("a2", "c2", CHUNK, True),
    ]
    assert (items[2].id, items[2].covered, items[2].chunk_id != "") == ("a7", False, True)  # a gap in the documentation
    (candidate,) = read_gold(Path("data/gold_candidates.jsonl"))
    assert (candidate.question, candidate.answer, candidate.quote, candidate.path) == (
        "What is a chunk?",
        CHUNK,
        CHUNK,
        "chunks.md",
    )
    files = [Path("data/feedback.jsonl"), Path("data/gold_candidates.jsonl")]
    before = [file.read_bytes() for file in files]
    main(MODELS, SERVE)
    assert [file.read_bytes() for file in files] == before
    assert not Path("data/gold.jsonl").exists()  # a person moves them


def test_a_candidate_that_a_person_moved_to_gold_is_not_offered_again(project: Path) -> None:
    moved = Gold(id="g1", question="what is a chunk", answer=CHUNK, quote=CHUNK, path="chunks.md", kind="conceptual")
    write_records(Path("data/gold.jsonl"), [moved])
    main(MODELS, SERVE)
    assert read_gold(Path("data/gold_candidates.jsonl")) == []
    assert read_gold(Path("data/gold.jsonl")) == [moved]


def test_a_rating_taken_back_takes_its_item_away(project: Path) -> None:
    main(MODELS, SERVE)
    Feedback(Path("data/feedback.sqlite")).add("a1", "docsmith/3", "up", "")
    main(MODELS, SERVE)
    assert [one.id for one in read_records(Path("data/feedback.jsonl"), Complaint)] == ["a2", "a7"]


def test_without_ratings_the_command_says_so_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(MODELS, SERVE)
    assert capsys.readouterr().out == "feedback: data/feedback.sqlite is not there, so no answer has been rated yet\n"
    assert list(tmp_path.iterdir()) == []


def test_damaged_sources_are_one_line_and_older_items_stay(project: Path) -> None:
    main(MODELS, SERVE)
    before = Path("data/feedback.jsonl").read_bytes()
    Path("models/gguf/sources.jsonl").write_text('{"id": 1}\n', encoding="utf-8")
    with pytest.raises(BadRecord, match=r"sources.jsonl:1: not a Passage: .* Rebuild it with: dvc repro .*export"):
        main(MODELS, SERVE)
    assert Path("data/feedback.jsonl").read_bytes() == before
