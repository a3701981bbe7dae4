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


Place = tuple[float, float, str]  # of a character: left, bottom and the character


class Part(NamedTuple):
    """Lines of one kind (text, code or table) and one type size in points, and where they stand."""

    kind: str
    size: float
    text: str
    margin: int  # height of the first line in steps of 4 points when it is in the page's outer tenth; else 0


def from_pdf(content: bytes, hidden: Counter[str]) -> str:
    """The text of every page. Running heads and page numbers, which repeat on most pages, are left out.

    Characters in white on nothing and those below one point are left out and added to `hidden`. Text in the invisible mode stays:
    pdfminer does not tell it, and it is how scanned pages carry what was recognised.
    """
    from stages.parsers.formats import blocks, fenced

    pages = []
    with pdfplumber.open(io.BytesIO(content), laparams={}) as pdf:
        for page in pdf.pages:
            pages.append(page_parts(page, hidden))
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


def unseen_on(page: Any) -> dict[Place, str]:
    """Where characters stand that a reader does not see, and why: white on nothing, or below one point."""
    unseen = {place_on_page(one): "tiny-text" for one in page.chars if one["size"] < 1 and one["text"].strip()}
    white = [one for one in page.chars if is_white(one["non_stroking_color"]) and one["size"] >= 1 and one["text"].strip()]
    if white:
        filled = [one for one in page.rects + page.curves if one["fill"] and not is_white(one["non_stroking_color"])]
        grounds = page.images + filled
        unseen |= {place_on_page(one): "same-colour" for one in white if not any(is_inside(one, ground) for ground in grounds)}
    return unseen


def place_on_page(character: dict[str, Any]) -> Place:
    """What tells a character of pdfplumber's and pdfminer's from all others."""
    return character["x0"], character["y0"], character["text"]


def is_white(colour: Any) -> bool:
    """Of a PDF's colour in grey, RGB or CMYK."""
    parts = colour if isinstance(colour, tuple | list) else (colour,)
    return parts in ((1,), (1, 1, 1), [1], [1, 1, 1]) or tuple(parts) == (0, 0, 0, 0)


def is_inside(character: dict[str, Any], ground: dict[str, Any]) -> bool:
    """Whether the character's middle is on `ground`."""
    x, y = (character["x0"] + character["x1"]) / 2, (character["y0"] + character["y1"]) / 2
    return bool(ground["x0"] <= x <= ground["x1"] and ground["y0"] <= y <= ground["y1"])


def is_heading(part: Part, body: float) -> bool:
    """Whether the part is set clearly larger than the body, and is short."""
    return part.kind == "text" and part.size >= body * HEADING_SCALE and len(part.text) <= MAX_HEADING_CHARACTERS


def page_parts(page: Any, hidden: Counter[str]) -> list[Part]:
    """The parts of a page in reading order: what of a box of text has one kind and size, and each ruled table, is a part."""
    from stages.parsers.formats import pipe_table

    unseen = unseen_on(page)
    hidden.update(unseen.values())
    seen = page.filter(lambda one: one["object_type"] != "char" or place_on_page(one) not in unseen) if unseen else page
    tables = [table for table in seen.find_tables() if len(table.rows) > 1 and len(table.columns) > 1]
    parts: list[Part] = []
    shown = set()
    for box in page.layout:
        lines = [line for line in box if isinstance(line, LTTextLine)] if isinstance(box, LTTextContainer) else []
        described = [(_table_around(line, page, tables), *described_line(line, unseen), line.y0) for line in lines]
        described = [one for one in described if one[3].strip()]
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


def described_line(line: LTTextLine, unseen: dict[Place, str]) -> tuple[str, float, str]:
    """Kind, type size in half points, and text of a line without what is `unseen`, ligatures taken apart."""
    seen = [one for one in line if not isinstance(one, LTChar) or (one.x0, one.y0, one.get_text()) not in unseen]
    characters = [one for one in seen if isinstance(one, LTChar) and one.get_text().strip()]
    size = round(statistics.median(character.size for character in characters) * 2) / 2 if characters else 0.0
    is_code = bool(characters) and all(MONOSPACED.search(character.fontname) for character in characters)
    text = re.sub(
        "[\ufb00-\ufb06]",
        lambda found: unicodedata.normalize("NFKC", found[0]),
        "".join(one.get_text() for one in seen).rstrip("\n"),
    )
    return ("code" if is_code else "text"), size, (text if is_code else text.strip())


def running_lines(pages: list[list[Part]]) -> set[tuple[str, int]]:
    """Where in the margin (text with digits masked, height) something stands on at least three pages and on half of all."""
    seen = Counter(place for parts in pages for place in {place_of(part) for part in parts if part.margin})
    return {place for place, count in seen.items() if count >= 3 and count * 2 >= len(pages)}


def place_of(part: Part) -> tuple[str, int]:
    """What running heads and page numbers have in common from page to page."""
    return re.sub(r"\d+", "#", part.text.strip()), part.margin
