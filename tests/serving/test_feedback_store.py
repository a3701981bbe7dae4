"""The store of ratings: the last word counts, secrets are not kept, and processes do not get in each other's way."""

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stages.program import BadInput, BadRecord
from stages.serving.feedback import MAX_ANSWER, MAX_COMMENT, MAX_QUESTION, Feedback

TOKEN = "ghp_" + "a1B2c3D4e5F6g7H8i9J0" * 2
ROOT = Path(__file__).parents[2]


@pytest.fixture
def feedback(tmp_path: Path) -> Feedback:
    return Feedback(tmp_path / "data" / "feedback.sqlite")


def test_a_rating_comes_back_with_its_model_and_its_texts(feedback: Feedback) -> None:
    feedback.add("a1", "docsmith/3", "down", "wrong port", "Which port?", "Port 1.")
    feedback.add("a2", "docsmith/4", "up", "")
    one, other = Feedback(feedback.path).all()
    assert (one.answer_id, one.model, one.rating, one.comment, one.question, one.answer) == (
        "a1",
        "docsmith/3",
        "down",
        "wrong port",
        "Which port?",
        "Port 1.",
    )
    assert (other.model, other.rating, other.comment, other.question, other.answer) == ("docsmith/4", "up", "", None, None)
    assert one.said_at <= other.said_at and one.said_at.endswith("Z")


def test_the_last_word_about_an_answer_counts_and_takes_back_what_was_sent_along(feedback: Feedback) -> None:
    feedback.add("a1", "m/1", "up", "fine", "An unusual question?", "Yes.")
    feedback.add("a1", "m/1", "down", "")
    (rated,) = feedback.all()
    assert (rated.rating, rated.comment, rated.question, rated.answer) == ("down", "", None, None)
    assert [file for file in feedback.path.parent.iterdir() if b"unusual" in file.read_bytes()] == []


def test_secrets_are_marked_before_anything_is_stored(feedback: Feedback) -> None:
    feedback.add("a1", "m/1", "down", f"my key {TOKEN} fails", f"Why does {TOKEN} fail?", f"Because {TOKEN} is old.")
    (rated,) = feedback.all()
    assert rated.comment == "my key [github token removed] fails"
    assert rated.question == "Why does [github token removed] fail?" and rated.answer == "Because [github token removed] is old."
    assert [file for file in feedback.path.parent.iterdir() if TOKEN[:20].encode() in file.read_bytes()] == []


def test_texts_are_cut_and_a_secret_at_the_cut_is_not_half_kept(feedback: Feedback) -> None:
    feedback.add("a1", "m/1", "up", "x" * (MAX_COMMENT - 10) + " " + TOKEN, "y" * 100_000, "z" * 100_000)
    (rated,) = feedback.all()
    assert rated.question is not None and rated.answer is not None
    assert [len(rated.comment), len(rated.question), len(rated.answer)] == [MAX_COMMENT, MAX_QUESTION, MAX_ANSWER]
    assert "ghp" not in rated.comment


def test_sql_in_a_text_is_text(feedback: Feedback) -> None:
    feedback.add("a1", "m/1", "up", "'); DROP TABLE feedback; --")
    assert [one.comment for one in feedback.all()] == ["'); DROP TABLE feedback; --"]


def test_two_processes_and_their_threads_lose_nothing(tmp_path: Path) -> None:
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stages.serving.feedback import Feedback
store = Feedback(Path(sys.argv[1]))
with ThreadPoolExecutor(3) as pool:
    list(pool.map(lambda number: store.add(f"{sys.argv[2]}-{number}", "m/1", "up", "x"), range(20)))
"""
    path = tmp_path / "feedback.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name], cwd=ROOT) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len({one.answer_id for one in Feedback(path).all()}) == 40


def test_many_threads_share_one_store(feedback: Feedback) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: feedback.add(f"a{number % 5}", "m/1", "up", str(number)), range(20)))
    assert len(feedback.all()) == 5


def test_a_file_that_is_no_database_is_told_in_one_line_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "feedback.sqlite"
    path.write_text("not a database, but long enough to look like one" * 100)
    with pytest.raises(
        BadInput, match=r"feedback.sqlite: .*not a database; it is damaged; move it away, and a new one is begun$"
    ):
        Feedback(path)
    assert path.read_text().startswith("not a database")


def test_a_row_that_is_no_rating_is_told_with_its_id(feedback: Feedback) -> None:
    feedback.add("a1", "m/1", "up", "")
    feedback.add("a2", "m/1", "up", "")
    with sqlite3.connect(feedback.path) as database:
        database.execute("UPDATE feedback SET rating = 'sideways' WHERE answer_id = 'a2'")
    with pytest.raises(
        BadRecord, match="the row with answer_id 'a2' is no rating: Invalid enum value 'sideways'.* Mend or delete it"
    ):
        feedback.all()
