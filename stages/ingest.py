"""data/raw -> documents.jsonl: every collected file as Markdown text; ingest_failures.jsonl: the files that gave none, and why.

Costs about a second of start-up and milliseconds a page. Each file is parsed in a process of its own, without network and with
limits on time and memory, so that a broken or hostile file costs only itself.
"""

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from stages.files import write_json
from stages.params import Positive
from stages.parsers import TYPE_OF_SUFFIX, Limits, Parsed, parse
from stages.program import BadInput, progress, run, say
from stages.records import Document, Failure, Source, content_id, read_records, write_records


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one file may take before it is given up."""

    timeout_s: Positive
    max_memory_mb: Positive
    max_file_mb: Positive


class Sources(msgspec.Struct, frozen=True):
    """The names of what was collected; the rest of them is collect's business."""

    sources: dict[str, Any]
    remotes: dict[str, Any]


def type_of(path: str) -> str:
    """The format by the file's suffix, "" for one that is not read."""
    return TYPE_OF_SUFFIX.get(PurePosixPath(path).suffix.lower(), "")


def refused(source: Source, size: int, max_file_mb: int) -> Parsed | None:
    """Why a file is not even opened; None when it is to be parsed."""
    if not type_of(source.path):
        suffix = PurePosixPath(source.path).suffix or "a name without suffix"
        return Parsed(reason="unsupported-type", detail=f"{suffix} is not among the types that are read")
    if size > max_file_mb * 1_000_000:
        return Parsed(reason="too-large", detail=f"{size / 1_000_000:.1f} MB, over {max_file_mb} (ingest.max_file_mb)")
    return None


def failure(source: Source, reason: str, detail: str) -> Failure:
    """The record of a file that gave no document."""
    parent = f"{source.source}/{source.path}"
    return Failure(id=content_id(parent, reason), parent_id=parent, reason=reason, detail=detail)


def sort_out(outcomes: list[tuple[Source, Parsed]]) -> tuple[list[Document], list[Failure]]:
    """A Document or a Failure for each file. Of files with the same text, the first in `outcomes` is the document."""
    documents: dict[str, Document] = {}
    failures = []
    for source, outcome in outcomes:
        id = content_id(outcome.text)
        if outcome.reason:
            failures.append(failure(source, outcome.reason, outcome.detail))
        elif id in documents:
            first = documents[id]
            failures.append(failure(source, "same-text", f"as {first.source}/{first.path}"))
        else:
            documents[id] = Document(
                id=id,
                source=source.source,
                path=source.path,
                sha256=source.sha256,
                revision=source.revision,
                title=outcome.title or PurePosixPath(source.path).stem,
                text=outcome.text,
            )
    return list(documents.values()), failures


def main(raw: Path, documents_file: Path, failures_file: Path, metrics_file: Path, *, collect: Sources, ingest: Params) -> None:
    names = sorted({*collect.sources, *collect.remotes})
    sources = [source for name in names for source in read_records(raw / name / "manifest.jsonl", Source)]
    sources.sort(key=lambda source: (source.source, source.path))
    files = [raw / source.source / "files" / source.path for source in sources]
    outcomes = [refused(source, file.stat().st_size, ingest.max_file_mb) for source, file in zip(sources, files, strict=True)]

    waiting = [place for place, outcome in enumerate(outcomes) if outcome is None]
    limits = Limits(timeout_s=ingest.timeout_s, max_memory_mb=ingest.max_memory_mb, max_text_mb=ingest.max_file_mb)
    parsing = parse([(files[place], type_of(sources[place].path)) for place in waiting], limits)
    for number, outcome in progress(parsing, "ingest", total=len(waiting), unit="file"):
        source, file = sources[waiting[number]], files[waiting[number]]
        if outcome.sha256 not in ("", source.sha256):
            stage = "collect" if source.source in collect.sources else "collect_remote"
            again = f"dvc repro --force --single-item {stage}@{source.source}"
            raise BadInput(f"{file}: its SHA-256 is not the one in manifest.jsonl; it was changed after collect. Run: {again}")
        outcomes[waiting[number]] = outcome

    done = [(source, outcome) for source, outcome in zip(sources, outcomes, strict=True) if outcome is not None]
    documents, failures = sort_out(done)
    assert len(sources) == len(documents) + len(failures), "a file was lost"
    by_reason = dict(Counter(failure.reason for failure in failures))
    if not documents:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(by_reason.items())) or "no sources"
        raise BadInput(f"{raw}: none of {len(sources)} files gave text ({reasons}); name documents in collect in params.yaml")

    write_records(documents_file, documents)
    write_records(failures_file, failures)
    metrics = {
        "files": len(sources),
        "documents": len(documents),
        "failures": len(failures),
        "characters": sum(len(document.text) for document in documents),
        "words": sum(len(document.text.split()) for document in documents),
        "hidden_characters": sum(outcome.hidden_characters for _, outcome in done),
        "by_reason": by_reason,
        "by_type": dict(Counter(type_of(document.path) for document in documents)),
    }
    write_json(metrics_file, metrics)
    see = f" (see {failures_file})" if failures else ""
    say(f"ingest: {len(sources)} files = {len(documents)} documents + {len(failures)} failures{see}")


if __name__ == "__main__":
    run(main)
