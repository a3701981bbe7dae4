"""records: strict, sorted, and with ids that every machine computes alike."""

import hashlib
from pathlib import Path

import msgspec
import pytest

from stages.program import BadRecord
from stages.records import Answer, Example, Message, Question, by_id, content_id, evolve, read_records, write_records


def answer(id: str, text: str = "On port 5000.") -> Answer:
    return Answer(id=id, question_id="q1", system="base", text=text)


def test_records_come_back_as_they_were_sorted_by_id(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    assert write_records(path, [answer("c"), answer("a", "Zeile 1\nZeile 2 \u2028 é"), answer("b", "")]) == 3
    assert read_records(path, Answer) == [answer("a", "Zeile 1\nZeile 2 \u2028 é"), answer("b", ""), answer("c")]
    lines = path.read_bytes().split(b"\n")
    assert lines[1:] == [
        b'{"question_id":"q1","system":"base","text":"","chunk_ids":[],"id":"b"}',
        b'{"question_id":"q1","system":"base","text":"On port 5000.","chunk_ids":[],"id":"c"}',
        b"",
    ]


def test_nested_messages_come_back_too(tmp_path: Path) -> None:
    messages = (Message("user", "Which port?"), Message("assistant", "5000."))
    example = Example(id="e1", pair_ids=("p1", "p2"), document_id="d1", messages=messages)
    write_records(tmp_path / "train.jsonl", [example])
    assert read_records(tmp_path / "train.jsonl", Example) == [example]


def test_an_empty_file_gives_no_records(tmp_path: Path) -> None:
    assert write_records(tmp_path / "none.jsonl", []) == 0
    assert read_records(tmp_path / "none.jsonl", Answer) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"id":"b","question_id":"q1","system":"base","text":"","score":1}', "unknown field `score`"),
        (b'{"id":"b","question_id":"q1","system":"base"}', "missing required field `text`"),
        (b'{"id":"b","question_id":"q1","system":"base","text":3}', "Expected `str`, got `int`"),
        (b'{"id":"","question_id":"q1","system":"base","text":""}', "length >= 1"),
        (b'{"id":"b","question_id":', "truncated"),
        (b"", "truncated"),
    ],
)
def test_a_line_that_is_no_such_record_is_refused_with_file_and_line(tmp_path: Path, line: bytes, fault: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(msgspec.json.encode(answer("a")) + b"\n" + line + b"\n")
    with pytest.raises(BadRecord) as raised:
        read_records(path, Answer)
    said = str(raised.value)
    assert said.startswith(f"{path}:2: not a Answer: ") and fault in said and "\n" not in said


def test_a_question_of_an_unknown_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    fields = {"id": "q", "pair_id": "p", "section_id": "s", "type": "factual", "question": "Which?", "reference": "5000."}
    path.write_bytes(msgspec.json.encode(fields | {"set": "silver"}) + b"\n")
    with pytest.raises(BadRecord, match="Invalid enum value 'silver'"):
        read_records(path, Question)


def test_two_records_with_one_id_are_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_records(path, [answer("a")])
    with pytest.raises(BadRecord, match="two records have the id b; ids must differ"):
        write_records(path, [answer("b"), answer("c"), answer("b", "Another.")])
    assert read_records(path, Answer) == [answer("a")]


def test_an_id_is_the_start_of_the_sha256_over_its_parts_as_json() -> None:
    assert content_id("a", ("b", 1)) == hashlib.sha256(b'["a",["b",1]]').hexdigest()[:16] == "214a7b6e9fd13516"
    assert content_id({"y": 1, "x": "é"}) == hashlib.sha256('[{"x":"é","y":1}]'.encode()).hexdigest()[:16]


def test_parts_of_an_id_do_not_run_together() -> None:
    assert len({content_id("ab", "c"), content_id("a", "bc"), content_id("abc"), content_id(("ab", "c"))}) == 4


def test_by_id_finds_and_evolve_changes_a_copy() -> None:
    first = answer("a")
    assert by_id([first, answer("b")])["a"] is first
    assert evolve(first, text="No.") == answer("a", "No.") and first.text == "On port 5000."
