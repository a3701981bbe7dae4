"""One function a format: bytes in, Markdown out. Nothing here opens a file, a link or an address."""

import csv
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from stages.parsers.text import LINE_ENDS, Undecodable, decoded, headings

CODE_STYLES = ("Code", "Source Code", "HTML Preformatted", "Preformatted Text", "Code Block", "macro")


class Unreadable(Exception):
    """Why a file gives no text: a stable slug and one line."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def import_parsers() -> None:
    """Loads what `to_markdown` needs, so that a later call reads nothing but the document."""
    import charset_normalizer  # noqa: F401
    import docutils.core
    import mammoth  # noqa: F401
    import markdown_it  # noqa: F401
    import yaml  # noqa: F401
    from markitdown.converters import PptxConverter  # noqa: F401

    from stages.parsers import html, pdf, rst  # noqa: F401

    docutils.core.publish_string("*x*", writer="html5")  # docutils imports its parts when they are first used


def to_markdown(content: bytes, type: str, max_unpacked_mb: int, hidden: Counter[str]) -> str:
    """The Markdown of a file of `type`, one of TYPE_OF_SUFFIX's, without what a reader of the file does not see.

    Adds the characters left out to `hidden`, by kind. Raises Unreadable, and what a parser raises on a broken file.
    """
    if type == "pdf":
        from stages.parsers.pdf import from_pdf

        if b"%PDF-" not in content[:1024]:
            raise Unreadable("not-a-pdf", "it does not begin with %PDF-")
        return from_pdf(content, hidden)
    if type in ("docx", "pptx"):
        _check_archive(content, type, max_unpacked_mb)
        return from_docx(content, hidden) if type == "docx" else from_pptx(content)
    try:
        if type == "html":
            from stages.parsers.html import declared_encoding, from_html

            return from_html(decoded(content, declared_encoding(content)), hidden)
        text = decoded(content)
    except Undecodable as error:
        raise Unreadable("binary", str(error)) from None
    if type == "rst":
        from stages.parsers.rst import from_rst

        return from_rst(text)
    if type == "csv":
        return from_csv(text)
    if type == "ipynb":
        return from_ipynb(text, hidden)
    return from_md(text, hidden) if type == "md" else text


def _check_archive(content: bytes, type: str, max_unpacked_mb: int) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile:
        hint = "it is encrypted or of an older Office" if content.startswith(b"\xd0\xcf\x11\xe0") else "it is no zip archive"
        raise Unreadable(f"not-a-{type}", hint) from None
    if size > max_unpacked_mb * 1_000_000:
        raise Unreadable(
            "too-large", f"unpacks to {size // 1_000_000} MB, over {max_unpacked_mb} (a quarter of ingest.max_memory_mb)"
        )


def from_md(text: str, hidden: Counter[str]) -> str:
    """The text without hidden parts and front matter, whose title becomes the heading of a text that has none of level 1."""
    from stages.parsers.html import shown

    text = shown(LINE_ENDS.sub("\n", text), hidden)
    matter = re.match(r"(---|\+\+\+)[ \t]*\n(.*?\n)??\1[ \t]*(?:\n|$)", text, re.DOTALL)
    if matter is None:
        return text
    title = _title_in(matter[2] or "", is_toml=matter[1] == "+++")
    if title is None:
        return text
    body = text[matter.end() :].lstrip("\n")
    return f"# {title}\n\n{body}" if title and all(level > 1 for level, _ in headings(body)) else body


def _title_in(matter: str, is_toml: bool) -> str | None:
    """The front matter's title, "" without one; None when it is no front matter at all but text between two rules."""
    import tomllib

    import yaml

    try:
        fields = tomllib.loads(matter) if is_toml else yaml.safe_load(matter) or {}
    except (yaml.YAMLError, tomllib.TOMLDecodeError):
        line = re.search(r"^title\s*[:=]\s*(.+)$", matter, re.MULTILINE)
        return line[1].strip().strip("\"'") if line else None
    return " ".join(str(fields.get("title") or "").split()) if isinstance(fields, dict) else None


def from_csv(text: str) -> str:
    """One pipe table; the delimiter is the likeliest of comma, semicolon, tab and bar."""
    try:
        dialect: Any = csv.Sniffer().sniff(text[:20_000], delimiters=",;\t|")
    except csv.Error:
        dialect = csv.excel
    rows = [
        row for row in csv.reader(io.StringIO(text, newline=""), dialect, doublequote=True) if any(cell.strip() for cell in row)
    ]
    return pipe_table(rows)


def pipe_table(rows: Sequence[Sequence[str | None]]) -> str:
    """A Markdown table whose head is the first row; short rows are filled up. No rows give ""."""
    if not rows:
        return ""
    width = max(map(len, rows))
    lines = [[" ".join((cell or "").split()).replace("|", "\\|") for cell in row] + [""] * (width - len(row)) for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [lines[0], ["---"] * width, *lines[1:]])


def fenced(code: str, language: str = "") -> str:
    """A fenced block whose fence is longer than any in `code`."""
    longest = max([2, *(len(run) for run in re.findall(r"^\s*(`{3,})", code, re.MULTILINE))])
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{code.strip(chr(10))}\n{fence}"


def from_ipynb(text: str, hidden: Counter[str]) -> str:
    """Markdown cells without hidden parts, code cells as fenced blocks; outputs are left out."""
    from stages.parsers.html import shown

    notebook = json.loads(text)
    fields = notebook.get("metadata", {})
    language = fields.get("language_info", {}).get("name") or fields.get("kernelspec", {}).get("language") or "python"
    cells = notebook["cells"] if "cells" in notebook else notebook["worksheets"][0]["cells"]  # before nbformat 4
    parts = []
    for cell in cells:
        source = cell.get("source", cell.get("input", ""))
        source = source if isinstance(source, str) else "".join(source)
        if source.strip():
            parts.append(fenced(source, language) if cell["cell_type"] == "code" else shown(source, hidden).strip("\n"))
    return "\n\n".join(parts)


def from_docx(content: bytes, hidden: Counter[str]) -> str:
    """Headings, lists, tables, formulas (as LaTeX) and paragraphs in a code style."""
    import mammoth
    from markitdown.converter_utils.docx.pre_process import pre_process_docx

    from stages.parsers.html import from_html

    styles = [f"p[style-name='{name}'] => pre:separator('\\n')" for name in CODE_STYLES]
    styles += ["p[style-name='Title'] => h1:fresh", "r[style-name='Verbatim Char'] => code", "r[style-name='HTML Code'] => code"]
    page = mammoth.convert_to_html(
        pre_process_docx(io.BytesIO(content)),
        style_map="\n".join(styles),
        include_embedded_style_map=False,
        convert_image=mammoth.images.img_element(lambda _image: {"src": ""}),
    )
    return from_html(page.value, hidden)


def from_pptx(content: bytes) -> str:
    """A heading a slide, its texts, tables, charts and notes."""
    from markitdown import StreamInfo
    from markitdown.converters import PptxConverter

    text = PptxConverter().convert(io.BytesIO(content), StreamInfo(extension=".pptx")).markdown  # type: ignore[no-untyped-call]
    return blocks(re.sub(r"^<!-- Slide number: \d+ -->$", "", text, flags=re.MULTILINE).split("\n\n"))


def blocks(parts: Iterable[str]) -> str:
    """`parts` with one blank line between them; empty ones are left out."""
    return "\n\n".join(part.strip("\n") for part in parts if part.strip())
