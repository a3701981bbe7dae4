"""data/pairs.jsonl + data/rejected.jsonl -> data/review.jsonl: a page on which a person accepts, edits and rejects pairs, until Ctrl-C.

The answers that users rated down, which `python -m stages.feedback` writes to data/feedback.jsonl, are edited and rejected there too.
Each decision is on disk before the page says so, and the next `dvc repro` applies them. Costs a second to start, then attention.
"""

import contextlib
import fcntl
import functools
import math
import re
import secrets
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from stages.evidence import locate
from stages.program import BadRecord, DocsmithError, ServerFailed, run, say
from stages.records import MEND, Chunk, Complaint, Decision, Pair, Rejected, by_id, content_id, read_records, write_records

PAGE = Path(__file__).with_name("review.html")
BY_REVIEWER = "rejected-by-reviewer"  # a rule of validate_suite.yaml
ROWS_AT_ONCE = 50
MAX_BODY_BYTES = 64_000


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The address to listen on. `port` 0 takes a free one."""

    host: str
    port: int


class Paths(msgspec.Struct, frozen=True):
    chunks: Path
    pairs: Path
    rejected: Path
    decisions: Path
    feedback: Path  # which need not be there


class Row(msgspec.Struct, frozen=True):
    """A pair, a rejected candidate or an answer that a user rated down, and the text that it was made from or is nearest to."""

    id: str  # the candidate's, or the answer's
    key: str  # hash(question, answer): the id of a decision about it, unless it shows an edit
    stage: Literal["accepted", "rejected", "feedback"]
    chunk_id: str
    question: str
    answer: str
    quote: str
    type: str
    similarity: float
    rules: tuple[str, ...]  # that it broke; those of a pair only report
    section: str  # path and headings
    source: str  # the chunk's text, its paragraphs on one line each; "" where the chunk is gone
    start: int  # of the chunk in its document
    is_waivable: bool
    is_reviewed: bool  # in the last run of validate
    told: str = ""  # what a user found wrong, and with which model


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the page asks to see; without any field, everything."""

    stage: Literal["", "accepted", "rejected", "feedback"] = ""
    review: Literal["", "decided", "undecided"] = ""
    rule: str = ""
    section: str = ""  # a part of path and headings, in any case
    low: float = -math.inf
    high: float = math.inf
    text: str = ""  # a part of question, answer or quote, in any case
    sort: Literal["reading", "lowest", "highest"] = "reading"
    after: str = ""  # id of the last row that the page has


class Said(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the page sends about one row."""

    verdict: Literal["accept", "edit", "reject", "undo"]
    version: str  # of the row as the page showed it
    question: str = ""  # this and the next of an edit
    answer: str = ""
    quote: str = ""  # the evidence of an edit that corrects what a user rated down
    note: str = ""


class Refused(Exception):
    """A request that is answered with a status and a line for the person at the page."""

    def __init__(self, status: int, line: str, row: dict[str, Any] | None = None) -> None:
        super().__init__(line)
        self.status, self.row = status, row


def rows_of(
    pairs: Iterable[Pair], rejected: Iterable[Rejected], chunks: Mapping[str, Chunk], complaints: Iterable[Complaint] = ()
) -> list[Row]:
    """A row for each record, in reading order, those on one quote together, best first."""
    rows = [row_of(complaint, chunks.get(complaint.chunk_id)) for complaint in complaints]
    records: list[Pair | Rejected] = [*pairs, *rejected]
    for record in records:
        chunk = chunks.get(record.chunk_id)
        rows.append(
            Row(
                id=record.id,
                key=content_id(record.question, record.answer),
                stage="accepted" if isinstance(record, Pair) else "rejected",
                chunk_id=record.chunk_id,
                question=record.question,
                answer=record.answer,
                quote=record.quote,
                type=record.type,
                similarity=record.similarity,
                rules=record.flags if isinstance(record, Pair) else record.rules,
                section=section_of(chunk),
                source=flowing(chunk) if chunk else "",
                start=chunk.start if chunk else 0,
                is_waivable=isinstance(record, Pair) or record.waivable,
                is_reviewed=record.reviewed if isinstance(record, Pair) else BY_REVIEWER in record.rules,
            )
        )
    return sorted(rows, key=lambda row: (row.section.partition(" › ")[0], row.start, row.quote, -row.similarity, row.id))


def row_of(complaint: Complaint, chunk: Chunk | None) -> Row:
    told = [f"A user of {complaint.model} rated this answer down on {complaint.said_at[:10]}."]
    told += [] if complaint.covered else ["The documentation does not seem to cover the question."]
    told += [f"The user says: {complaint.comment}"] if complaint.comment else []
    return Row(
        id=complaint.id,
        key=content_id(complaint.question, complaint.answer),
        stage="feedback",
        chunk_id=complaint.chunk_id,
        question=complaint.question,
        answer=complaint.answer,
        quote=complaint.quote,
        type="factual",
        similarity=complaint.similarity,
        rules=(),
        section=section_of(chunk),
        source=flowing(chunk) if chunk else "",
        start=chunk.start if chunk else 0,
        is_waivable=True,
        is_reviewed=False,
        told=" ".join(told),
    )


def section_of(chunk: Chunk | None) -> str:
    return " › ".join([chunk.path, *chunk.heading_path]) if chunk else ""


def flowing(chunk: Chunk) -> str:
    """The chunk's text without the line breaks inside paragraphs, for a column of another width; code, lists and tables keep theirs."""
    if chunk.fence:
        return chunk.text
    parts = re.split(r"(?ms)(^ *(?:```|~~~).*?(?:^ *(?:```|~~~) *$|\Z))", chunk.text)
    wrapped = re.compile(r"(?m)^(?=[^\s#|>~`+*\-\d])(.*\S)\n(?=[^\s#|>~`+*\-\d])")
    return "".join(part if place % 2 else wrapped.sub(r"\1 ", part) for place, part in enumerate(parts))


def why_locked(row: Row, decision: Decision | None) -> str:
    """Why no decision can be made about `row`, in a sentence; "" where one can."""
    if row.stage == "feedback" and not (row.question and row.answer):
        return "No pair can be made of it: its user did not agree to have the question and the answer kept."
    if not row.is_waivable:
        return f"It stays rejected: a reviewer cannot waive what it broke ({', '.join(row.rules)})."
    if not row.question or not row.answer:
        return "It stays rejected: it has no question or no answer."
    if decision is None and row.is_reviewed:  # its text may be an edit's, about which nothing can be decided
        return "Its decision has changed since the last dvc repro; the next one shows it as it is now."
    return ""


def read_decisions(path: Path) -> list[Decision]:
    """The decisions so far; [] without a file. Raises BadRecord: what people wrote is never replaced because it cannot be read."""
    if not path.exists():
        return []
    decisions = read_records(path, Decision, MEND)
    repeated = [id for id, count in Counter(decision.id for decision in decisions).items() if count > 1]
    if repeated:
        raise BadRecord(f"{path}: two decisions have the id {repeated[0]}; remove one, nothing was overwritten")
    return decisions


def by_text(decisions: Iterable[Decision]) -> dict[str, Decision]:
    """Row.key -> decision. After `dvc repro` an edited pair shows its new text, so an edit is found by that too."""
    found = by_id(decisions)
    edits = [one for one in found.values() if one.verdict == "edit"]
    return {content_id(one.edited_question or one.question, one.edited_answer or one.answer): one for one in edits} | found


def is_wanted(row: Row, decision: Decision | None, wanted: Wanted) -> bool:
    is_open = decision is None and not why_locked(row, decision)
    return (
        wanted.stage in ("", row.stage)
        and (
            wanted.review == ""
            or (wanted.review == "decided" and decision is not None)
            or (wanted.review == "undecided" and is_open)
        )
        and (wanted.rule == "" or wanted.rule in row.rules)
        and wanted.low <= row.similarity <= wanted.high
        and (wanted.section == "" or wanted.section.casefold() in row.section.casefold())
        and (wanted.text == "" or wanted.text.casefold() in f"{row.question}\n{row.answer}\n{row.quote}".casefold())
    )


def ordered(rows: Sequence[Row], sort: str) -> Sequence[Row]:
    """`rows`, which are in reading order, in the order asked for."""
    if sort == "reading":
        return rows
    return sorted(rows, key=lambda row: row.similarity, reverse=sort == "highest")


def counts(rows: Iterable[Row], known: Mapping[str, Decision]) -> dict[str, int]:
    """How many rows are decided, open and locked, and how many decisions are about a text that no row has."""
    states: Counter[str] = Counter()
    met = set()
    for row in rows:
        decision = known.get(row.key)
        states["decided" if decision else "locked" if why_locked(row, decision) else "undecided"] += 1
        met |= {decision.id} if decision else set()
    absent = len({decision.id for decision in known.values()} - met)
    return {state: states[state] for state in ("decided", "undecided", "locked")} | {"absent": absent}


def version_of(row: Row, decision: Decision | None) -> str:
    """Another value whenever the page would show something else."""
    return content_id(row, decision)


def shown(row: Row, decision: Decision | None) -> dict[str, Any]:
    """`row` for the page, its source cut in three: before the quote, the quote, and after it."""
    quote = decision.quote if decision and row.stage == "feedback" else row.quote  # of a correction, its reviewer chose it
    start, end = locate(quote, row.source) or (len(row.source), len(row.source))
    kept = msgspec.structs.asdict(row) | {"quote": quote}
    edited = {"verdict": "", "edited_question": "", "edited_answer": "", "note": ""}
    return (
        {
            name: kept[name]
            for name in ("id", "stage", "question", "answer", "quote", "type", "similarity", "rules", "section", "told")
        }
        | {"source": [row.source[:start], row.source[start:end], row.source[end:]], "version": version_of(row, decision)}
        | {"locked": why_locked(row, decision)}
        | (edited if decision is None else {name: getattr(decision, name) for name in ("question", "answer", *edited)})
    )


def decided(row: Row, before: Decision | None, said: Said, chunks: Sequence[Chunk]) -> Decision:
    """The decision that `said` makes about `row`, in place of the one `before`; of a correction, `chunks` hold the quote. Raises Refused."""
    generated = before or row
    question, answer = said.question.strip(), said.answer.strip()
    if said.verdict == "edit" and not (question and answer):
        raise Refused(422, "An edit needs a question and an answer.")
    if said.verdict == "edit" and (question, answer) == (generated.question, generated.answer):
        raise Refused(422, "The edit changes nothing; accept the pair as it is.")
    chunk_id, quote = row.chunk_id, row.quote
    if row.stage == "feedback" and said.verdict == "accept":
        raise Refused(422, "A user rated this answer down: edit it into the right one, or reject it.")
    if row.stage == "feedback" and said.verdict == "edit":
        quote = said.quote.strip()
        holders = [chunk.id for chunk in chunks if locate(quote, chunk.text)]
        if not holders:
            raise Refused(422, "The evidence must stand in the documentation word for word; copy it from there.")
        chunk_id = chunk_id if chunk_id in holders else holders[0]
    return Decision(
        id=content_id(generated.question, generated.answer),
        verdict=said.verdict,  # type: ignore[arg-type]
        chunk_id=chunk_id or "none",
        question=generated.question,
        answer=generated.answer,
        quote=quote,
        type=row.type,  # type: ignore[arg-type]
        edited_question=question if said.verdict == "edit" else "",
        edited_answer=answer if said.verdict == "edit" else "",
        note=said.note.strip(),
    )


def decide(path: Path, row: Row, said: Said, chunks: Sequence[Chunk] = ()) -> Decision | None:
    """Writes what was said about `row` to the file of decisions, where all others stay; None after an undo. Raises Refused."""
    with only_writer_of(path):
        decisions = by_id(read_decisions(path))
        before = by_text(decisions.values()).get(row.key)
        if said.version != version_of(row, before):
            raise Refused(409, "This pair has changed since the page showed it. Look again and decide again.", shown(row, before))
        if said.verdict == "undo" and before is None:
            raise Refused(422, "There is no decision to undo.")
        if said.verdict != "undo" and (reason := why_locked(row, before)):
            raise Refused(422, reason)
        now = None if said.verdict == "undo" else decided(row, before, said, chunks)
        if before:
            del decisions[before.id]
        write_records(path, [*decisions.values(), *([now] if now else [])])
    return now


@contextlib.contextmanager
def only_writer_of(path: Path) -> Iterator[None]:
    """Waits until no other server is between reading and writing `path`."""
    with open(path.with_name(f".{path.name}.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def state_of(paths: Paths) -> tuple[tuple[int, int, int], ...]:
    """Another value after a file that rows are made of was replaced or written to. Raises FileNotFoundError."""
    files = [paths.chunks, paths.pairs, paths.rejected, *([paths.feedback] if paths.feedback.exists() else [])]
    return tuple((found.st_mtime_ns, found.st_size, found.st_ino) for found in (path.stat() for path in files))


@functools.lru_cache(maxsize=1)
def read_rows(paths: Paths, state: object) -> list[Row]:
    """The rows in the files; read again only in another `state`, which `dvc repro` brings about under an open page."""
    chunks = by_id(read_records(paths.chunks, Chunk))
    complaints = (
        read_records(paths.feedback, Complaint, "Rebuild it with: python -m stages.feedback") if paths.feedback.exists() else []
    )
    return rows_of(read_records(paths.pairs, Pair), read_records(paths.rejected, Rejected), chunks, complaints)


def application(paths: Paths, host: str) -> Any:
    """The FastAPI application behind the page, for a browser that knows it by the name `host` or localhost."""
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response

    app = FastAPI(title="Docsmith", docs_url=None, redoc_url=None, openapi_url=None)

    def rows_now() -> list[Row]:
        return read_rows(paths, state_of(paths))

    @app.middleware("http")
    async def only_its_own_page(request: Request, call_next: Any) -> Response:
        # another site's page can reach this port, also under its own name (DNS rebinding)
        address = request.headers.get("host", "")
        origin = request.headers.get("origin", None if request.method == "POST" else f"http://{address}")
        if address.partition(":")[0] not in (host, "127.0.0.1", "localhost") or origin != f"http://{address}":
            return JSONResponse({"detail": "Only this server's own page may ask it."}, 403)
        reply: Response = await call_next(request)
        reply.headers.update({"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})
        return reply

    @app.exception_handler(Refused)
    async def refuse(_request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"detail": str(error), "row": error.row}, error.status)

    @app.exception_handler(DocsmithError)
    async def damaged(_request: Request, error: DocsmithError) -> JSONResponse:
        return JSONResponse({"detail": f"{error}."}, 503)

    @app.exception_handler(OSError)
    async def unreadable(_request: Request, error: OSError) -> JSONResponse:
        line = f"{error.filename or paths.decisions}: {error.strerror}. Nothing was saved; while dvc repro is at work, wait and reload."
        return JSONResponse({"detail": line}, 503)

    @app.get("/")
    async def page() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        text = PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    @app.get("/filters")
    async def filters() -> JSONResponse:
        rows = rows_now()
        by_rule = Counter(rule for row in rows for rule in row.rules)
        return JSONResponse({"rules": dict(by_rule.most_common()), "sections": list(dict.fromkeys(row.section for row in rows))})

    @app.get("/rows")
    async def some_rows(request: Request) -> JSONResponse:
        try:
            wanted = msgspec.convert(dict(request.query_params), Wanted, strict=False)
        except msgspec.ValidationError as error:
            raise Refused(400, f"{error}.") from None
        rows, known = rows_now(), by_text(read_decisions(paths.decisions))
        in_order = ordered(rows, wanted.sort)
        ids = [row.id for row in in_order]
        if wanted.after and wanted.after not in ids:
            raise Refused(404, "The pairs have changed since the page was loaded; reload it.")
        first = ids.index(wanted.after) + 1 if wanted.after else 0
        places = [place for place, row in enumerate(in_order) if is_wanted(row, known.get(row.key), wanted)]
        some = [in_order[place] for place in places if place >= first][:ROWS_AT_ONCE]
        return JSONResponse(
            {
                "rows": [shown(row, known.get(row.key)) for row in some],
                "total": len(places),
                "counts": counts(rows, known),
            }
        )

    @app.post("/rows/{row_id}")
    async def judge_row(row_id: str, request: Request) -> JSONResponse:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise Refused(415, "A decision is sent as application/json.")
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise Refused(413, f"The decision is larger than {MAX_BODY_BYTES} bytes.")
        try:
            said = msgspec.json.decode(bytes(body), type=Said)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Refused(400, f"Not a decision: {error}.") from None
        rows = rows_now()
        row = next((row for row in rows if row.id == row_id), None)
        if row is None:
            raise Refused(404, "This pair is no longer there; reload the page.")
        chunks = read_records(paths.chunks, Chunk) if row.stage == "feedback" and said.verdict == "edit" else []
        now = decide(paths.decisions, row, said, chunks)
        return JSONResponse({"row": shown(row, now), "counts": counts(rows, by_text(read_decisions(paths.decisions)))})

    return app


def listen(review: Params) -> socket.socket:
    """A socket that listens on the address in params.yaml. Raises ServerFailed when it cannot be had."""
    try:
        return socket.create_server((review.host, review.port))
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise ServerFailed(
            f"params.yaml: cannot listen on review.host {review.host}, review.port {review.port}: {reason}"
        ) from None


def main(
    review: Params,
    chunks: Path = Path("data/chunks.jsonl"),
    pairs: Path = Path("data/pairs.jsonl"),
    rejected: Path = Path("data/rejected.jsonl"),
    decisions: Path = Path("data/review.jsonl"),
    feedback: Path = Path("data/feedback.jsonl"),
) -> None:
    import uvicorn

    paths = Paths(chunks, pairs, rejected, decisions, feedback)
    left = counts(read_rows(paths, state_of(paths)), by_text(read_decisions(decisions)))["undecided"]
    with contextlib.suppress(KeyboardInterrupt), listen(review) as listener:
        host, port = listener.getsockname()[:2]
        say(f"review: http://{host}:{port} shows {left} undecided pairs and rows (Ctrl-C stops)")
        uvicorn.Server(uvicorn.Config(application(paths, review.host), log_level="warning")).run(sockets=[listener])
    say(f"review: stopped; {decisions} holds {len(read_decisions(decisions))} decisions. Apply them with: dvc repro")


if __name__ == "__main__":
    run(main)
