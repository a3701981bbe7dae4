"""data/documents.jsonl -> data/chunks.jsonl: documents cut at headings, within a token budget.

A section (the text under one heading) stays whole when it fits; a longer one is cut at paragraphs, then sentences, then words.
Costs seconds: the tokenizer of the base model counts, no model runs.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import msgspec

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
    """The sections of a Markdown text in order; joined they are the text. Headings inside code fences do not count."""
    from markdown_it import MarkdownIt

    line_starts = [0]
    for line in text.splitlines(keepends=True):
        line_starts.append(line_starts[-1] + len(line))
    tokens = MarkdownIt("commonmark").parse(text)
    path: dict[int, str] = {}
    cuts: list[tuple[int, tuple[str, ...]]] = [(0, ())]
    for token, inline in zip(tokens, tokens[1:], strict=False):
        if token.type != "heading_open" or token.level != 0 or token.map is None:
            continue
        level = int(token.tag[1])
        path = {depth: title for depth, title in path.items() if depth < level} | {level: plain_text(inline)}
        cuts.append((line_starts[token.map[0]], tuple(path[depth] for depth in sorted(path))))
    ends = [start for start, _ in cuts[1:]] + [len(text)]
    return [Section(titles, start, end) for (start, titles), end in zip(cuts, ends, strict=True) if end > start]


def plain_text(inline: Any) -> str:
    """A heading's words without its markup."""
    return "".join(child.content for child in inline.children or [] if child.type in ("text", "code_inline")).strip()


def prose_chars(text: str) -> int:
    """The number of characters in `text` that are words people read: no headings, code blocks, tables or blanks."""
    from markdown_it import MarkdownIt

    count, is_heading = 0, False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        is_heading = token.type == "heading_open" or (is_heading and token.type != "heading_close")
        if token.type == "inline" and not is_heading:
            count += len("".join(token.content.split()))
    return count


def cut_document(document: Document, splitter: Any) -> list[Chunk]:
    """The chunks of `document` in reading order; joined they are its text. `splitter` cuts one section into (offset, text)."""
    chunks = []
    for section in sections_of(document.text):
        for offset, text in splitter.chunk_indices(document.text[section.start : section.end]):
            start = section.start + offset
            chunks.append(
                Chunk(
                    id=content_id(section.heading_path, text.strip()),
                    document_id=document.id,
                    section_id=content_id(document.path, section.heading_path),
                    path=document.path,
                    heading_path=section.heading_path,
                    start=start,
                    end=start + len(text),
                    text=text,
                )
            )
    return chunks


def main(documents: Path, chunks: Path, metrics: Path, *, chunk: Params, models: Models) -> None:
    from semantic_text_splitter import MarkdownSplitter
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(as_hf_folder(models.base) / "tokenizer.json"))
    splitter = MarkdownSplitter.from_huggingface_tokenizer(tokenizer, chunk.max_tokens, trim=False)
    cut = [piece for document in read_records(documents, Document) for piece in cut_document(document, splitter)]
    worded = [piece for piece in cut if prose_chars(piece.text) >= chunk.min_prose_chars]
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
