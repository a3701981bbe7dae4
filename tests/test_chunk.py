"""chunk: pieces that join to the document again, cut at headings, within the budget, with ids that stay."""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from semantic_text_splitter import MarkdownSplitter

from stages.chunk import Params, cut_document, fences_of, main, prose_chars, sections_of, unwrapped
from stages.models import load_tokenizer
from stages.params import Models
from stages.program import BadInput
from stages.records import Chunk, Document, content_id, read_records, write_records

PORT = "The server listens on port 5000 of this machine alone, and another port is set in the file params.yaml."
TRAIN = "Training takes ten minutes on two cores. It writes an adapter, and a curve of the loss beside it."
GUIDE = f"""Before any heading.

# Guide

{PORT}

## Set up *now* with `make`

{TRAIN}

```bash
# this is a comment of the shell
## and another
make demo
```

## Use

### In a shell

{PORT} That is all there is to say.

Title by underline
==================

> # a heading inside a quote
"""
Run = Callable[..., list[Chunk]]


def document(text: str, path: str = "guide.md") -> Document:
    return Document(id=content_id(text), source="docs", path=path, sha256="0", revision="", title="Guide", text=text)


def cut(text: str, max_tokens: int = 40) -> list[Chunk]:
    """Cut with characters as tokens."""
    return cut_document(document(text), MarkdownSplitter(max_tokens, trim=False))


@pytest.fixture
def run(base_folder: Path, tmp_path: Path) -> Run:
    """chunk's main with the real tokenizer on documents given as path -> text; tmp_path/metrics.json holds its counts."""

    def chunked(texts: dict[str, str], max_tokens: int = 64, min_prose_chars: int = 20) -> list[Chunk]:
        write_records(tmp_path / "documents.jsonl", [document(text, path) for path, text in texts.items()])
        paths = [tmp_path / name for name in ("documents.jsonl", "chunks.jsonl", "metrics.json")]
        main(*paths, chunk=Params(max_tokens, min_prose_chars), models=Models(base=str(base_folder), teacher="", embedder=""))
        return read_records(tmp_path / "chunks.jsonl", Chunk)

    return chunked


@pytest.mark.parametrize(
    "text", [GUIDE, PORT, "", "\n", "# Only\n", "é" * 200 + " x\n\n" + "word " * 90, "- a\n  - b\n\n\n| a |\n|---|\n| b |"]
)
@pytest.mark.parametrize("max_tokens", [16, 40, 4000])
def test_the_pieces_joined_are_the_document_and_lie_where_they_say(text: str, max_tokens: int) -> None:
    pieces = cut(text, max_tokens)
    assert "".join(piece.text for piece in pieces) == text
    assert all(text[piece.start : piece.end] == piece.text for piece in pieces)
    assert all(len(unwrapped(piece.text).strip()) <= max_tokens for piece in pieces)


def test_heading_paths_nest_and_headings_in_code_and_quotes_do_not_count() -> None:
    sections = sections_of(GUIDE)
    assert [section.heading_path for section in sections] == [
        (),
        ("Guide",),
        ("Guide", "Set up now with make"),
        ("Guide", "Use"),
        ("Guide", "Use", "In a shell"),
        ("Title by underline",),
    ]
    assert [GUIDE[section.start :].split("\n")[0] for section in sections[1:]] == [
        "# Guide",
        "## Set up *now* with `make`",
        "## Use",
        "### In a shell",
        "Title by underline",
    ]
    assert "".join(GUIDE[section.start : section.end] for section in sections) == GUIDE


def test_a_heading_that_skips_a_level_still_leaves_the_deeper_ones_behind() -> None:
    titles = [section.heading_path for section in sections_of("# A\n### B\n## C\n#### D\n# E\n")]
    assert titles == [("A",), ("A", "B"), ("A", "C"), ("A", "C", "D"), ("E",)]


@pytest.mark.parametrize("mark", ["\f", "\v", "\x1c", "\x85", "\u2028", "\u2029", "\r", "\r\n", "\n"])
def test_a_section_begins_at_its_heading_whatever_marks_lie_before(mark: str) -> None:
    text = f"One{mark}two.{mark}Three.\n\n# A\n\nText.{mark}More.\n\n# B\n\nEnd.\n"
    sections = sections_of(text)
    assert [section.heading_path for section in sections] == [(), ("A",), ("B",)]
    assert [text[section.start :][:3] for section in sections] == ["One", "# A", "# B"]


def test_a_section_that_fits_stays_whole_and_a_longer_one_is_cut() -> None:
    text = f"# A\n\n{PORT}\n\n# B\n\n{TRAIN}\n"
    assert [piece.text for piece in cut(text, 120)] == [f"# A\n\n{PORT}\n\n", f"# B\n\n{TRAIN}\n"]
    assert len(cut(text, 60)) > 2


def test_prose_is_what_people_read() -> None:
    assert prose_chars("# A heading\n\nTwo words.\n") == 8
    assert (
        prose_chars("```\nmake demo\n```\n\n| a | b |\n|---|---|\n| c | d |\n\n    indented code\n") == 4
    )  # table cells a, b, c, d
    assert prose_chars("- one\n- two `code`\n") == 3 + 7


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("# Guide\n", "# Guide\n\nA new paragraph.\n", [("Guide",)]),
        ("Before any", "Long before any", [()]),
        ("## Use\n", "## New\n\nNew.\n\n## Use\n", []),
    ],
)
def test_a_new_paragraph_or_section_leaves_the_ids_of_other_sections_unchanged(
    old: str, new: str, changed: list[tuple[str, ...]]
) -> None:
    before, after = cut(GUIDE, 400), cut(GUIDE.replace(old, new), 400)
    ids = {piece.id for piece in after}
    assert [piece.heading_path for piece in before if piece.id not in ids] == changed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\n\n", "\n\n\n\n"),
        (".\n", ".  \t\n"),
        (PORT, PORT.replace(" of this", "\nof  this")),
        ("# this is a comment", "#  this is\ta comment"),
        ("## Set up *now*", "##  Set  up *now* "),
        ("\n", "\r\n"),
        ("of the shell", "of\u00a0the shell"),
        ("Title by underline", "Title\nby underline"),
    ],
)
def test_white_space_alone_changes_no_id(old: str, new: str) -> None:
    changed = GUIDE.replace(old, new)
    before, after = cut(GUIDE, 400), cut(changed, 400)
    assert changed != GUIDE and [piece.text for piece in before] != [piece.text for piece in after]
    assert [(piece.id, piece.section_id) for piece in before] == [(piece.id, piece.section_id) for piece in after]


@pytest.mark.parametrize("max_tokens", [30, 60, 120])
def test_a_long_section_is_cut_at_the_same_words_however_it_is_wrapped(max_tokens: int) -> None:
    paragraphs = [
        f"{PORT} {TRAIN}",
        TRAIN,
        "- an item that is long enough to be wrapped somewhere",
        "```\nmake\n  demo\n```",
        PORT,
    ]
    versions = []
    for wrap in (40, 70, 1000):
        lines = [
            one if one.startswith("`") else textwrap.fill(one, wrap, subsequent_indent="  " * one.startswith("-"))
            for one in paragraphs
        ]
        versions.append([piece.id for piece in cut("# Long\n\n" + "\n\n".join(lines) + "\n", max_tokens)])
    assert len(versions[0]) > 4 and versions[0] == versions[1] == versions[2]


def test_a_piece_that_begins_inside_a_code_block_says_so_and_its_code_is_no_prose() -> None:
    code = "".join(f"echo this is line {line} of the code\n" for line in range(9))
    text = f"# Code\n\nWords before.\n\n~~~~sh\n{code}~~~~\n\nWords behind.\n"
    assert [text[start:end] for start, end, _ in fences_of(text)] == [code + "~~~~\n"]
    pieces = cut(text, 120)
    inside = [piece for piece in pieces if piece.fence]
    assert len(inside) >= 2 and {piece.fence for piece in inside} == {"~~~~"}
    assert not any(piece.fence for piece in pieces if "Words before" in piece.text)
    assert sum(prose_chars(piece.markdown()) for piece in pieces) == len("Wordsbefore" + "Wordsbehind")


def test_without_a_heading_of_level_1_the_first_heading_is_the_title_of_the_page() -> None:
    paths = [section.heading_path for section in sections_of("## push\n\nSends.\n\n## Options\n\nNone.\n\n### More\n\nNo.\n")]
    assert paths == [("push",), ("push", "Options"), ("push", "Options", "More")]
    paths = [section.heading_path for section in sections_of("## push\n\nSends.\n\n# Options\n\nNone.\n")]
    assert paths == [("push",), ("Options",)]


def test_a_changed_word_or_heading_changes_the_id() -> None:
    before = cut(GUIDE, 400)
    for old, new in (("ten minutes", "tenminutes"), ("## Set up", "## Setup")):
        ids = {piece.id for piece in cut(GUIDE.replace(old, new), 400)}
        assert [piece.heading_path[1:] for piece in before if piece.id not in ids] == [("Set up now with make",)]


def test_a_section_that_moves_within_its_page_and_a_renamed_page_keep_their_ids() -> None:
    setup, use = f"## Set up\n\n{TRAIN}\n\n", f"## Use\n\n{PORT}\n\n"
    before = {piece.id for piece in cut(f"# Guide\n\n{setup}{use}", 200)}
    assert len(before) == 3 and {piece.id for piece in cut(f"# Guide\n\n{use}{setup}", 200)} == before
    renamed = cut_document(document(f"# Guide\n\n{setup}{use}", "manual.md"), MarkdownSplitter(200, trim=False))
    assert {piece.id for piece in renamed} == before


def test_a_new_page_leaves_the_ids_and_sections_of_others_unchanged(run: Run) -> None:
    before = {chunk.id: chunk.section_id for chunk in run({"guide.md": GUIDE})}
    after = {chunk.id: chunk.section_id for chunk in run({"a.md": f"# Zebra\n\n{TRAIN}\n", "guide.md": GUIDE})}
    assert len(before) == 3 and len(after) == 4 and before.items() <= after.items()


def test_equal_headings_in_two_documents_are_two_sections(run: Run) -> None:
    chunks = run({"a.md": f"# Same\n\n{PORT}\n", "b.md": f"# Same\n\n{TRAIN}\n"})
    assert len({chunk.section_id for chunk in chunks}) == 2


def test_what_has_too_little_prose_or_is_said_again_is_counted(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"a.md": f"# Same\n\n{PORT}\n\n# Code\n\n```\n{TRAIN}\n```\n", "b.md": f"# Same\n\n{PORT}\n\n# Short\n\nToo short.\n"}
    (chunk,) = run(texts)
    assert chunk.text.strip() == f"# Same\n\n{PORT}"
    assert json.loads((tmp_path / "metrics.json").read_bytes()) == {
        "cut": 4,
        "chunks": 1,
        "documents": 1,
        "dropped": {"too_little_prose": 2, "repeated": 1},
    }
    assert capsys.readouterr().out == "chunk: 4 pieces = 1 chunks + 2 with too little prose + 1 repeated\n"


def test_a_lower_limit_keeps_the_short_section(run: Run) -> None:
    texts = {"a.md": f"# A\n\n{PORT}\n\n# Short\n\nToo short.\n"}
    assert (len(run(texts)), len(run(texts, min_prose_chars=8))) == (1, 2)


def test_no_chunk_is_longer_than_the_budget_in_tokens_of_the_real_tokenizer(run: Run, base_folder: Path) -> None:
    tokenizer: Any = load_tokenizer(base_folder)
    text = f"# Long\n\n{' '.join([PORT, TRAIN] * 6)}\n\n{'Donaudampfschifffahrt' * 20}\n"
    for budget in (16, 48):
        lengths = [len(tokenizer(unwrapped(chunk.text).strip())["input_ids"]) for chunk in run({"long.md": text}, budget, 1)]
        assert budget * 0.6 < max(lengths) <= budget


def test_two_runs_give_the_same_bytes(run: Run, tmp_path: Path) -> None:
    run({"guide.md": GUIDE})
    first = (tmp_path / "chunks.jsonl").read_bytes()
    run({"guide.md": GUIDE})
    assert (tmp_path / "chunks.jsonl").read_bytes() == first


def test_documents_without_prose_are_one_clear_error_and_nothing_is_written(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"documents\.jsonl: none of 1 pieces has 20 characters of prose; add text or lower chunk\.min"
    ):
        run({"a.md": "# Only a heading\n"})
    assert not (tmp_path / "chunks.jsonl").exists()
