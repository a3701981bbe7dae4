"""Replies of LLM servers, kept by the content of their requests: a rerun asks only what was never answered."""

import sqlite3
from collections.abc import Iterable
from pathlib import Path

import msgspec


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


def request_key(request: Request) -> str:
    """Hex SHA-256 of the request's content."""
    import hashlib

    return hashlib.sha256(msgspec.json.encode(request, order="deterministic")).hexdigest()


class Store:
    """An SQLite file of replies; safe under kill -9 and for several processes at once (write-ahead log)."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(folder / "replies.sqlite", timeout=60)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=NORMAL")  # a power cut may lose the last replies, never the file
        self._database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply BLOB NOT NULL) WITHOUT ROWID")

    def find(self, keys: Iterable[str]) -> dict[str, Reply]:
        """The kept replies among `keys`."""
        found = {}
        for key in keys:
            row = self._database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
            if row:
                found[key] = msgspec.json.decode(row[0], type=Reply)
        return found

    def keep(self, key: str, reply: Reply) -> None:
        """Keeps `reply`; on return it survives a kill of this process."""
        with self._database:
            self._database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, msgspec.json.encode(reply)))

    def close(self) -> None:
        self._database.close()
