"""Bytes to text, and text to clean text."""

import re
import unicodedata
from collections import Counter
from itertools import pairwise

BOMS = [  # UTF-32 first: its little-endian mark begins with UTF-16's
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
]
HIDDEN = {  # what a reader does not see and a model does
    "control": "[\x00-\x08\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ufff9-\ufffb\ud800-\udfff]",
    "soft-hyphen": "\u00ad",
    # the joiners are spelling in Persian or Hindi, elsewhere hidden
    "zero-width": "[\u034f\u180b-\u180f\u200b\u2060-\u2065\ufeff]|(?<![\u0600-\u109f\u1780-\u17ff])[\u200c\u200d]",
    "bidi": "[\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f]",
    "filler": "[\u115f\u1160\u17b4\u17b5\u3164\uffa0]",
    "tag": "[\U000e0000-\U000e0fff]",
}
HIDDEN_CHARACTER = re.compile("|".join(f"(?P<{kind.replace('-', '_')}>{those})" for kind, those in HIDDEN.items()))
LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$")


class Undecodable(Exception):
    """Bytes that are no text."""


def decoded(content: bytes, declared: str = "") -> str:
    """`content` by its byte order mark, as UTF-8, in the encoding it declares, or in the likeliest one. Raises Undecodable."""
    for mark, encoding in BOMS:
        if content.startswith(mark):
            return _strictly(content[len(mark) :], encoding)
    if b"\x00" in content:
        raise Undecodable("holds NUL bytes")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = _strictly(content, declared) if declared else _guessed(content)
    controls = sum(text.count(chr(code)) for code in range(32) if chr(code) not in "\t\n\r\f\x1b")
    if controls * 100 > len(text):
        raise Undecodable("more than 1 % of its characters are control characters")
    return text


def _strictly(content: bytes, encoding: str) -> str:
    try:
        text = content.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        raise Undecodable(f"is not the {encoding} it claims to be") from None
    if "\x00" in text:
        raise Undecodable("holds NUL characters")
    return text


def _guessed(content: bytes) -> str:
    from charset_normalizer import from_bytes

    best = from_bytes(content).best()
    if best is None:
        raise Undecodable("in no known encoding")
    return str(best)


def cleaned(text: str, hidden: Counter[str]) -> str:
    """`text` in NFC with Unix line ends, without trailing blanks and hidden characters, which are counted by kind in `hidden`."""
    text = LINE_ENDS.sub("\n", text)
    hidden.update((found.lastgroup or "").replace("_", "-") for found in HIDDEN_CHARACTER.finditer(text))
    lines = (line.rstrip() for line in unicodedata.normalize("NFC", HIDDEN_CHARACTER.sub("", text)).split("\n"))
    return "\n".join(lines).strip("\n")


def headings(text: str) -> list[tuple[int, str]]:
    """Level and words of each Markdown heading outside fenced code, in order."""
    found = []
    fence = ""
    for line, next_line in pairwise([*text.split("\n"), ""]):
        mark = FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif mark:
            fence = mark[1]
        elif heading := HEADING.match(line):
            found.append((len(heading[1]), heading[2]))
        elif line.strip() and re.fullmatch(r" {0,3}(=+|-{2,})", next_line) and not line.lstrip().startswith(("-", "*", ">", "|")):
            found.append((1 if "=" in next_line else 2, line.strip()))
    return [(level, words) for level, words in found if words]


def title_of(text: str) -> str:
    """The first heading's words without links, code marks and anchors; "" without a heading."""
    words = next((words for _, words in headings(text)), "")
    words = re.sub(r"!?\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", words)
    return re.sub(r"\s*\{#[^}]*\}$|[`*]", "", words).strip()
