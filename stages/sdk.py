"""Moves pairs to synthetic-data-kit and back: `export data/pairs.jsonl FILE.json`, `import FILE.json data/curated.jsonl`.

`export` writes the kit's curated format, which its `save-as` reads. `import` reads its *_qa_pairs.json, curated or conversations file
and adds what the chunks give evidence for; the rest is listed with the reason. Importing twice adds nothing. Costs the embedding of
every sentence: half a minute for a small handbook on two busy cores.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from stages.evidence import fold
from stages.files import write_json
from stages.models import load_embedder
from stages.params import Models
from stages.program import BadInput, run, say
from stages.recipes.sdk import KitPair, evidence_for, spans_of
from stages.records import MEND, Chunk, Curated, Pair, QuestionType, content_id, read_records, write_records

PROCEDURAL = re.compile(r"(?i)^how (do|does|can|could|should|to|is .+ed\b|are .+ed\b)|\bsteps\b")
CONCEPTUAL = re.compile(r"(?i)^(why|explain|describe|what (is|are) (?!the |its |their ))|\b(mean|means|purpose|difference)\b")


def in_kit_format(pairs: Sequence[Pair]) -> dict[str, Any]:
    """`pairs` as the kit's `curate` writes them, without the ratings, which would be made up here."""
    from synthetic_data_kit.utils.llm_processing import convert_to_conversation_format

    entries = [{"question": pair.question, "answer": pair.answer} for pair in pairs]
    return {"summary": "", "qa_pairs": entries, "conversations": convert_to_conversation_format(entries)}


def entries_in(content: Any) -> list[Any]:
    """The entries of a file of the kit's, the fullest form first: those of a conversation are its questions with their answers.

    A conversation without any stays one entry, so that it is counted. Raises ValueError for any other file.
    """
    if isinstance(content, dict):
        key = next((key for key in ("qa_pairs", "filtered_pairs", "conversations") if key in content), "")
        if not key:
            raise ValueError("neither qa_pairs, filtered_pairs nor conversations is there")
        if key == "conversations":
            return [entry for turns in msgspec.convert(content[key], list[Any]) for entry in exchanges(turns) or [turns]]
        content = content[key]
    return msgspec.convert(content, list[Any])


def exchanges(turns: Any) -> list[dict[str, Any]]:
    """Each user's message of a conversation that an assistant's follows, as an entry."""
    messages = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return [
        {"question": one.get("content"), "answer": other.get("content")}
        for one, other in itertools.pairwise(messages)
        if (one.get("role"), other.get("role")) == ("user", "assistant")
    ]


def type_of(question: str) -> QuestionType:
    """The question type by the wording of `question`; the kit knows none."""
    if PROCEDURAL.search(question):
        return "procedural"
    return "conceptual" if CONCEPTUAL.search(question) else "factual"


def sort_out(entries: Sequence[Any]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """`entries` as id -> (question, answer), and a line for each that is malformed."""
    pairs, malformed = {}, []
    for place, entry in enumerate(entries, start=1):
        try:
            pair = msgspec.convert(entry, KitPair)
        except ValueError as error:
            malformed.append(f"entry {place} is malformed: {error}")
            continue
        question, answer = fold(pair.question), pair.answer.strip()
        pairs[content_id(question, answer)] = (question, answer)
    return pairs, malformed


def main(action: str, source: Path, target: Path, chunks: Path = Path("data/chunks.jsonl"), *, models: Models) -> None:
    if action == "export":
        pairs = read_records(source, Pair)
        if not pairs:
            raise BadInput(f"{source} holds no pair. Re-run: dvc repro validate")
        write_json(target, in_kit_format(pairs))
        say(f"export: {len(pairs)} pairs in {target}. Next: synthetic-data-kit save-as {target} --format alpaca")
        return
    if action != "import":
        raise BadInput(f"{action} is neither export nor import")

    try:
        entries = entries_in(msgspec.json.decode(source.read_bytes()))
    except (ValueError, UnicodeError) as error:
        raise BadInput(f"{source} is no file of synthetic-data-kit's: {error}; give a *_qa_pairs.json or a curated one") from None
    found, malformed = sort_out(entries)
    kept = read_records(target, Curated, MEND) if target.exists() else []
    ids = {curated.id for curated in kept}
    fresh = {id: pair for id, pair in found.items() if id not in ids}

    quotes: dict[str, str] = {}
    if fresh:
        spans = sorted({span for chunk in read_records(chunks, Chunk) for span in spans_of(chunk.markdown())})
        embedder = load_embedder(models.embedder)
        nearest = evidence_for(
            list(fresh.values()), spans, lambda texts: embedder.encode(texts, batch_size=64, normalize_embeddings=True)
        )
        quotes = {id: quote for id, quote in zip(fresh, nearest, strict=True) if quote}
    added = [
        Curated(id=id, question=question, answer=answer, quote=quotes[id], type=type_of(question), origin=source.name)
        for id, (question, answer) in fresh.items()
        if id in quotes
    ]
    write_records(target, [*kept, *added])
    unfounded = [f"nothing in {chunks} says: {answer[:100]!r}" for id, (_, answer) in fresh.items() if id not in quotes]
    for line in malformed + unfounded:
        say(f"import: {line}")
    known = len(entries) - len(malformed) - len(fresh)
    counts = f"{len(added)} added + {known} known + {len(unfounded)} without evidence"
    say(f"import: {len(entries)} pairs = {counts}{f' + {len(malformed)} malformed' if malformed else ''}")


if __name__ == "__main__":
    run(main)
