"""data/raw -> documents.jsonl: every collected file as Markdown text; ingest_failures.jsonl: the files that gave none, and why;
findings.jsonl: what their owner should know of before a model learns them, as secrets, personal data, hidden and hostile text.

Costs about a second of start-up and milliseconds a page. Each file is parsed in a process of its own, without network and with
limits on time and memory, so that a broken or hostile file costs only itself.
"""

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from stages.files import write_json
from stages.likeness import near_duplicates
from stages.params import Positive
from stages.parsers import TYPE_OF_SUFFIX, Limits, Parsed, parse
from stages.program import BadInput, progress, run, say
from stages.records import Document, Failure, Finding, Source, by_id, content_id, read_records, write_records
from stages.screening import Spot, instructions_in, personal_data_in, redacted, secrets_in

FINDERS = {"secret": secrets_in, "personal-data": personal_data_in, "instruction": instructions_in}
CONTEXT = 40  # characters shown on each side of a finding
DOMINANT_SHARE = 0.5  # of a source's characters, in one document
DOMINANT_AMONG = 10  # documents that a source has at least before one can dominate it
LIKENESS = 0.8  # Jaccard similarity of near-identical pages
BURST = 5  # near-identical pages at least; a few poisoned pages, whatever the size of the corpus, are enough (Souly et al. 2025)


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one file may take before it is given up, and what is taken out of the texts."""

    timeout_s: Positive
    max_memory_mb: Positive
    max_file_mb: Positive
    redact: tuple[Literal["secret", "personal-data"], ...]


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
    shown = redacted(detail, secrets_in(detail))  # a parser's words may quote the file
    return Failure(id=content_id(parent, reason), parent_id=parent, reason=reason, detail=shown)


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


class Found(msgspec.Struct, frozen=True):
    """A finding before it has its document."""

    kind: str
    rule: str
    start: int
    end: int
    shown: str


def screened(outcome: Parsed, redact: tuple[str, ...]) -> tuple[Parsed, list[Found]]:
    """`outcome` with a mark in place of what `redact` names, and everything found in it; offsets are those of the new text."""
    spots = {kind: find(outcome.text) for kind, find in FINDERS.items()}
    gone = [spot for kind in redact for spot in spots[kind]]
    found = [Found(kind, spot.rule, 0, 0, excerpt(outcome.text, spot, spots)) for kind in redact for spot in spots[kind]]
    if gone:
        text = redacted(outcome.text, gone)
        title = redacted(outcome.title, [spot for kind in redact for spot in FINDERS[kind](outcome.title)])
        outcome = msgspec.structs.replace(outcome, text=text, title=title)
        spots = {kind: find(text) for kind, find in FINDERS.items()}
    found += [
        Found(kind, spot.rule, spot.start, spot.end, excerpt(outcome.text, spot, spots))
        for kind in FINDERS
        if kind not in redact
        for spot in spots[kind]
    ]
    found += [Found("hidden-text", kind, 0, 0, f"characters removed: {count}") for kind, count in outcome.hidden.items()]
    return outcome, found


def excerpt(text: str, spot: Spot, spots: dict[str, list[Spot]]) -> str:
    """The spot with what stands around it in its line, on one line; secrets and personal data in it are marked, not shown."""
    start = max(text.rfind("\n", 0, spot.start) + 1, spot.start - CONTEXT)
    end = min([at for at in (text.find("\n", spot.end), spot.end + CONTEXT) if at >= 0])
    near = [one for kind in ("secret", "personal-data") for one in spots[kind] if one.start < end and one.end > start]
    cut = [Spot(one.rule, max(one.start, start) - start, min(one.end, end) - start) for one in near]
    return " ".join(redacted(text[start:end], cut).split())


def dominant(documents: list[Document]) -> list[tuple[Document, Found]]:
    """Each document that makes up more than half of a source with many."""
    sizes: dict[str, list[int]] = {}
    for document in documents:
        sizes.setdefault(document.source, []).append(len(document.text))
    shares = [(document, len(document.text) / sum(sizes[document.source])) for document in documents]
    return [
        (document, Found("dominant-document", "share-of-source", 0, 0, f"{share:.0%} of the characters of {document.source}"))
        for document, share in shares
        if share > DOMINANT_SHARE and len(sizes[document.source]) >= DOMINANT_AMONG
    ]


def bursts(documents: list[Document]) -> list[tuple[Document, Found]]:
    """Each document of a group of near-identical ones."""
    numbers = near_duplicates([document.text for document in documents], LIKENESS)
    sizes = Counter(numbers)
    return [
        (document, Found("near-identical-pages", "burst", 0, 0, f"one of {sizes[number]} pages like {documents[number].path}"))
        for document, number in zip(documents, numbers, strict=True)
        if sizes[number] >= BURST
    ]


def finding(document: Document, found: Found) -> Finding:
    """The record of something found in a document."""
    id = content_id(document.id, found.kind, found.rule, found.start, found.shown)
    return Finding(id=id, parent_id=document.id, source=document.source, path=document.path, **msgspec.structs.asdict(found))


def main(
    raw: Path,
    documents_file: Path,
    failures_file: Path,
    findings_file: Path,
    metrics_file: Path,
    *,
    collect: Sources,
    ingest: Params,
) -> None:
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
        if outcome.reason == "unreadable" or outcome.sha256 not in ("", source.sha256):
            stage = "collect" if source.source in collect.sources else "collect_remote"
            again = f"dvc repro --force --single-item {stage}@{source.source}"
            raise BadInput(
                f"{file}: its SHA-256 is not the one in manifest.jsonl; it was changed or removed after collect. Run: {again}"
            )
        outcomes[waiting[number]] = outcome

    screenings = [
        (source, *screened(outcome, ingest.redact)) for source, outcome in zip(sources, outcomes, strict=True) if outcome
    ]
    done = [(source, outcome) for source, outcome, _ in screenings]
    documents, failures = sort_out(done)
    assert len(sources) == len(documents) + len(failures), "a file was lost"
    by_reason = dict(Counter(failure.reason for failure in failures))
    if not documents:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(by_reason.items())) or "no sources"
        raise BadInput(f"{raw}: none of {len(sources)} files gave text ({reasons}); name documents in collect in params.yaml")

    of_file = {(document.source, document.path): document for document in documents}
    found = [
        (document, one)
        for source, _, those in screenings
        if (document := of_file.get((source.source, source.path)))
        for one in those
    ]
    found += dominant(documents) + bursts(documents)
    findings = list(
        by_id(finding(document, one) for document, one in found).values()
    )  # one, where two look alike after redaction

    write_records(documents_file, documents)
    write_records(failures_file, failures)
    write_records(findings_file, findings)
    by_kind = dict(sorted(Counter(finding.kind for finding in findings).items()))
    metrics = {
        "files": len(sources),
        "documents": len(documents),
        "failures": len(failures),
        "characters": sum(len(document.text) for document in documents),
        "words": sum(len(document.text.split()) for document in documents),
        "hidden_characters": sum(sum(outcome.hidden.values()) for _, outcome in done),
        "findings": by_kind,
        "by_reason": by_reason,
        "by_type": dict(Counter(type_of(document.path) for document in documents)),
    }
    write_json(metrics_file, metrics)
    see = f" (see {failures_file})" if failures else ""
    counts = ", ".join(f"{count} {kind}" for kind, count in by_kind.items())
    also = f"; found: {counts} (see {findings_file})" if findings else ""
    say(f"ingest: {len(sources)} files = {len(documents)} documents + {len(failures)} failures{see}{also}")


if __name__ == "__main__":
    run(main)
