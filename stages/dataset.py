"""data/*.jsonl + manifests + reports/metrics + params.yaml -> data/dataset: train, validation, recall, held_out .jsonl and a card, README.md.

`datasets.load_dataset("data/dataset")` reads the folder, and the Hugging Face hub shows it. Each row leads back to its paragraphs. The
card tells the figures of this run and never the text of a finding; the same inputs give the same bytes. Costs a second.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec

from stages.files import new_folder, write_text
from stages.pages import dig, measured, read_figures, rule_rows, template
from stages.program import BadInput, run, say
from stages.records import (
    Document,
    Example,
    Finding,
    Message,
    Offset,
    Pair,
    Question,
    QuestionType,
    Record,
    Source,
    Text,
    by_id,
    read_records,
    write_records,
)

SUITE = Path(__file__).with_name("validate_suite.yaml")
SPLITS = {
    "train": "what the model is trained on: single questions, and conversations of several",
    "validation": "other wordings of trained facts, for the loss during training",
    "recall": "other wordings of trained facts, to ask whether the model knows them",
    "held_out": "sections that no other split has seen, to ask what the model says about what it cannot know",
}
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))  # the hub's names
MIN_LANGUAGE_SHARE = 0.05  # of candidates; a few words are taken for another language now and then
LICENCE_FILE = re.compile(r"(?i:licen[cs]e|copying|notice)(-[A-Z0-9.-]+)?(\.\w+)?")
METRICS = ("ingest", "generate", "judge", "measure", "validate", "coverage", "split")
SHAPING = (
    "ingest",
    "chunk",
    "generate",
    "judge",
    "measure",
    "validate",
    "split",
)  # sections of params.yaml that decide what the data is
OF_THE_MACHINE = (
    "endpoints",
    "engine",
    "concurrency",
    "timeout_s",
    "max_memory_mb",
)  # settings in them that do not, and may name servers


class Stated(msgspec.Struct, frozen=True):
    """What params.yaml says of a source's licence; "" for nothing."""

    license: str = ""


class Sources(msgspec.Struct, frozen=True):
    sources: dict[str, Stated]
    remotes: dict[str, Stated]


class Evidence(msgspec.Struct, frozen=True):
    """Where the answer to one question of a row comes from."""

    pair_id: Text
    type: QuestionType
    source: Text
    path: Text  # inside the source
    heading_path: tuple[str, ...]
    quote: Text
    quote_start: Offset  # characters into the file's text as Markdown
    quote_end: Offset
    sha256: Text  # of the file
    revision: str  # git commit or URL of origin; empty for a plain file
    reviewed: bool  # a person accepted or edited the pair
    flags: tuple[str, ...]  # rules that report and do not reject


class Row(Record, frozen=True):
    """A conversation, and one Evidence for each of its questions, none where it is general. id = that of the Example or Question."""

    messages: tuple[Message, ...]
    evidence: tuple[Evidence, ...]


def evidence_of(pair_id: str, pairs: Mapping[str, Pair], documents: Mapping[str, Document]) -> Evidence:
    """The evidence of a pair. Raises BadInput where the pair or its document is not there."""
    if pair_id not in pairs:
        raise BadInput(f"the pair {pair_id} is used, but pairs.jsonl does not hold it. Re-run: dvc repro split")
    pair = pairs[pair_id]
    if pair.document_id not in documents:
        raise BadInput(
            f"the pair {pair_id} names document {pair.document_id}, which documents.jsonl does not hold. Re-run: dvc repro generate"
        )
    document = documents[pair.document_id]
    return Evidence(
        pair_id=pair.id,
        type=pair.type,
        source=document.source,
        path=pair.path,
        heading_path=pair.heading_path,
        quote=pair.quote,
        quote_start=pair.quote_start,
        quote_end=pair.quote_end,
        sha256=document.sha256,
        revision=document.revision,
        reviewed=pair.reviewed,
        flags=pair.flags,
    )


def asked(question: Question) -> tuple[Message, ...]:
    return Message("user", question.question), Message("assistant", question.reference)


def split_rows(splits: Mapping[str, Sequence[Row]]) -> list[tuple[str, ...]]:
    """(split, rows, questions, a count for each type, what it is for) of each split."""
    types = {name: Counter(one.type for row in rows for one in row.evidence) for name, rows in splits.items()}
    return [
        (
            name,
            f"{len(rows):,}",
            f"{types[name].total():,}",
            *[f"{types[name][kind]:,}" for kind in get_args(QuestionType)],
            purpose,
        )
        for (name, purpose), rows in zip(SPLITS.items(), splits.values(), strict=True)
    ]


def source_rows(
    documents: Iterable[Document], stated: Mapping[str, Stated], files: Mapping[str, Sequence[str]]
) -> list[tuple[str, ...]]:
    """(source, documents, revision, licence as stated, licence files) of each source that gave a document."""
    revisions: dict[str, Counter[str]] = {}
    for document in documents:
        revisions.setdefault(document.source, Counter())[document.revision] += 1
    rows: list[tuple[str, ...]] = []
    for name, found in sorted(revisions.items()):
        one = next(iter(found)) if len(found) == 1 else f"{len(found):,} revisions"
        names = ", ".join(files.get(name, ())) or "none found"
        rows.append((name, f"{found.total():,}", one or "files without a revision", stated[name].license or "not stated", names))
    return rows


def hub_licences(stated: Iterable[str]) -> list[str]:
    """Licences for the card's front matter: none unless every source states one; words that are no identifier become `other`."""
    stated = list(stated)
    return sorted({one.lower() if re.fullmatch(r"[\w.+-]+", one) else "other" for one in stated}) if all(stated) else []


def main_languages(counts: dict[str, int] | None) -> list[str]:
    """ISO 639-1 codes of the languages with a share worth naming, by name."""
    counts = counts or {}
    return sorted(name for name, count in counts.items() if len(name) == 2 and count >= MIN_LANGUAGE_SHARE * sum(counts.values()))


def shaping_settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `params` that decide what the data is."""
    sections = {name: dig(params, name) or {} for name in SHAPING}
    return {name: {key: one[key] for key in one if key not in OF_THE_MACHINE} for name, one in sections.items() if one}


def teacher_of(params: Mapping[str, Any]) -> str:
    """The name of the model that chose the words: that of the endpoints, where there are any."""
    served = {endpoint["model"] for endpoint in dig(params, "generate", "endpoints") or []}
    return ", ".join(sorted(served)) or measured(dig(params, "models", "teacher"))


def main(data: Path, metrics: Path, params: Path, out: Path, *, collect: Sources) -> None:
    import yaml

    settings = yaml.safe_load(params.read_text(encoding="utf-8"))
    pairs, documents = by_id(read_records(data / "pairs.jsonl", Pair)), by_id(read_records(data / "documents.jsonl", Document))
    findings = read_records(data / "findings.jsonl", Finding)
    train, dev = (read_records(data / f"{name}.jsonl", Example) for name in ("train", "dev"))
    questions = read_records(data / "questions.jsonl", Question)
    said = [
        *[("train", one.id, one.messages, one.pair_ids) for one in train],
        *[("validation", one.id, one.messages, one.pair_ids) for one in dev],
        *[(one.set, one.id, asked(one), (one.pair_id,)) for one in questions],
    ]
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for split, id, messages, pair_ids in said:
        found = tuple(evidence_of(pair_id, pairs, documents) for pair_id in pair_ids)
        splits[split].append(Row(id=id, messages=messages, evidence=found))
    figures = {name: read_figures(metrics / f"{name}.json") for name in METRICS}
    counts = (dig(figures, "validate", "by_rule") or {}) | (dig(figures, "validate", "flagged") or {})
    stated = collect.sources | collect.remotes
    manifests = {name: read_records(data / "raw" / name / "manifest.jsonl", Source) for name in sorted(stated)}
    top_files = {name: [one.path for one in files if LICENCE_FILE.fullmatch(one.path)] for name, files in manifests.items()}
    sources = sorted({document.source for document in documents.values()})
    is_judged = bool(dig(figures, "judge", "used"))
    total = sum(map(len, splits.values()))
    general = sum(not one.evidence for one in splits["train"])
    kinds = Counter(one.kind for one in findings)
    card = template("dataset_card.md.jinja").render(
        figure=lambda *keys, form="{:,}": measured(dig(figures, *keys), form),
        counts_of=lambda *keys: dig(figures, *keys),
        name=", ".join(sources) if len(sources) < 4 else f"{len(sources)} sources",
        licences=hub_licences([*(stated[name].license for name in sources), *["Apache-2.0"][:general]]),
        languages=main_languages(dig(figures, "measure", "languages")),
        size=next((name for limit, name in SIZES if total < limit), "1M<n<10M"),
        splits=[name for name, rows in splits.items() if rows],
        split_rows=split_rows(splits),
        types=get_args(QuestionType),
        rows=total - general,
        general=general,
        documents=len(documents),
        sources=source_rows(documents.values(), stated, top_files),
        teacher=teacher_of(settings),
        embedder=measured(dig(settings, "models", "embedder")),
        entailed_by=dig(figures, "measure", "entailed_by"),
        is_nli=bool(dig(settings, "measure", "nli")),
        recipe=measured(dig(settings, "generate", "recipe")),
        is_tested=bool(counts),
        rules=rule_rows(SUITE, counts),
        # a judge that was not used has found nothing, which is no praise
        kept_rules=[rule for rule, count in counts.items() if not count and (is_judged or not rule.startswith("judge-"))],
        flags=Counter(flag for pair in pairs.values() for flag in pair.flags),
        reviewed=sum(pair.reviewed for pair in pairs.values()),
        pairs=len(pairs),
        findings=[
            (kind, f"{count:,}", f"{len({one.parent_id for one in findings if one.kind == kind}):,}")
            for kind, count in sorted(kinds.items())
        ],
        settings=yaml.safe_dump(shaping_settings(settings), sort_keys=False, allow_unicode=True, width=1000),
    )
    with new_folder(out) as draft:
        for name, rows in splits.items():
            if rows:  # `datasets` refuses a file without a row
                write_records(draft / f"{name}.jsonl", rows)
        write_text(draft / "README.md", card)
    say(f"dataset: {', '.join(f'{name} {len(rows)}' for name, rows in splits.items())}; card in {out}/README.md")


if __name__ == "__main__":
    run(main)
