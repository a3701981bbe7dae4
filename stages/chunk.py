"""data/documents.jsonl -> data/chunks.jsonl: documents cut at headings, within a token budget.

A section (the text under one heading) stays whole when it fits; a longer one is cut at paragraphs, then sentences, then words.
Costs seconds: the tokenizer of the base model counts, no model runs.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import msgspec

from stages.evidence import fold
from stages.files import write_json
from stages.models import as_hf_folder
from stages.params import Count, Models
from stages.program import BadInput, run, say
from stages.records import Chunk, Document, content_id, read_records, write_records


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_tokens: Annotated[int, msgspec.Meta(ge=16)]
    min_prose_chars: Count


class Section(msgspec.Struct, frozen=True):
    """The text from one heading to the next: characters `start` to `end` of the document, its own heading line included."""

    heading_path: tuple[str, ...]
    start: int
    end: int


def sections_of(text: str) -> list[Section]:
    """The sections of a Markdown text in order; joined they are the text. Headings inside code fences do not count.

    When a text begins with a heading and none is of level 1, that heading is the page's title, and the others lie under it.
    """
    from markdown_it import MarkdownIt

    line_starts = lines_of(text)
    tokens = MarkdownIt("commonmark").parse(text)
    levels = [int(token.tag[1]) for token in tokens if token.type == "heading_open" and token.level == 0]
    is_title = 1 not in levels and bool(tokens) and tokens[0].type == "heading_open"
    path: dict[int, str] = {}
    cuts: list[tuple[int, tuple[str, ...]]] = [(0, ())]
    for token, inline in zip(tokens, tokens[1:], strict=False):
        if token.type != "heading_open" or token.level != 0 or token.map is None:
            continue
        level = 1 if is_title else int(token.tag[1])
        is_title = False
        path = {depth: title for depth, title in path.items() if depth < level} | {level: plain_text(inline)}
        cuts.append((line_starts[token.map[0]], tuple(path[depth] for depth in sorted(path))))
    ends = [start for start, _ in cuts[1:]] + [len(text)]
    return [Section(titles, start, end) for (start, titles), end in zip(cuts, ends, strict=True) if end > start]


def lines_of(text: str) -> list[int]:
    """Where the lines of `text` begin."""
    # not splitlines(), which also ends a line at form feeds and other marks that Markdown takes as text
    return [0, *(end.end() for end in re.finditer(r"\r\n?|\n", text))]


def fences_of(text: str) -> list[tuple[int, int, str]]:
    """(start, end, fence) of the lines inside each fenced code block of a Markdown text, as character offsets."""
    from markdown_it import MarkdownIt

    line_starts = [*lines_of(text), len(text)]
    fences = [token for token in MarkdownIt("commonmark").parse(text) if token.type == "fence" and token.map]
    return [(line_starts[fence.map[0] + 1], line_starts[fence.map[1]], fence.markup) for fence in fences if fence.map]


def unwrapped(text: str) -> str:
    """A Markdown text with each paragraph on one line, no trailing blanks and single empty lines: the same for each way to wrap it."""
    from markdown_it import MarkdownIt

    lines: list[str | None] = [line.rstrip() for line in re.split(r"\r\n?|\n", text)]
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "inline" and token.map:
            first, end = token.map
            lines[first] = " ".join([lines[first] or "", *((line or "").strip() for line in lines[first + 1 : end])])
            lines[first + 1 : end] = [None] * (end - first - 1)  # not deleted, since other tokens count lines
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if line is not None))


def cut_text(text: str, splitter: Any) -> list[tuple[int, str]]:
    """(offset, piece) for the pieces of `text`; joined they are `text`. They are the same words for each way to wrap it."""
    places = [place for place, character in enumerate(text) if not character.isspace()]
    cuts, taken = [0], 0
    for piece in splitter.chunks(unwrapped(text))[:-1]:
        taken += len("".join(piece.split()))
        if 0 < taken < len(places):
            line = text.rfind("\n", places[taken - 1], places[taken])  # the next piece keeps its indentation
            cuts.append((line if line >= 0 else places[taken - 1]) + 1)
    return [(start, text[start:end]) for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True) if end > start]


def plain_text(inline: Any) -> str:
    """A heading's words without its markup, white space folded."""
    kinds = {"text", "code_inline", "softbreak", "hardbreak"}
    parts = [child for child in inline.children or [] if child.type in kinds]
    return fold("".join(" " if part.type.endswith("break") else part.content for part in parts))


def prose_chars(text: str) -> int:
    """The number of characters in `text` that are words people read: letters and digits outside headings and code blocks."""
    from markdown_it import MarkdownIt

    count, is_heading = 0, False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        is_heading = token.type == "heading_open" or (is_heading and token.type != "heading_close")
        if token.type == "inline" and not is_heading:
            count += sum(character.isalnum() for character in token.content)
    return count


def cut_document(document: Document, splitter: Any) -> list[Chunk]:
    """The chunks of `document` in reading order; joined they are its text. `splitter` cuts an unwrapped section into pieces."""
    chunks = []
    fences = fences_of(document.text)
    for section in sections_of(document.text):
        for offset, text in cut_text(document.text[section.start : section.end], splitter):
            start = section.start + offset
            chunks.append(
                Chunk(
                    id=content_id(section.heading_path, fold(text)),
                    document_id=document.id,
                    section_id=content_id(document.path, section.heading_path),
                    path=document.path,
                    heading_path=section.heading_path,
                    start=start,
                    end=start + len(text),
                    text=text,
                    fence=next((fence for begin, end, fence in fences if begin <= start < end), ""),
                )
            )
    return chunks


def main(documents: Path, chunks: Path, metrics: Path, *, chunk: Params, models: Models) -> None:
    from semantic_text_splitter import MarkdownSplitter
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(as_hf_folder(models.base) / "tokenizer.json"))
    splitter = MarkdownSplitter.from_huggingface_tokenizer(tokenizer, chunk.max_tokens, trim=False)
    cut = [piece for document in read_records(documents, Document) for piece in cut_document(document, splitter)]
    worded = [piece for piece in cut if prose_chars(piece.markdown()) >= chunk.min_prose_chars]
    kept = {piece.id: piece for piece in reversed(worded)}  # of equal chunks the first in reading order stays
    if not kept:
        raise BadInput(
            f"{documents}: none of {len(cut)} pieces has {chunk.min_prose_chars} characters of prose; add text or lower chunk.min_prose_chars"
        )
    write_records(chunks, kept.values())
    counts = Counter(piece.document_id for piece in kept.values())
    dropped = {"too_little_prose": len(cut) - len(worded), "repeated": len(worded) - len(kept)}
    write_json(metrics, {"cut": len(cut), "chunks": len(kept), "documents": len(counts), "dropped": dropped})
    say(
        f"chunk: {len(cut)} pieces = {len(kept)} chunks + {dropped['too_little_prose']} with too little prose + {dropped['repeated']} repeated"
    )


if __name__ == "__main__":
    run(main)
