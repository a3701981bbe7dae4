"""Replies of LLM servers, kept by the content of their requests: a rerun asks only what was never answered."""

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from stages.program.errors import DocsmithError

FULL = "free disk space. The replies before this one are kept there, and the next run asks for the others: dvc repro"
DAMAGED = "it is damaged. Delete it, and its replies are asked for anew: dvc repro"
ADVICE = {
    sqlite3.SQLITE_FULL: FULL,
    sqlite3.SQLITE_IOERR: FULL,  # what a limit on the file's size looks like
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_NOTADB: DAMAGED,
    sqlite3.SQLITE_BUSY: "another process has held it for a minute; wait or stop it",
    sqlite3.SQLITE_CANTOPEN: "check the path and its permissions",
    sqlite3.SQLITE_READONLY: "check the path and its permissions",
}
WAIT_S = 60  # for another process's lock
RATE_ROWS = 5  # one row alone may be a handful of repairs


class Request(msgspec.Struct, frozen=True):
    """One chat completion. Everything that can change the reply is in it, so its hash can stand for the reply."""

    model_sha256: str
    messages: tuple[tuple[str, str], ...]  # (role, content)
    temperature: float
    max_tokens: int
    seed: int  # tells samples of one prompt apart; not sent, since a seeded request ends vLLM's CPU engine (0.32)
    schema: msgspec.Raw | None = None  # JSON schema of the reply; None for free text


class Reply(msgspec.Struct, frozen=True):
    """What came back. `failed` is empty for a reply, else the reason why there is none; failed replies are never kept."""

    text: str
    tokens: int = 0
    is_whole: bool = True  # False: cut at max_tokens
    failed: str = ""
    prompt_tokens: int = 0


class Rate(msgspec.Struct, frozen=True):
    """What a call to a model took, on average."""

    prompt_tokens: float
    new_tokens: float
    calls_per_s: float


def request_key(request: Request) -> str:
    """Hex SHA-256 of the request's content, white space in messages folded: re-wrapped docs cost no call."""
    import hashlib

    folded = tuple((role, " ".join(content.split())) for role, content in request.messages)
    content = msgspec.structs.replace(request, messages=folded)
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()


class Store:
    """The SQLite file <folder>/<name>.sqlite of replies; safe under kill -9 and for several processes at once (write-ahead log).

    Every method raises DocsmithError, with what to do, when the disk is full or the file is damaged.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.sqlite"
        with self._one_line_errors():
            self._database = sqlite3.connect(self.path, timeout=WAIT_S)
            self._log_ahead()
            self._database.execute("PRAGMA synchronous=NORMAL")  # a power cut may lose the last replies, never the file
            self._database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply BLOB NOT NULL) WITHOUT ROWID")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS askings (model TEXT, calls INT, prompt_tokens INT, new_tokens INT, seconds REAL)"
            )

    def find(self, keys: Iterable[str]) -> dict[str, Reply]:
        """The kept replies among `keys`."""
        found = {}
        with self._one_line_errors():
            for key in keys:
                row = self._database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
                if row:
                    found[key] = msgspec.json.decode(row[0], type=Reply)
        return found

    def keep(self, key: str, reply: Reply) -> None:
        """Keeps `reply`; on return it survives a kill of this process."""
        with self._one_line_errors(), self._database:
            self._database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, msgspec.json.encode(reply)))

    def size(self) -> int:
        """How many replies are kept."""
        with self._one_line_errors():
            return int(self._database.execute("SELECT count(*) FROM replies").fetchone()[0])

    def prune(self, keys: Iterable[str]) -> int:
        """How many replies were dropped: those that are not in `keys`. The file shrinks."""
        with self._one_line_errors():
            with self._database:
                self._database.execute("CREATE TEMP TABLE wanted (key TEXT PRIMARY KEY) WITHOUT ROWID")
                self._database.executemany("INSERT OR IGNORE INTO wanted VALUES (?)", ((key,) for key in keys))
                dropped = self._database.execute("DELETE FROM replies WHERE key NOT IN (SELECT key FROM wanted)").rowcount
                self._database.execute("DROP TABLE wanted")
            self._database.execute("VACUUM")
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return dropped

    def keep_rate(self, model_sha256: str, calls: int, prompt_tokens: int, new_tokens: int, seconds: float) -> None:
        """Notes what `calls` answered calls took, for `rate`."""
        with self._one_line_errors(), self._database:
            row = (model_sha256, calls, prompt_tokens, new_tokens, seconds)
            self._database.execute("INSERT INTO askings VALUES (?, ?, ?, ?, ?)", row)

    def rate(self, model_sha256: str) -> Rate | None:
        """The rate of that model's last askings, or None when it was never asked."""
        latest = "SELECT * FROM askings WHERE model = ? ORDER BY rowid DESC LIMIT ?"
        sums = f"SELECT sum(calls), sum(prompt_tokens), sum(new_tokens), sum(seconds) FROM ({latest})"
        with self._one_line_errors():
            calls, prompt_tokens, new_tokens, seconds = self._database.execute(sums, (model_sha256, RATE_ROWS)).fetchone()
        return Rate(prompt_tokens / calls, new_tokens / calls, calls / seconds) if calls else None

    def close(self) -> None:
        with self._one_line_errors():
            self._database.close()

    def _log_ahead(self) -> None:
        until = time.monotonic() + WAIT_S
        while True:
            try:
                self._database.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:  # when several open a new file at once, SQLite does not wait here
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
            time.sleep(0.05)

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            advice = ADVICE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
            if advice is None:
                raise
            raise DocsmithError(f"{self.path}: {error}; {advice}") from None
        except msgspec.DecodeError as error:
            raise DocsmithError(f"{self.path}: {error}; {DAMAGED}") from None
