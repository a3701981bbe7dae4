"""exam: each set of questions is complete and its own, gold is located or counted, and what the documents cover is not out of scope."""

import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from conftest import MODELS

from stages.exam import OUT_OF_SCOPE, Params, general_questions, gold_questions, main, read_gold, read_out_of_scope
from stages.executor import LOCAL
from stages.general import read_general
from stages.likeness import near_duplicates
from stages.program import BadRecord
from stages.records import Chunk, Gold, Question, SetName, content_id, read_records, write_records

EXAM = Params(gold="gold.jsonl", max_general=4, max_out_of_scope=5, max_similarity=0.6)
CHANGES: dict[str, Any] = {"gold": "other.jsonl", "max_general": 2, "max_out_of_scope": 3, "max_similarity": 0.0}
QUOTE = "To dim the lamp,\nhold the sensor."


def chunk(id: str, text: str, path: str = "lamp.md") -> Chunk:
    return Chunk(
        id=id, document_id="d", section_id=f"s-{id}", path=path, heading_path=("Lamp",), start=0, end=len(text), text=text
    )


def gold(id: str, quote: str = QUOTE, path: str = "lamp.md", kind: str = "procedural") -> Gold:
    return Gold(id=id, question=f"Question {id}?", answer="Hold it.", quote=quote, path=path, kind=kind, key_facts=("sensor",))


CHUNKS = [
    chunk("c1", "The lamp is bright."),
    chunk("c2", "It is dark. To dim the\nlamp, hold  the sensor. Then let go."),
    chunk("c3", "How do I tune a guitar by ear? Play the lowest string of the guitar and tune the others to it.", "guitar.md"),
]
SPLIT = Question(
    id="q1",
    set="recall",
    section_id="s-c1",
    type="factual",
    question="Is it bright?",
    reference="Yes.",
    pair_id="p1",
    chunk_id="c1",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with chunks, split's questions and two files of gold questions."""
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "questions.jsonl", [SPLIT])
    write_records(tmp_path / "chunks.jsonl", CHUNKS)
    lost = gold("g2", "Nobody wrote this.", "other.md", "factual")
    write_records(tmp_path / "gold.jsonl", [gold("g1"), lost, gold("g3", "", "", "out_of_scope")])
    write_records(tmp_path / "other.jsonl", [])
    return tmp_path


def asked(folder: Path, exam: Params = EXAM) -> tuple[dict[str, list[Question]], dict[str, Any]]:
    """The questions by set, and the metrics."""
    names = ("questions.jsonl", "chunks.jsonl", "store", "exam.jsonl", "exam.json")
    main(*(folder / name for name in names), exam=exam, models=MODELS, executor=LOCAL)
    every = read_records(folder / "exam.jsonl", Question)
    return {name: [one for one in every if one.set == name] for name in get_args(SetName)}, json.loads(
        (folder / "exam.json").read_bytes()
    )


def test_every_set_is_there_in_its_own_size_and_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets, metrics = asked(folder)
    assert sets["recall"] == [SPLIT]
    assert metrics["sets"] == {name: len(found) for name, found in sets.items()}
    assert metrics["sets"] == {"recall": 1, "held_out": 0, "gold": 2, "out_of_scope": 6, "general": 4}
    assert (metrics["questions"], metrics["with_evidence"], metrics["with_key_facts"]) == (13, 2, 2)
    assert (metrics["gold_quotes_not_found"], metrics["out_of_scope_covered"]) == (1, 1)
    assert capsys.readouterr().out == (
        "exam: 13 questions = 1 recall + 2 gold + 6 out of scope + 4 general; 1 out of scope left out, as the documents may cover"
        " them; no chunk holds the quotes of 1 gold questions: g2\n"
    )


@pytest.mark.parametrize(("name", "value"), CHANGES.items())
def test_each_setting_changes_the_exam(name: str, value: Any, folder: Path) -> None:
    assert asked(folder, msgspec.structs.replace(EXAM, **{name: value}))[0] != asked(folder)[0]
    assert set(CHANGES) == set(Params.__struct_fields__)


def test_two_runs_give_the_same_bytes(folder: Path) -> None:
    asked(folder)
    first = [(folder / name).read_bytes() for name in ("exam.jsonl", "exam.json")]
    asked(folder)
    assert [(folder / name).read_bytes() for name in ("exam.jsonl", "exam.json")] == first


# gold


def test_a_gold_quote_is_found_in_its_chunk_with_white_space_folded() -> None:
    (question,), lost = gold_questions([gold("g1")], CHUNKS)
    assert lost == []
    assert question == Question(
        id=content_id("gold", "g1", "Question g1?"),
        set="gold",
        section_id="s-c2",
        type="procedural",
        question="Question g1?",
        reference="Hold it.",
        key_facts=("sensor",),
        quote=QUOTE,
        chunk_id="c2",
    )


def test_of_several_chunks_with_the_quote_the_one_of_the_same_page_is_taken_and_else_the_first_by_id() -> None:
    copies = [chunk(id, QUOTE, path) for id, path in (("c9", "other.md"), ("c8", "lamp.md"), ("c7", "other.md"))]
    assert [gold_questions([gold("g", path=path)], copies)[0][0].chunk_id for path in ("lamp.md", "none.md")] == ["c8", "c7"]


def test_a_quote_that_no_chunk_holds_is_asked_without_evidence_in_its_pages_section() -> None:
    questions, lost = gold_questions([gold("g1", "Nobody wrote this."), gold("g2", "Nor this."), gold("g3", "", "")], CHUNKS)
    assert lost == ["g1", "g2", "g3"] and {one.chunk_id for one in questions} == {""}
    assert [one.section_id for one in questions] == [content_id("lamp.md")] * 2 + [questions[2].id]


def test_a_gold_question_that_is_out_of_scope_is_of_that_set_and_has_no_reference() -> None:
    (question,), lost = gold_questions([gold("g1", "", "", "out_of_scope")], CHUNKS)
    assert (question.set, question.type, question.reference, question.section_id) == ("out_of_scope", "gold", "", question.id)
    assert (lost, question.key_facts) == ([], ())


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"id": "g2", "question": "Which?"}', "not a Gold: Object missing required field `answer`"),
        ("", "not a Gold: "),
        ("nonsense", "not a Gold: JSON is malformed"),
        ('{"id":"g2","question":"","answer":"a","quote":"","path":"","kind":"k"}', r"length >= 1 - at `\$.question`"),
        ('{"id":"g2","question":"q","answer":"a","quote":"","path":"","kind":"k","key_fact":[]}', "unknown field `key_fact`"),
        (
            '{"id":"g1","question":"q","answer":"a","quote":"","path":"","kind":"k"}',
            "the id g1 is that of line 1; ids must differ",
        ),
    ],
)
def test_a_bad_line_is_one_error_with_file_and_line(line: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "gold.jsonl"
    path.write_bytes(msgspec.json.encode(gold("g1")) + b"\n" + line.encode() + b"\n")
    with pytest.raises(BadRecord, match=rf"gold\.jsonl:2: .*{fault}.* mend that line") as raised:
        read_gold(path)
    assert "\n" not in str(raised.value)


def test_the_gold_file_of_the_repository_is_empty_and_a_line_needs_no_key_facts(tmp_path: Path) -> None:
    assert read_gold(Path(__file__).parents[1] / "data/gold.jsonl") == []
    path = tmp_path / "gold.jsonl"
    path.write_text('{"id":"g","question":"q","answer":"a","quote":"","path":"","kind":"k"}\n')
    assert [one.key_facts for one in read_gold(path)] == [()]


# general and out of scope


def test_general_questions_are_of_the_set_test_and_each_stands_alone() -> None:
    every = general_questions(100)
    assert {(one.question, one.reference) for one in every} == {
        (one.question, one.answer) for one in read_general() if one.set == "test"
    }
    assert len(every) == 40 == len({one.section_id for one in every}) and all(one.section_id == one.id for one in every)
    assert general_questions(5) == every[:5] and general_questions(0) == []


def test_out_of_scope_questions_are_many_and_no_two_are_alike() -> None:
    every = read_out_of_scope()
    assert len(every) == 60 and {one.type for one in every} == {"software", "everyday"}
    assert near_duplicates([one.question for one in every], 0.4) == list(range(60))
    assert all(one.question.endswith("?") and one.question == one.question.strip() and not one.reference for one in every)
    assert OUT_OF_SCOPE.read_text(encoding="utf-8").startswith("# Questions that")


def test_a_question_that_the_documents_may_cover_is_not_asked_and_more_are_left_out_at_a_lower_limit(folder: Path) -> None:
    open_to_all = msgspec.structs.replace(EXAM, max_out_of_scope=100, gold="other.jsonl")
    sets, metrics = asked(folder, open_to_all)
    questions = {one.question for one in sets["out_of_scope"]}
    assert metrics["out_of_scope_covered"] == 1 and len(questions) == 59
    assert "How do I tune a guitar by ear?" not in questions and "How do I fold a paper crane?" in questions
    fewer, counted = asked(folder, msgspec.structs.replace(open_to_all, max_similarity=0.1))
    assert {one.question for one in fewer["out_of_scope"]} < questions
    assert counted["out_of_scope_covered"] == 60 - len(fewer["out_of_scope"]) > 1
