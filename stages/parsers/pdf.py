"""PDF as Markdown: headings by type size, ruled tables, code by its typeface, in the reading order that pdfminer finds."""

import io
import itertools
import re
import statistics
import unicodedata
from collections import Counter
from typing import Any, NamedTuple

import pdfplumber
from pdfminer.layout import LTChar, LTTextContainer, LTTextLine

HEADING_SCALE = 1.15  # of the body's type size; below it, a larger line is emphasis
MAX_HEADING_CHARACTERS = 150
BULLET = re.compile(
    "^[\u2022\u2023\u2043\u2013\u25aa\u25cb\u25cf\u25e6\u25a0\u2219\u00b7\uf0b7\uf0a7][ \t]*", re.MULTILINE
)  # Word writes two of private use
MONOSPACED = re.compile(r"mono|courier|consol|typewriter|cmtt|menlo|code", re.IGNORECASE)


class Part(NamedTuple):
    """Lines of one kind (text, code or table) and one type size in points, and where they stand."""

    kind: str
    size: float
    text: str
    margin: int  # height of the first line in steps of 4 points when it is in the page's outer tenth; else 0


def from_pdf(content: bytes) -> str:
    """The text of every page. Running heads and page numbers, which repeat on most pages, are left out."""
    from stages.parsers.formats import blocks, fenced

    pages = []
    with pdfplumber.open(io.BytesIO(content), laparams={}) as pdf:
        for page in pdf.pages:
            pages.append(page_parts(page))
            page.close()  # or memory grows with every page
    running = running_lines(pages)
    found = [part for parts in pages for part in parts if place_of(part) not in running]
    sizes = Counter[float]()
    for part in found:
        if part.kind == "text":
            sizes[part.size] += len(part.text)
    body = sizes.most_common(1)[0][0] if sizes else 0.0
    large = sorted({part.size for part in found if is_heading(part, body)}, reverse=True)
    out = []
    for kind, group in itertools.groupby(found, key=lambda part: "heading" if is_heading(part, body) else part.kind):
        if kind == "code":
            out.append(fenced("\n".join(part.text for part in group)))
        elif kind == "heading":
            out += ["#" * min(large.index(part.size) + 1, 6) + " " + " ".join(part.text.split()) for part in group]
        else:
            out += [BULLET.sub("- ", part.text) for part in group]
    return blocks(out)


def is_heading(part: Part, body: float) -> bool:
    """Whether the part is set clearly larger than the body, and is short."""
    return part.kind == "text" and part.size >= body * HEADING_SCALE and len(part.text) <= MAX_HEADING_CHARACTERS


def page_parts(page: Any) -> list[Part]:
    """The parts of a page in reading order: what of a box of text has one kind and size, and each ruled table, is a part."""
    from stages.parsers.formats import pipe_table

    tables = [table for table in page.find_tables() if len(table.rows) > 1 and len(table.columns) > 1]
    parts: list[Part] = []
    shown = set()
    for box in page.layout:
        lines = [line for line in box if isinstance(line, LTTextLine)] if isinstance(box, LTTextContainer) else []
        described = [
            (_table_around(line, page, tables), *described_line(line), line.y0) for line in lines if line.get_text().strip()
        ]
        for (table, kind, size), group in itertools.groupby(described, key=lambda line: line[:3]):
            if table is None:
                texts, heights = zip(*[(text, y) for *_, text, y in group], strict=True)
                is_outer = not page.height / 10 < heights[0] < page.height * 9 / 10
                margin = round(heights[0] / 4) if is_outer else 0
                parts.append(Part(kind, size, "\n".join(texts), margin))
            elif table not in shown:
                shown.add(table)
                parts.append(Part("table", 0.0, pipe_table(tables[table].extract()), 0))
    return parts


def _table_around(line: LTTextLine, page: Any, tables: list[Any]) -> int | None:
    x, y = (line.x0 + line.x1) / 2, page.height - (line.y0 + line.y1) / 2
    for number, table in enumerate(tables):
        left, top, right, bottom = table.bbox
        if left <= x <= right and top <= y <= bottom:
            return number
    return None


def described_line(line: LTTextLine) -> tuple[str, float, str]:
    """Kind, type size in half points, and text of a line, ligatures taken apart."""
    characters = [character for character in line if isinstance(character, LTChar) and character.get_text().strip()]
    size = round(statistics.median(character.size for character in characters) * 2) / 2 if characters else 0.0
    is_code = bool(characters) and all(MONOSPACED.search(character.fontname) for character in characters)
    text = re.sub("[\ufb00-\ufb06]", lambda found: unicodedata.normalize("NFKC", found[0]), line.get_text().rstrip("\n"))
    return ("code" if is_code else "text"), size, (text if is_code else text.strip())


def running_lines(pages: list[list[Part]]) -> set[tuple[str, int]]:
    """Where in the margin (text with digits masked, height) something stands on at least three pages and on half of all."""
    seen = Counter(place for parts in pages for place in {place_of(part) for part in parts if part.margin})
    return {place for place, count in seen.items() if count >= 3 and count * 2 >= len(pages)}


def place_of(part: Part) -> tuple[str, int]:
    """What running heads and page numbers have in common from page to page."""
    return re.sub(r"\d+", "#", part.text.strip()), part.margin
