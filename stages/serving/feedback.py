"""What users said about answers, in SQLite: a rating and a comment, and the question and the answer of those who agreed."""

import contextlib
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from stages.program.errors import BadInput, BadRecord
from stages.records import Text
from stages.screening import redacted, secrets_in

MAX_COMMENT, MAX_QUESTION, MAX_ANSWER = 2_000, 8_000, 16_000  # characters; what is longer is cut
FIELDS = "answer_id, model, rating, comment, question, answer, said_at"
ADVICE = {
    sqlite3.SQLITE_BUSY: "another process has held it for ten seconds; wait or stop it",
    sqlite3.SQLITE_CORRUPT: "it is damaged; move it away, and a new one is begun",
    sqlite3.SQLITE_NOTADB: "it is damaged; move it away, and a new one is begun",
    sqlite3.SQLITE_FULL: "free disk space",
}


class Rated(msgspec.Struct, frozen=True):
    """An answer as its user rated it."""

    answer_id: Text
    model: Text  # the version that answered
    rating: Literal["up", "down"]
    comment: str
    question: str | None  # this and the answer are None unless the user agreed to have them kept
    answer: str | None
    said_at: Text  # UTC, as 2026-11-23T17:43:05Z


class Feedback:
    """The file of ratings, which several processes may write to at once.

    Every method raises BadInput, with what to do, when the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute(f"CREATE TABLE IF NOT EXISTS feedback ({FIELDS.replace('answer_id', 'answer_id PRIMARY KEY', 1)})")

    def add(
        self,
        answer_id: str,
        model: str,
        rating: Literal["up", "down"],
        comment: str,
        question: str | None = None,
        answer: str | None = None,
    ) -> None:
        """Keeps what a user says about an answer now in place of what was said about it before, texts that were kept included.

        Secrets in the texts are replaced by a mark.
        """
        said_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        bounded = ((comment, MAX_COMMENT), (question, MAX_QUESTION), (answer, MAX_ANSWER))
        texts = [None if text is None else _safe(text, most) for text, most in bounded]
        with self._open() as database:
            database.execute("PRAGMA secure_delete=ON")  # a text that was taken back is overwritten
            database.execute(
                f"INSERT OR REPLACE INTO feedback ({FIELDS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (answer_id, model, rating, *texts, said_at),
            )

    def all(self) -> list[Rated]:
        """Every rating, the oldest first. Raises BadRecord for a row that is none."""
        with self._open() as database:
            rows = database.execute(f"SELECT {FIELDS} FROM feedback ORDER BY said_at, answer_id").fetchall()
        return [self._rated(row) for row in rows]

    def _rated(self, row: tuple[object, ...]) -> Rated:
        try:
            return msgspec.convert(dict(zip(FIELDS.split(", "), row, strict=True)), Rated)
        except msgspec.ValidationError as error:
            raise BadRecord(f"{self.path}: the row with answer_id {row[0]!r} is no rating: {error}. Mend or delete it") from None

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # a connection for each call: it may come from any thread, and a call a minute does not need to be fast
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=10)) as database, database:
                yield database
        except sqlite3.DatabaseError as error:
            advice = ADVICE.get((getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF, "check the path and its permissions")
            raise BadInput(f"{self.path}: {error}; {advice}") from None


def _safe(text: str, most: int) -> str:
    return redacted(text, secrets_in(text))[:most]  # in this order: half a secret would not be found
