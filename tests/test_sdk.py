"""sdk: pairs reach synthetic-data-kit's own command unchanged, and its files come back with evidence or a reason."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MODELS

from stages.program import BadInput
from stages.records import Chunk, Curated, Pair, content_id, read_records, write_records
from stages.sdk import entries_in, main, type_of

PORT = {"question": "Which port does the server use?", "answer": "The server uses port `5000`."}
LIMIT = {"question": "How many questions are answered at once?", "answer": "Four, and 32 more\n\nwait in a “queue”."}
PARIS = {"question": "What is the capital of France?", "answer": "Paris."}
TEXT = "# Server\n\nThe server listens on port 5000. The server answers\nfour questions at once."


def pair(id: str, entry: dict[str, str]) -> Pair:
    return Pair(
        id=id,
        chunk_id="c",
        fact_id="f",
        section_id="s",
        document_id="d",
        path="server.md",
        heading_path=("Server",),
        question=entry["question"],
        answer=entry["answer"],
        quote="The server listens on port 5000.",
        quote_start=0,
        quote_end=32,
        type="factual",
        model="m",
        similarity=0.9,
        wording=1,
        cluster=id,
        flags=(),
        reviewed=False,
    )


def chunk_file(folder: Path) -> Path:
    chunk = Chunk(
        id="c",
        document_id="d",
        section_id="s",
        path="server.md",
        heading_path=("Server",),
        start=0,
        end=len(TEXT),
        text=TEXT,
    )
    write_records(folder / "chunks.jsonl", [chunk])
    return folder / "chunks.jsonl"


def chat(entry: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": entry["question"]}, {"role": "assistant", "content": entry["answer"]}]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_records(folder / "pairs.jsonl", [pair("a", PORT), pair("b", LIMIT)])
    main("export", folder / "pairs.jsonl", folder / "curated.json", models=MODELS)
    return folder / "curated.json"


@pytest.mark.parametrize("form", ["jsonl", "alpaca", "ft", "chatml"])
def test_the_kits_save_as_reads_what_is_exported(form: str, exported: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    kit = str(Path(sys.executable).with_name("synthetic-data-kit"))
    subprocess.run([kit, "save-as", str(exported), "--format", form, "--output", str(target)], check=True, capture_output=True)
    text = target.read_text(encoding="utf-8")  # the kit's exit code is 0 after an error too
    rows: list[Any] = [json.loads(line) for line in text.splitlines()] if form in ("jsonl", "chatml") else json.loads(text)
    if form == "alpaca":
        rows = [{"question": row["instruction"], "answer": row["output"]} for row in rows]
    elif form in ("ft", "chatml"):
        rows = entries_in({"conversations": [row["messages"] for row in rows]})
    assert rows == [PORT, LIMIT]


def test_an_export_says_how_many_and_one_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, target = tmp_path / "pairs.jsonl", tmp_path / "new" / "kit.json"
    write_records(pairs, [pair("a", PORT)])
    main("export", pairs, target, models=MODELS)
    assert capsys.readouterr().out.startswith(f"export: 1 pairs in {target}. Next: synthetic-data-kit save-as ")
    assert json.loads(target.read_bytes()).keys() == {"summary", "qa_pairs", "conversations"}
    write_records(pairs, [])
    with pytest.raises(BadInput, match="holds no pair"):
        main("export", pairs, target, models=MODELS)


@pytest.mark.parametrize(
    "content",
    [
        {"summary": "About ports.", "qa_pairs": [PORT, LIMIT]},
        {"qa_pairs": [PORT, LIMIT], "conversations": [chat(PARIS)]},
        {"filtered_pairs": [PORT, LIMIT]},
        {"conversations": [[{"role": "system", "content": "Be brief."}, *chat(PORT)], chat(LIMIT)]},
        {"conversations": [chat(PORT) + chat(LIMIT)]},
        [PORT, LIMIT],
    ],
)
def test_every_form_of_the_kits_files_gives_its_entries(content: Any) -> None:
    assert entries_in(content) == [PORT, LIMIT]


def test_a_conversation_without_an_answer_is_still_counted() -> None:
    assert entries_in({"conversations": [chat(PORT)[:1], chat(LIMIT), 7]}) == [chat(PORT)[:1], LIMIT, 7]


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("How do I start the server?", "procedural"),
        ("How can a port be changed?", "procedural"),
        ("What are the steps to export a model?", "procedural"),
        ("Why is the store kept apart?", "conceptual"),
        ("What is LoRA?", "conceptual"),
        ("What does rank 1 mean?", "conceptual"),
        ("What is the default port?", "factual"),
        ("How many questions are answered at once?", "factual"),
    ],
)
def test_the_type_follows_the_wording_of_the_question(question: str, kind: str) -> None:
    assert type_of(question) == kind


def test_what_the_chunks_say_is_added_once_and_the_rest_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chunks, curated, source = chunk_file(tmp_path), tmp_path / "curated.jsonl", tmp_path / "server_qa_pairs.json"
    older = Curated(id="old", question="Q?", answer="A.", quote="A.", type="factual", origin="by hand")
    write_records(curated, [older])
    twice = {"question": f" {PORT['question'].replace(' ', '  ')}", "answer": f"{PORT['answer']}\n"}
    source.write_text(json.dumps({"qa_pairs": [PORT | {"rating": 8.5}, PARIS, twice, {"question": "Which host?"}]}))

    main("import", source, curated, chunks, models=MODELS)
    id = content_id(PORT["question"], PORT["answer"])
    quote = "The server listens on port 5000."
    added = Curated(id=id, **PORT, quote=quote, type="factual", origin="server_qa_pairs.json")  # type: ignore[arg-type]
    assert read_records(curated, Curated) == [added, older]
    assert capsys.readouterr().out.splitlines() == [
        "import: entry 4 is malformed: Object missing required field `answer`",
        f"import: nothing in {chunks} says: 'Paris.'",
        "import: 4 pairs = 1 added + 1 known + 1 without evidence + 1 malformed",
    ]

    before = curated.read_bytes()
    main("import", source, curated, chunks, models=MODELS)
    assert curated.read_bytes() == before
    assert capsys.readouterr().out.endswith("import: 4 pairs = 0 added + 2 known + 1 without evidence + 1 malformed\n")


def test_an_import_into_a_file_that_is_not_there_makes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kit.json").write_text(json.dumps([PORT]))
    main("import", tmp_path / "kit.json", tmp_path / "new" / "curated.jsonl", chunk_file(tmp_path), models=MODELS)
    assert capsys.readouterr().out == "import: 1 pairs = 1 added + 0 known + 0 without evidence\n"
    assert len(read_records(tmp_path / "new" / "curated.jsonl", Curated)) == 1


@pytest.mark.parametrize("content", [b"", b'{"qa_pairs": [', b'{"rows": []}', b'{"qa_pairs": 3}', b'"text"', b"\xff"])
def test_a_file_that_is_not_the_kits_is_refused_and_nothing_is_written(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "kit.json").write_bytes(content)
    with pytest.raises(BadInput, match="is no file of synthetic-data-kit's") as raised:
        main("import", tmp_path / "kit.json", tmp_path / "curated.jsonl", tmp_path / "chunks.jsonl", models=MODELS)
    assert "\n" not in str(raised.value) and not (tmp_path / "curated.jsonl").exists()


def test_another_word_than_export_or_import_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="exprot is neither export nor import"):
        main("exprot", tmp_path / "a", tmp_path / "b", models=MODELS)
