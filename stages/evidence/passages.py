"""The sentences and longer passages of a Markdown text that can stand as an answer, verbatim."""

import re
from typing import Literal

import msgspec

from stages.evidence.text import fold

SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)\s+(?=[A-Z`\[\"*(])")
LEANS_ON_BEFORE = re.compile(
    r"(?i)^\W*(it|its|this|that|these|those|they|them|then|there|he|she|such|here|also|however|note|see|otherwise|but|and|or|so|for example)\b"
)
POINTS_BACK = re.compile(
    r"(?i)\b(this|these|that|the above) (command|option|example|field|way|case|error|file|parameter|page|section|guide|value|flag)s?\b"
)
MIN_SENTENCE_CHARS, MAX_SENTENCE_CHARS = 40, 320
MIN_LONG_CHARS, MAX_LONG_CHARS = 120, 480
MIN_LEAD_CHARS = 30


class Passage(msgspec.Struct, frozen=True):
    """A piece of a text that can stand as an answer."""

    quote: str  # verbatim, white space folded
    answer: str  # the quote without link targets, tags and emphasis; a code block keeps its lines
    length: Literal["short", "long"]


def passages_of(text: str) -> list[Passage]:
    """The passages of a Markdown text in reading order: `short` ones are sentences, `long` ones whole paragraphs, or one with its code or list.

    A sentence that leans on the one before ("It ...", "This ...") is taken together with it. What is too short or too long is left out.
    """
    passages = []
    for paragraph, block in blocks_of(text):
        before = ""
        sentences = SENTENCE_END.split(paragraph)
        for sentence in sentences:
            sentence = sentence.strip()
            quote = f"{before} {sentence}" if LEANS_ON_BEFORE.match(sentence) and before else sentence
            before = sentence
            answer = readable(quote)
            if (
                answer.endswith((".", "!"))
                and not LEANS_ON_BEFORE.match(answer)
                and not (POINTS_BACK.search(answer) and quote == sentence)
                and MIN_SENTENCE_CHARS <= len(answer) <= MAX_SENTENCE_CHARS
            ):
                passages.append(Passage(quote=quote, answer=answer, length="short"))
        long = paragraph + (" " + fold(block) if block else "")
        answer = readable(paragraph) + (f"\n\n{block.strip()}" if block else "")
        is_more = bool(block) or len(sentences) > 1
        if is_more and not LEANS_ON_BEFORE.match(answer) and MIN_LONG_CHARS <= len(answer) <= MAX_LONG_CHARS:
            passages.append(Passage(quote=long, answer=answer, length="long"))
    return passages


def lead_of(text: str) -> Passage | None:
    """What a section says first, also where it is no whole sentence; None for a text without a paragraph that stands in it as written.

    A paragraph that announces code or a list comes before others, and one that leans on what is not there comes last.
    """

    def is_worse(block: tuple[str, str]) -> tuple[bool, bool]:
        paragraph, announced = block
        leans = LEANS_ON_BEFORE.match(paragraph) or POINTS_BACK.search(paragraph) or (paragraph.endswith(":") and not announced)
        return bool(leans), not announced

    found = sorted(blocks_of(text), key=is_worse)
    for paragraph, block in found:
        for quote, answer in (
            (f"{paragraph} {fold(block)}", f"{readable(paragraph)}\n\n{block.strip()}"),
            (paragraph, readable(paragraph)),
        ):
            if MIN_LEAD_CHARS <= len(answer.strip()) <= MAX_LONG_CHARS:
                return Passage(quote=quote.strip(), answer=answer.strip(), length="long")
    for paragraph, _ in found:
        first = SENTENCE_END.split(paragraph)[0].strip()
        if MIN_LEAD_CHARS <= len(first) <= MAX_LONG_CHARS:
            return Passage(quote=first, answer=readable(first), length="long")
    return None


def sentences_of(text: str) -> list[str]:
    """The sentences of a Markdown text's paragraphs and list items, verbatim with white space folded, in reading order."""
    return [sentence.strip() for paragraph, _ in blocks_of(text) for sentence in SENTENCE_END.split(paragraph)]


def blocks_of(text: str) -> list[tuple[str, str]]:
    """The paragraphs and list items of a Markdown text as written, white space folded, each with the code block or list that it
    announces with a colon ("" for most). Those that markers break up are left out.
    """
    from markdown_it import MarkdownIt

    whole = fold(text)
    lines = text.split("\n")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    blocks = []
    for place, token in enumerate(tokens):
        if token.type != "inline" or tokens[place - 1].type != "paragraph_open":
            continue
        paragraph = fold(token.content)
        announced = ""
        after = tokens[place + 2] if place + 2 < len(tokens) else None
        if paragraph.endswith(":") and after and after.type in ("fence", "bullet_list_open", "ordered_list_open") and after.map:
            announced = "\n".join(lines[slice(*after.map)]).rstrip()
        if fold(f"{paragraph} {announced}") in whole:
            blocks.append((paragraph, announced))
        elif paragraph and paragraph in whole:
            blocks.append((paragraph, ""))
    return blocks


def readable(quote: str) -> str:
    """A quote as an answer: its words and code, without link targets, tags and emphasis."""
    from markdown_it import MarkdownIt

    children = MarkdownIt("commonmark").parseInline(quote)[0].children or []
    codes: list[str] = []
    text = ""
    for child in children:
        if child.type == "code_inline":
            text += f"\0{len(codes)}\0"
            codes.append(f"`{child.content}`")
        elif child.type != "html_inline":
            text += " " if child.type == "softbreak" else child.content
    # a reference link's target is defined elsewhere on the page: its brackets are markup all the same
    text = re.sub(r"\[([^\[\]]+)\](\[[^\]]*\])?(?!\()", r"\1", text)
    return fold(re.sub("\0(\\d+)\0", lambda found: codes[int(found[1])], text))
