import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from contrasts import CONTRASTS
from playwright.sync_api import Browser, Dialog, Page, expect

from stages.decisions import with_decisions
from stages.program import BadRecord
from stages.records import Chunk, Complaint, Decision, Pair, Rejected, content_id, evolve, read_records, write_records
from stages.review import (
    MAX_BODY_BYTES,
    Refused,
    Said,
    Wanted,
    by_text,
    counts,
    decide,
    flowing,
    is_wanted,
    ordered,
    read_decisions,
    rows_of,
    shown,
    version_of,
)

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
expect.set_options(timeout=20_000)  # for a machine with much else to do
MARKUP = "<img src=x onerror=\"document.title='taken over'\"> & <b>bold</b>"
INSTALL = Chunk(
    id="c1",
    document_id="d1",
    section_id="s1",
    path="guide.md",
    heading_path=("Guide", "Install"),
    start=10,
    end=110,
    text="Docsmith is a pipeline.\n\nRun `make setup`\nto install the packages. The set-up takes a minute.",
)
PORTS = Chunk(
    id="c2",
    document_id="d2",
    section_id="s2",
    path="serving.md",
    heading_path=("Serving", "Ports"),
    start=0,
    end=90,
    text=f"🙂🙂 The server listens on port 5000. {MARKUP} is only text.",
)


def pair(chunk: Chunk, question: str, answer: str, quote: str, similarity: float, *flags: str) -> Pair:
    return Pair(
        id=content_id(chunk.id, question, answer),
        chunk_id=chunk.id,
        fact_id=content_id(chunk.id, quote),
        section_id=chunk.section_id,
        document_id=chunk.document_id,
        path=chunk.path,
        heading_path=chunk.heading_path,
        question=question,
        answer=answer,
        quote=quote,
        quote_start=0,
        quote_end=1,
        type="factual",
        model="m",
        similarity=similarity,
        wording=1,
        cluster="c",
        flags=flags,
        reviewed=False,
    )


def rejected(
    chunk: Chunk, question: str, answer: str, quote: str, similarity: float, rules: tuple[str, ...], waivable: bool
) -> Rejected:
    return Rejected(
        id=content_id(chunk.id, question, answer),
        chunk_id=chunk.id,
        section_id=chunk.section_id,
        question=question,
        answer=answer,
        quote=quote,
        type="procedural",
        similarity=similarity,
        rules=rules,
        waivable=waivable,
    )


SETUP_QUOTE = "Run `make setup` to install the packages."
PORT_QUOTE = "The server listens on port 5000."
SETUP = pair(INSTALL, "How do I install the packages?", "Run `make setup` to install the packages.", SETUP_QUOTE, 0.8)
PORT = pair(
    PORTS, "Which port does the server listen on?", "The server listens on port 5000.", PORT_QUOTE, 0.6, "holds-personal-data"
)
HOSTILE = pair(PORTS, f"What is {MARKUP}?", f"{MARKUP} is only text.", f"{MARKUP} is only text.", 0.5)
FAR = rejected(
    INSTALL, "What is Docsmith like?", "Docsmith is a pipeline.", "Docsmith is a pipeline.", 0.2, ("round-trip-too-far",), True
)
SECRET = rejected(
    PORTS, "Key?", "The key is [aws access key removed].", "gone", 0.4, ("question-too-short", "holds-secret"), False
)
WRONG = Complaint(
    id="a1",
    said_at="2026-11-23T10:00:00Z",
    model="docsmith/3",
    comment=f"It is 5000. {MARKUP}",
    question="Which port is it on?",
    answer="Port 1.",
    chunk_id="c2",
    quote=PORT_QUOTE,
    similarity=0.7,
    covered=True,
)
UNSAID = evolve(WRONG, id="a2", comment="no", question="", answer="", covered=False)
ROWS = rows_of([SETUP, PORT, HOSTILE], [FAR, SECRET], {"c1": INSTALL, "c2": PORTS})
ROW = {row.id: row for row in ROWS}


def said(record: Pair | Rejected, verdict: str, before: Decision | None = None, **texts: str) -> Said:
    """What the page sends about a row that it shows with the decision `before`."""
    return Said(verdict=verdict, version=version_of(ROW[record.id], before), **texts)  # type: ignore[arg-type]


# ---- what a decision is


def test_rows_come_in_the_order_of_the_docs_with_the_quote_cut_out_by_character() -> None:
    assert [row.id for row in ROWS] == [FAR.id, SETUP.id, HOSTILE.id, PORT.id, SECRET.id]
    assert shown(ROW[SETUP.id], None)["source"] == [
        "Docsmith is a pipeline.\n\n",
        "Run `make setup` to install the packages.",
        " The set-up takes a minute.",
    ]
    assert shown(ROW[PORT.id], None)["source"][:2] == ["🙂🙂 ", PORT_QUOTE]
    assert shown(ROW[SECRET.id], None)["source"] == [PORTS.text, "", ""]


def test_paragraphs_flow_and_code_lists_and_tables_keep_their_lines() -> None:
    kept = "# Title\n\n- one\n- two\n\n| a |\n| - |\n\n```sh\nmake\ntest\n```\n"
    text = f"A line that\ngoes on\nand on.  \nNext.\n\n{kept}The\nend."
    assert flowing(evolve(INSTALL, text=text)) == f"A line that goes on and on.  \nNext.\n\n{kept}The end."
    inside_code = evolve(INSTALL, text="make\ntest\n```\n", fence="```")
    assert flowing(inside_code) == inside_code.text


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (Wanted(), [FAR, SETUP, HOSTILE, PORT, SECRET]),
        (Wanted(stage="accepted"), [SETUP, HOSTILE, PORT]),
        (Wanted(stage="rejected"), [FAR, SECRET]),
        (Wanted(review="decided"), [SETUP]),
        (Wanted(review="undecided"), [FAR, HOSTILE, PORT]),  # the secret is not left to anyone to decide
        (Wanted(rule="holds-secret"), [SECRET]),
        (Wanted(rule="holds-personal-data"), [PORT]),
        (Wanted(section="guide.md › guide › inst"), [FAR, SETUP]),
        (Wanted(low=0.4, high=0.6), [HOSTILE, PORT, SECRET]),
        (Wanted(text="MAKE SETUP"), [SETUP]),
        (Wanted(stage="accepted", section="serving", high=0.55), [HOSTILE]),
    ],
)
def test_a_filter_shows_the_rows_that_fit_it(wanted: Wanted, found: list[Any]) -> None:
    known = by_text([decision_of(SETUP)])
    assert [row.id for row in ROWS if is_wanted(row, known.get(row.key), wanted)] == [record.id for record in found]


def decision_of(record: Pair | Rejected, verdict: str = "accept", **more: str) -> Decision:
    return Decision(
        id=content_id(record.question, record.answer),
        verdict=verdict,  # type: ignore[arg-type]
        chunk_id=record.chunk_id,
        question=record.question,
        answer=record.answer,
        quote=record.quote,
        type=record.type,  # type: ignore[arg-type]
        **more,
    )


def test_rows_are_sorted_by_score_either_way() -> None:
    assert [row.similarity for row in ordered(ROWS, "lowest")] == [0.2, 0.4, 0.5, 0.6, 0.8]
    assert [row.similarity for row in ordered(ROWS, "highest")] == [0.8, 0.6, 0.5, 0.4, 0.2]


def test_counts_tell_decided_open_and_locked_rows_and_decisions_without_a_row() -> None:
    gone = pair(PORTS, "Is this asked any more?", "No, it is not.", PORT_QUOTE, 0.9)
    known = by_text([decision_of(SETUP), decision_of(gone)])
    assert counts(ROWS, known) == {"decided": 1, "undecided": 3, "locked": 1, "absent": 1}


def test_decisions_are_written_as_generated_sorted_by_id_and_undone_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "review.jsonl"
    accepted = decide(path, ROW[SETUP.id], said(SETUP, "accept"))
    edited = decide(path, ROW[PORT.id], said(PORT, "edit", question=" Which port? ", answer="Port 5000.", note=" short "))
    refused = decide(path, ROW[FAR.id], said(FAR, "reject"))
    expected = [
        decision_of(SETUP),
        decision_of(PORT, "edit", edited_question="Which port?", edited_answer="Port 5000.", note="short"),
        decision_of(FAR, "reject"),
    ]
    assert [accepted, edited, refused] == expected
    assert read_decisions(path) == sorted(expected, key=lambda one: one.id)
    assert decide(path, ROW[PORT.id], said(PORT, "undo", edited)) is None
    assert read_decisions(path) == sorted([expected[0], expected[2]], key=lambda one: one.id)


def test_an_edit_is_found_again_by_its_new_text_and_edited_again(tmp_path: Path) -> None:
    path = tmp_path / "review.jsonl"
    first = decide(path, ROW[PORT.id], said(PORT, "edit", question="Which port?", answer="Port 5000."))
    assert first is not None
    (row,) = rows_of([evolve(PORT, id="new", question="Which port?", answer="Port 5000.", reviewed=True)], [], {"c2": PORTS})
    assert by_text(read_decisions(path)).get(row.key) == first
    assert (shown(row, first)["question"], shown(row, first)["locked"]) == (PORT.question, "")
    second = decide(path, row, Said("edit", version_of(row, first), "Which port is it?", "It is port 5000."))
    assert second == evolve(first, edited_question="Which port is it?", edited_answer="It is port 5000.")
    assert read_decisions(path) == [second]


@pytest.mark.parametrize("record", [evolve(PORT, reviewed=True), evolve(FAR, rules=("rejected-by-reviewer",), waivable=True)])
def test_what_was_undone_since_the_last_repro_waits_for_the_next_one(tmp_path: Path, record: Pair | Rejected) -> None:
    path = tmp_path / "review.jsonl"
    verdict = "accept" if isinstance(record, Pair) else "reject"
    write_records(path, [decision_of(record, verdict)])
    (row,) = rows_of([record], [], {}) if isinstance(record, Pair) else rows_of([], [record], {})
    assert shown(row, decision_of(record, verdict))["locked"] == ""  # another decision may take its place at once
    assert decide(path, row, Said("undo", version_of(row, decision_of(record, verdict)))) is None
    with pytest.raises(Refused, match="Its decision has changed since the last dvc repro"):
        decide(path, row, Said("accept", version_of(row, None)))
    assert read_decisions(path) == []


@pytest.mark.parametrize(
    ("record", "verdict", "texts", "line"),
    [
        (SECRET, "accept", {}, r"a reviewer cannot waive what it broke \(question-too-short, holds-secret\)"),
        (SECRET, "edit", {"question": "Which key?", "answer": "None."}, "cannot waive"),
        (PORT, "edit", {"question": "Which port?", "answer": " "}, "needs a question and an answer"),
        (PORT, "edit", {"question": PORT.question, "answer": PORT.answer}, "changes nothing"),
        (PORT, "undo", {}, "no decision to undo"),
    ],
)
def test_what_cannot_be_decided_is_refused_and_nothing_is_written(
    tmp_path: Path, record: Pair | Rejected, verdict: str, texts: dict[str, str], line: str
) -> None:
    with pytest.raises(Refused, match=line) as refusal:
        decide(tmp_path / "review.jsonl", ROW[record.id], said(record, verdict, **texts))
    assert refusal.value.status == 422
    assert not (tmp_path / "review.jsonl").exists()


def test_a_row_without_a_question_is_locked() -> None:
    empty = rejected(INSTALL, "", "Docsmith is a pipeline.", "Docsmith is a pipeline.", 0.1, ("question-too-short",), True)
    (row,) = rows_of([], [empty], {"c1": INSTALL})
    assert shown(row, None)["locked"] == "It stays rejected: it has no question or no answer."


def test_a_damaged_or_doubled_decision_is_refused_with_its_place_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "review.jsonl"
    write_records(path, [decision_of(SETUP)])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"verdict": "acce\n')
    with pytest.raises(
        BadRecord,
        match=r"review.jsonl:2: not a Decision: .* Nothing was overwritten; mend that line, or take the file back from git",
    ):
        decide(path, ROW[PORT.id], said(PORT, "accept"))
    assert path.read_bytes() == whole + b'{"verdict": "acce\n'
    path.write_bytes(whole + whole)
    with pytest.raises(BadRecord, match=f"two decisions have the id {decision_of(SETUP).id}"):
        decide(path, ROW[PORT.id], said(PORT, "accept"))


# ---- what users rated down


def test_an_answer_that_a_user_rated_down_stands_beside_the_place_nearest_to_it() -> None:
    wrong, unsaid = rows_of([], [], {"c2": PORTS}, [WRONG, UNSAID])
    seen = shown(wrong, None)
    assert (seen["stage"], seen["question"], seen["answer"], seen["source"][1], seen["locked"]) == (
        "feedback",
        "Which port is it on?",
        "Port 1.",
        PORT_QUOTE,
        "",
    )
    assert seen["told"] == f"A user of docsmith/3 rated this answer down on 2026-11-23. The user says: It is 5000. {MARKUP}"
    assert shown(unsaid, None)["told"].endswith(". The documentation does not seem to cover the question. The user says: no")
    assert shown(unsaid, None)["locked"].startswith("No pair can be made of it: its user did not agree")
    assert [is_wanted(row, None, Wanted(stage="feedback", review="undecided")) for row in (wrong, unsaid)] == [True, False]
    assert not is_wanted(ROW[PORT.id], None, Wanted(stage="feedback"))


def test_a_correction_becomes_a_candidate_of_the_next_run_with_the_evidence_its_reviewer_gave(tmp_path: Path) -> None:
    path = tmp_path / "review.jsonl"
    (row,) = rows_of([], [], {"c2": PORTS}, [WRONG])
    right = Said("edit", version_of(row, None), "Which port is it on?", "It runs in a pipeline.", "Docsmith is\na pipeline.")
    now = decide(path, row, right, [INSTALL, PORTS])
    assert now is not None and (now.chunk_id, now.quote, now.question, now.answer) == (
        "c1",
        "Docsmith is\na pipeline.",
        WRONG.question,
        WRONG.answer,
    )
    assert shown(row, now)["quote"] == now.quote
    reviewed = with_decisions([], read_decisions(path), {"c1": INSTALL, "c2": PORTS})
    (candidate,) = reviewed.candidates
    assert (candidate.chunk_id, candidate.answer, candidate.id in reviewed.accepted) == ("c1", "It runs in a pipeline.", True)


@pytest.mark.parametrize(
    ("verdict", "quote", "line"),
    [
        ("accept", PORT_QUOTE, "rated this answer down: edit it into the right one, or reject it"),
        ("edit", "The server listens on port 1.", "must stand in the documentation word for word"),
        ("edit", " ", "must stand in the documentation word for word"),
    ],
)
def test_a_wrong_answer_is_not_accepted_and_a_correction_needs_evidence(
    tmp_path: Path, verdict: Any, quote: str, line: str
) -> None:
    (row,) = rows_of([], [], {"c2": PORTS}, [WRONG])
    with pytest.raises(Refused, match=line):
        decide(tmp_path / "review.jsonl", row, Said(verdict, version_of(row, None), "Which?", "5000.", quote), [INSTALL, PORTS])
    assert not (tmp_path / "review.jsonl").exists()


def test_a_rejected_answer_trains_nothing_also_where_no_place_was_found(tmp_path: Path) -> None:
    path = tmp_path / "review.jsonl"
    (row,) = rows_of([], [], {}, [evolve(WRONG, chunk_id="", quote="")])
    decide(path, row, Said("reject", version_of(row, None)))
    assert [one.verdict for one in read_decisions(path)] == ["reject"]
    assert with_decisions([], read_decisions(path), {"c2": PORTS}).candidates == []


# ---- the server


@contextlib.contextmanager
def reviewing(project: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A `review` process in `project`, and the address that it prints."""
    command = [sys.executable, "-m", "stages.review"]
    process = subprocess.Popen(command, cwd=project, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("review: http://127.0.0.1:") and line.endswith(" undecided pairs and rows (Ctrl-C stops)\n")
        yield process, line.split()[1]
    finally:
        process.kill()
        process.wait()


def write_project(folder: Path, port: int = 0) -> None:
    write_records(folder / "data/chunks.jsonl", [INSTALL, PORTS])
    write_records(folder / "data/pairs.jsonl", [SETUP, PORT, HOSTILE])
    write_records(folder / "data/rejected.jsonl", [FAR, SECRET])
    (folder / "params.yaml").write_text(f"review: {{host: 127.0.0.1, port: {port}}}\n", encoding="utf-8")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    project = tmp_path_factory.mktemp("project")
    write_project(project)
    with reviewing(project) as (_process, address):
        yield project, address


@pytest.fixture
def project(running: tuple[Path, str]) -> Path:
    """The folder of the running server, as it was at first."""
    write_project(running[0])
    (running[0] / "data/review.jsonl").unlink(missing_ok=True)
    (running[0] / "data/feedback.jsonl").unlink(missing_ok=True)
    return running[0]


@pytest.fixture
def address(project: Path, running: tuple[Path, str]) -> str:
    return running[1]


def post(address: str, row_id: str, body: object, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    own = {"Content-Type": "application/json", "Origin": address}
    return httpx.post(f"{address}/rows/{row_id}", content=content, headers={**own, **headers})


def body_of(record: Pair | Rejected, verdict: str = "accept", **texts: str) -> dict[str, str]:
    return {"verdict": verdict, "version": version_of(ROW[record.id], None), **texts}


def verdicts(project: Path) -> dict[str, str]:
    """Question as generated -> verdict on disk."""
    path = project / "data/review.jsonl"
    return {one.question: one.verdict for one in read_records(path, Decision)} if path.exists() else {}


def test_a_decision_is_on_disk_before_the_reply_and_counted(address: str, project: Path) -> None:
    reply = post(address, SETUP.id, body_of(SETUP, note="good"))
    assert reply.status_code == 200
    assert reply.json()["counts"] == {"decided": 1, "undecided": 3, "locked": 1, "absent": 0}
    assert (reply.json()["row"]["verdict"], reply.json()["row"]["note"]) == ("accept", "good")
    assert verdicts(project) == {SETUP.question: "accept"}


def test_rows_come_fifty_at_a_time_and_go_on_where_decisions_took_some_away(address: str, project: Path) -> None:
    many = [pair(INSTALL, f"Question number {number}?", SETUP.answer, SETUP_QUOTE, number / 200) for number in range(120)]
    write_records(project / "data/pairs.jsonl", many)
    asked = f"{address}/rows?review=undecided&stage=accepted&sort=lowest"
    first = httpx.get(asked).json()
    assert (first["total"], [row["question"] for row in first["rows"]]) == (120, [f"Question number {n}?" for n in range(50)])
    for row in first["rows"][40:]:
        assert post(address, row["id"], {"verdict": "accept", "version": row["version"]}).status_code == 200
    second = httpx.get(f"{asked}&after={first['rows'][-1]['id']}").json()
    assert (second["total"], [row["question"] for row in second["rows"]]) == (
        110,
        [f"Question number {n}?" for n in range(50, 100)],
    )
    assert httpx.get(f"{asked}&after=nowhere").status_code == 404


def test_filters_list_the_rules_with_counts_and_the_sections(address: str) -> None:
    rules = {"round-trip-too-far": 1, "holds-personal-data": 1, "question-too-short": 1, "holds-secret": 1}
    sections = ["guide.md › Guide › Install", "serving.md › Serving › Ports"]
    assert httpx.get(f"{address}/filters").json() == {"rules": rules, "sections": sections}


def test_two_servers_on_one_folder_lose_no_decision(address: str, project: Path) -> None:
    many = [pair(INSTALL, f"Question number {number}?", SETUP.answer, SETUP_QUOTE, 0.5) for number in range(40)]
    write_records(project / "data/pairs.jsonl", many)
    with reviewing(project) as (_process, other), ThreadPoolExecutor(8) as pool:
        shown_rows = httpx.get(f"{address}/rows?stage=accepted").json()["rows"]

        def accept(number: int) -> int:
            row = shown_rows[number]
            return post((address, other)[number % 2], row["id"], {"verdict": "accept", "version": row["version"]}).status_code

        assert list(pool.map(accept, range(40))) == [200] * 40
    assert len(verdicts(project)) == 40


def test_a_row_decided_or_changed_since_it_was_shown_gets_409_with_the_row_as_it_is(address: str, project: Path) -> None:
    assert post(address, SETUP.id, body_of(SETUP, "reject")).status_code == 200
    reply = post(address, SETUP.id, body_of(SETUP, "accept"))
    assert (reply.status_code, reply.json()["row"]["verdict"]) == (409, "reject")
    assert reply.json()["detail"] == "This pair has changed since the page showed it. Look again and decide again."
    write_records(project / "data/pairs.jsonl", [SETUP, evolve(PORT, flags=()), HOSTILE])
    assert post(address, PORT.id, body_of(PORT)).status_code == 409
    assert verdicts(project) == {SETUP.question: "reject"}


@pytest.mark.parametrize(
    ("row_id", "body", "headers", "status"),
    [
        ("0000000000000000", body_of(SETUP), {}, 404),
        ("..%2f..%2freview", body_of(SETUP), {}, 404),
        (SECRET.id, body_of(SECRET), {}, 422),
        (SETUP.id, body_of(SETUP), {"Content-Type": "text/plain"}, 415),
        (SETUP.id, body_of(SETUP), {"Origin": "http://other.example"}, 403),
        (SETUP.id, body_of(SETUP), {"Origin": "null"}, 403),
        (SETUP.id, body_of(SETUP), {"Host": "other.example"}, 403),
        (SETUP.id, body_of(SETUP, note="x" * MAX_BODY_BYTES), {}, 413),
        (SETUP.id, b"accept", {}, 400),
        (SETUP.id, b'{"verdict": "\xff"}', {}, 400),
        (SETUP.id, body_of(SETUP, "maybe"), {}, 400),
        (SETUP.id, body_of(SETUP, path="/etc/passwd"), {}, 400),
    ],
)
def test_a_request_that_is_not_a_decision_of_its_own_page_is_refused(
    address: str, project: Path, row_id: str, body: object, headers: dict[str, str], status: int
) -> None:
    reply = post(address, row_id, body, **headers)
    assert reply.status_code == status
    assert "\n" not in reply.json()["detail"]
    assert verdicts(project) == {}


def test_a_post_that_names_no_origin_is_refused(address: str) -> None:
    assert httpx.post(f"{address}/rows/{SETUP.id}", json=body_of(SETUP)).status_code == 403


def test_another_name_for_the_server_is_refused_and_no_other_site_may_read(address: str) -> None:
    assert httpx.get(address, headers={"Host": "other.example"}).status_code == 403
    assert httpx.get(f"{address}/rows", headers={"Origin": "http://other.example"}).status_code == 403
    port = address.rpartition(":")[2]
    reply = httpx.get(f"{address}/rows", headers={"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"})
    assert reply.status_code == 200
    assert not [name for name in reply.headers if name.startswith("access-control-")]
    assert [httpx.get(f"{address}{path}").status_code for path in ("/docs", "/redoc", "/openapi.json")] == [404, 404, 404]


def test_the_page_allows_its_own_script_and_style_only(address: str) -> None:
    first, second = httpx.get(address), httpx.get(address)
    policy = first.headers["Content-Security-Policy"]
    nonce = policy.partition("script-src 'nonce-")[2].partition("'")[0]
    assert len(nonce) >= 20 and first.text.count(f'nonce="{nonce}"') == 2 and nonce not in second.text
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "frame-ancestors 'none'" in policy


def test_files_that_dvc_repro_is_replacing_and_a_damaged_line_are_named_and_nothing_is_lost(address: str, project: Path) -> None:
    (project / "data/pairs.jsonl").unlink()
    reply = httpx.get(f"{address}/rows")
    assert (reply.status_code, reply.json()["detail"].split(". ")[0]) == (503, "data/pairs.jsonl: No such file or directory")
    write_project(project)
    (project / "data/review.jsonl").write_text("<<<<<<< HEAD\n", encoding="utf-8")
    reply = post(address, SETUP.id, body_of(SETUP))
    assert reply.status_code == 503 and reply.json()["detail"].startswith("data/review.jsonl:1: not a Decision")
    assert (project / "data/review.jsonl").read_text(encoding="utf-8") == "<<<<<<< HEAD\n"


def refusal(project: Path) -> str:
    """What `review` prints when it refuses to start in `project`."""
    command = [sys.executable, "-m", "stages.review"]
    done = subprocess.run(command, check=False, cwd=project, env=ENVIRONMENT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    return done.stderr


def test_a_damaged_file_of_decisions_stops_the_start_with_one_line_and_stays(tmp_path: Path) -> None:
    write_project(tmp_path)
    (tmp_path / "data/review.jsonl").write_text('{"id": "x"}\n', encoding="utf-8")
    assert refusal(tmp_path).startswith("review: data/review.jsonl:1: not a Decision: ")
    assert (tmp_path / "data/review.jsonl").read_text(encoding="utf-8") == '{"id": "x"}\n'


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        write_project(tmp_path, port)
        expected = f"review: params.yaml: cannot listen on review.host 127.0.0.1, review.port {port}: Address already in use\n"
        assert refusal(tmp_path) == expected


def test_ctrl_c_ends_it_and_says_what_is_next(tmp_path: Path) -> None:
    write_project(tmp_path)
    with reviewing(tmp_path) as (process, address):
        assert post(address, SETUP.id, body_of(SETUP)).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert process.stdout is not None
        assert process.stdout.read() == "review: stopped; data/review.jsonl holds 1 decisions. Apply them with: dvc repro\n"


# ---- the page, in Chromium


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page with all five rows; fails the test for a request elsewhere, a script error or a breach of the policy."""
    asked: list[str] = []
    faults: list[str] = []
    with contextlib.closing(browser.new_context(viewport={"width": 1280, "height": 800})) as context:
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if "Content Security Policy" in message.text else None)
        page.goto(f"{address}/?review=")
        expect(lines(page)).to_have_count(5)
        yield page
    assert faults == []
    assert asked and not [url for url in asked if not url.startswith(f"{address}/")]


def lines(page: Page) -> Any:
    return page.locator("#rows li")


def choose(page: Page, record: Pair | Rejected | Complaint) -> None:
    lines(page).filter(has_text=record.question).get_by_role("button").click()
    expect(page.locator("#question")).to_have_text(record.question)


def action(page: Page, name: str) -> Any:
    return page.get_by_role("group", name="Decision").get_by_role("button", name=name)


def said_by(page: Page) -> Any:
    return page.get_by_role("status")


def test_a_pair_is_accepted_beside_its_source_and_the_next_one_is_shown(page: Page, project: Path) -> None:
    choose(page, SETUP)
    expect(page.locator("mark")).to_have_text("Run `make setup` to install the packages.")
    expect(page.locator("#section")).to_have_text("guide.md › Guide › Install")
    page.get_by_role("textbox", name="Note").fill("checked")
    action(page, "Accept").click()
    expect(said_by(page)).to_have_text(f"Saved: accepted: {SETUP.question}")
    assert read_decisions(project / "data/review.jsonl") == [decision_of(SETUP, note="checked")]
    expect(page.locator("#question")).to_have_text(HOSTILE.question)
    expect(page.locator("#counts")).to_have_text("1 decided, 3 left")
    expect(page.locator("#foot")).to_contain_text("The next dvc repro applies the decisions: 1 decided, 3 undecided")


def test_a_pair_is_edited_in_place_and_both_texts_are_kept(page: Page, project: Path) -> None:
    choose(page, PORT)
    action(page, "Edit").click()
    page.get_by_role("textbox", name="Question").fill("Which port is served?")
    page.get_by_role("textbox", name="Answer").fill("It is port 5000.")
    page.get_by_role("button", name="Save").click()
    expect(said_by(page)).to_have_text("Saved: edited: Which port is served?")
    edit = decision_of(PORT, "edit", edited_question="Which port is served?", edited_answer="It is port 5000.")
    assert read_decisions(project / "data/review.jsonl") == [edit]
    lines(page).filter(has_text="Which port is served?").get_by_role("button").click()
    expect(page.locator("#generated")).to_have_text(f"As generated:{PORT.question}{PORT.answer}")


def test_a_rejection_survives_a_reload_and_is_undone(page: Page, project: Path) -> None:
    choose(page, PORT)
    action(page, "Reject").click()
    expect(said_by(page)).to_have_text(f"Saved: rejected: {PORT.question}")
    page.reload()
    expect(lines(page).filter(has_text=PORT.question)).to_contain_text("rejected by a reviewer")
    assert verdicts(project) == {PORT.question: "reject"}
    choose(page, PORT)
    action(page, "Undo").click()
    expect(said_by(page)).to_have_text(f"Saved: undone: {PORT.question}")
    expect(action(page, "Undo")).to_be_hidden()
    assert verdicts(project) == {}


def test_a_rejected_row_that_can_be_waived_is_accepted_and_a_secret_is_not_offered(page: Page, project: Path) -> None:
    choose(page, FAR)
    expect(page.locator("#rules")).to_have_text("Broke: round-trip-too-far")
    action(page, "Accept").click()
    expect(said_by(page)).to_have_text(f"Saved: accepted: {FAR.question}")
    choose(page, SECRET)
    expect(page.locator("#locked")).to_contain_text("a reviewer cannot waive what it broke (question-too-short, holds-secret)")
    for name in ("Accept", "Edit", "Reject"):
        expect(action(page, name)).to_be_hidden()
    page.keyboard.press("a")
    page.keyboard.press("k")
    expect(page.locator("#question")).to_have_text(PORT.question)
    assert verdicts(project) == {FAR.question: "accept"}


@pytest.mark.parametrize(
    ("role", "label", "value", "found"),
    [
        ("combobox", "Rules say", "rejected", [FAR, SECRET]),
        ("combobox", "Rule", "holds-personal-data", [PORT]),
        ("combobox", "Section", "serving.md", [HOSTILE, PORT, SECRET]),
        ("spinbutton", "Score from", "0.55", [SETUP, PORT]),
        ("spinbutton", "Score to", "0.45", [FAR, SECRET]),
        ("searchbox", "Search", "install the pack", [SETUP]),
        ("searchbox", "Search", "no such words", []),
        ("combobox", "Order", "lowest", [FAR, SECRET, HOSTILE, PORT, SETUP]),
    ],
)
def test_a_filter_narrows_the_list_and_is_there_after_a_reload(
    page: Page, role: Any, label: str, value: str, found: list[Any]
) -> None:
    field = page.get_by_role(role, name=label, exact=True)
    field.select_option(value) if field.evaluate("field => field.tagName") == "SELECT" else field.fill(value)
    texts = [record.question for record in found]
    expect(lines(page).locator("b")).to_have_text(texts)
    expect(page.get_by_text("No pair fits these filters.")).to_be_visible(visible=not found)
    page.reload()
    expect(field).to_have_value(value)
    expect(lines(page).locator("b")).to_have_text(texts)


def test_what_a_user_rated_down_is_corrected_with_evidence(page: Page, project: Path) -> None:
    write_records(project / "data/feedback.jsonl", [WRONG, UNSAID])
    page.get_by_role("combobox", name="Rules say").select_option("feedback")
    expect(lines(page)).to_have_count(2)
    choose(page, WRONG)
    expect(page.locator("#told")).to_have_text(rows_of([], [], {}, [WRONG])[0].told)
    expect(page.locator("mark")).to_have_text(PORT_QUOTE)
    expect(action(page, "Accept")).to_be_hidden()
    page.keyboard.press("a")
    action(page, "Edit").click()
    page.get_by_role("textbox", name="Answer").fill("It is on port 5000.")
    page.get_by_role("textbox", name="Evidence").fill("The server listens on port 1.")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("word for word")
    page.get_by_role("textbox", name="Evidence").fill(PORT_QUOTE)
    page.keyboard.press("Control+Enter")
    expect(said_by(page)).to_have_text("Saved: edited: Which port is it on?")
    (decision,) = read_decisions(project / "data/review.jsonl")
    assert (decision.edited_answer, decision.quote, decision.chunk_id) == ("It is on port 5000.", PORT_QUOTE, "c2")
    page.get_by_role("combobox", name="Rules say").select_option("")
    choose(page, SETUP)
    page.keyboard.press("e")
    expect(page.get_by_role("textbox", name="Evidence")).to_be_hidden()


def test_the_page_opens_on_what_is_undecided(page: Page, address: str) -> None:
    assert post(address, FAR.id, body_of(FAR)).status_code == 200
    page.goto(address)
    expect(lines(page).locator("b")).to_have_text([record.question for record in (SETUP, HOSTILE, PORT)])


def test_the_keyboard_does_everything(page: Page, project: Path) -> None:
    question = page.locator("#question")
    expect(question).to_have_text(FAR.question)
    page.keyboard.type("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.keyboard.type("jjkra")  # reject the second row, accept the third: each key waits for the one before
    expect(said_by(page)).to_have_text(f"Saved: accepted: {HOSTILE.question}")
    assert verdicts(project) == {SETUP.question: "reject", HOSTILE.question: "accept"}
    expect(question).to_have_text(PORT.question)
    page.keyboard.press("u")  # nothing to undo here: the last decision, wherever it is
    expect(question).to_have_text(HOSTILE.question)
    expect(said_by(page)).to_have_text(f"Saved: undone: {HOSTILE.question}")
    page.keyboard.press("ArrowDown")
    expect(question).to_have_text(PORT.question)
    page.keyboard.press("e")
    expect(page.get_by_role("textbox", name="Question")).to_be_focused()
    page.keyboard.type("rejected, ")  # letters are text here
    page.keyboard.press("Escape")
    expect(page.get_by_role("textbox", name="Question")).to_be_hidden()
    page.keyboard.press("e")
    expect(page.get_by_role("textbox", name="Question")).to_have_value(PORT.question)
    page.keyboard.press("Control+A")
    page.keyboard.type("Which port is it?")
    page.keyboard.press("Control+Enter")
    expect(said_by(page)).to_have_text("Saved: edited: Which port is it?")
    page.keyboard.press("k")
    page.keyboard.press("n")
    page.keyboard.type("to be looked at")
    page.keyboard.press("Enter")  # the note is on an edit, whose texts stay
    expect(page.get_by_role("textbox", name="Note")).not_to_be_focused()
    page.keyboard.type("/make setup")
    expect(lines(page).locator("b")).to_have_text([SETUP.question])
    page.keyboard.press("Enter")
    page.keyboard.press("u")
    expect(said_by(page)).to_have_text(f"Saved: undone: {SETUP.question}")
    edit = decision_of(PORT, "edit", edited_question="Which port is it?", edited_answer=PORT.answer, note="to be looked at")
    assert read_decisions(project / "data/review.jsonl") == [edit]


def test_what_is_typed_while_a_save_takes_its_time_decides_about_nothing_else(page: Page, project: Path) -> None:
    page.evaluate("""() => {
        const real = fetch;
        window.fetch = async (...given) => { await new Promise(done => setTimeout(done, 300)); return real(...given); };
    }""")
    page.keyboard.type("aerr")  # accept the first, edit the second; the rest would be text if the form were there already
    expect(page.get_by_role("textbox", name="Question")).to_have_value(SETUP.question)
    page.keyboard.press("Escape")
    page.keyboard.type("a/err")  # the last three are searched for
    expect(page.get_by_role("searchbox")).to_have_value("err")
    expect(said_by(page)).to_have_text(f"Saved: accepted: {SETUP.question}")
    expect(page.get_by_role("searchbox")).to_be_focused()
    assert verdicts(project) == {FAR.question: "accept", SETUP.question: "accept"}


def test_markup_in_a_pair_and_its_source_is_seen_as_text(page: Page) -> None:
    choose(page, HOSTILE)
    expect(page.locator("#answer")).to_have_text(HOSTILE.answer)
    expect(page.locator("mark")).to_have_text(HOSTILE.quote)
    expect(lines(page).nth(2)).to_contain_text(MARKUP)
    action(page, "Edit").click()
    expect(page.get_by_role("textbox", name="Answer")).to_have_value(HOSTILE.answer)
    assert page.locator("img").count() == 0
    assert page.title() == "Docsmith: review"


def test_a_script_that_gets_into_the_page_does_not_run(browser: Browser, address: str) -> None:
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        page.goto(address)
        page.evaluate("""() => {
            document.body.insertAdjacentHTML("beforeend", `<img src=x onerror="document.title = 'taken over'">`);
            const script = document.createElement("script");
            script.setAttribute("src", "/rows");
            document.body.append(script);
        }""")
        page.wait_for_timeout(200)
        assert page.title() == "Docsmith: review"


def test_a_pair_decided_in_another_tab_is_shown_as_it_is_now_and_not_overwritten(page: Page, address: str, project: Path) -> None:
    choose(page, SETUP)
    assert post(address, SETUP.id, body_of(SETUP, "reject")).status_code == 200
    page.keyboard.press("a")
    expect(page.get_by_role("alert")).to_have_text("This pair has changed since the page showed it. Look again and decide again.")
    expect(page.locator("#tags")).to_contain_text("rejected by a reviewer")
    assert verdicts(project) == {SETUP.question: "reject"}
    page.keyboard.press("a")
    expect(said_by(page)).to_have_text(f"Saved: accepted: {SETUP.question}")
    assert verdicts(project) == {SETUP.question: "accept"}


def test_an_edit_in_work_is_not_lost_to_a_reload_or_a_change_elsewhere(page: Page, address: str, project: Path) -> None:
    asked: list[str] = []

    def stay(dialog: Dialog) -> None:
        asked.append(dialog.type)
        dialog.dismiss()

    page.on("dialog", stay)
    choose(page, SETUP)
    page.keyboard.press("e")
    page.get_by_role("textbox", name="Answer").fill("Run make setup.")
    page.evaluate("() => { location.reload(); }")
    page.wait_for_timeout(200)
    assert asked == ["beforeunload"]
    assert post(address, SETUP.id, body_of(SETUP, "reject")).status_code == 200
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("has changed since the page showed it")
    expect(page.get_by_role("textbox", name="Answer")).to_have_value("Run make setup.")
    page.keyboard.press("Control+Enter")
    expect(said_by(page)).to_have_text(f"Saved: edited: {SETUP.question}")
    assert verdicts(project) == {SETUP.question: "edit"}


def test_a_stopped_server_is_told_and_a_restart_has_every_decision(browser: Browser, tmp_path: Path) -> None:
    write_project(tmp_path)
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        with reviewing(tmp_path) as (_process, address):
            page.goto(f"{address}/?review=")
            choose(page, SETUP)
            page.keyboard.press("a")
            expect(said_by(page)).to_have_text(f"Saved: accepted: {SETUP.question}")
        page.keyboard.press("a")
        alert = page.get_by_role("alert")
        expect(alert).to_have_text("The server does not answer; nothing was saved. Start it again with: make review")
        with reviewing(tmp_path) as (_process, address):
            page.goto(f"{address}/?review=decided")
            expect(lines(page).locator("b")).to_have_text([SETUP.question])
            expect(page.locator("#counts")).to_have_text("1 decided, 3 left")


def test_a_long_list_is_loaded_as_it_is_scrolled_and_walked(browser: Browser, address: str, project: Path) -> None:
    many = [pair(INSTALL, f"Question number {number:03}?", SETUP.answer, SETUP_QUOTE, number / 200) for number in range(180)]
    write_records(project / "data/pairs.jsonl", many)
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        page.goto(f"{address}/?stage=accepted&sort=lowest")
        expect(lines(page)).to_have_count(50)
        page.locator("#list").evaluate("list => { list.scrollTop = list.scrollHeight; }")
        expect(lines(page)).to_have_count(100)
        lines(page).nth(99).get_by_role("button").click()
        page.keyboard.press("j")
        expect(page.locator("#question")).to_have_text("Question number 100?")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_cut_off_and_texts_stand_out_from_their_ground(
    browser: Browser, address: str, width: int, scheme: Any
) -> None:
    with contextlib.closing(browser.new_context(viewport={"width": width, "height": 700}, color_scheme=scheme)) as context:
        page = context.new_page()
        page.goto(f"{address}/?review=")
        choose(page, HOSTILE)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        for name in ("Accept", "Edit", "Reject"):
            expect(action(page, name)).to_be_in_viewport()
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 20
        assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}  # WCAG 2.2, 1.4.3
        if width == 400:
            action(page, "Accept").click()
            expect(said_by(page)).to_have_text(f"Saved: accepted: {HOSTILE.question}")


def test_every_field_and_button_has_a_name_and_changes_are_announced(page: Page) -> None:
    choose(page, PORT)
    page.keyboard.press("e")
    nameless = """() => [...document.querySelectorAll("input, select, textarea, button, progress")]
        .filter(one => !(one.getAttribute("aria-label") || (one.labels?.[0] ?? one).textContent.trim())).map(one => one.outerHTML)"""
    assert page.evaluate(nameless) == []
    assert page.evaluate("() => document.querySelectorAll('input, select, textarea, button').length") >= 20
    ids = page.evaluate("() => [...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids)) > 20
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1, main, nav, header, footer").count() == 5
    page.keyboard.press("Escape")
    current = page.locator("[aria-current=true]")
    expect(current).to_have_count(1)
    expect(current).to_be_focused()
    outline = current.evaluate("button => getComputedStyle(button).outlineStyle")
    assert outline == "solid"
