"""data/chunks.jsonl + what came of them -> data/coverage.jsonl + reports/coverage.png: a map of the documentation, section by section.

Shows which sections have pairs and which have none, and why. Every chunk, candidate, pair, rejected row and failure is counted in
one section, and a failure that names no chunk is counted apart. Costs a second; no model runs.
"""

from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.files import new_file, write_json
from stages.program import BadInput, run, say
from stages.records import Candidate, Chunk, Coverage, Document, Failure, Pair, Rejected, by_id, read_records, write_records

NOT_CHOSEN = "not-chosen"  # the reason of generate for a chunk beyond generate.max_chunks
SECOND_TRIES = ("heading", "open")  # recipes of generate for a section whose first try gave nothing
FROM = (1, 3, 6)  # pairs at which a cell gets darker
LEVELS = (
    ("not asked", "#d4d7db"),
    ("no pair", "#e66100"),
    ("1 or 2 pairs", "#b5d3ec"),
    ("3 to 5", "#5b9bd0"),
    ("6 or more", "#14477d"),
)
SOFT = "#5c6673"
MAX_ROWS = 40
CELLS = 48  # in one row; a longer document goes on in the next
MIN_CELLS = 20  # that a row has room for, so that few sections do not become broad bars
LABEL = 44  # characters of a path


def coverage_of(
    chunks: Sequence[Chunk],
    sources: Mapping[str, str],
    candidates: Iterable[Candidate],
    failures: Iterable[Failure],
    passed: Collection[str],
    broken: Mapping[str, Sequence[str]],
) -> list[Coverage]:
    """A record for each section of `chunks`, in reading order of each document.

    `sources`: document id -> source; `passed`: ids of pairs; `broken`: id of a rejected candidate -> rules. Failures that name no chunk
    are left out.
    """
    pieces, asked, lost = defaultdict(list), defaultdict(list), defaultdict(list)
    for chunk in sorted(chunks, key=lambda chunk: (chunk.path, chunk.start)):
        pieces[chunk.section_id].append(chunk)
    section_of = {chunk.id: chunk.section_id for chunk in chunks}
    for candidate in candidates:
        asked[section_of[candidate.chunk_id]].append(candidate)
    for failure in failures:
        if failure.parent_id in section_of:
            lost[section_of[failure.parent_id]].append(failure.reason)
    records = []
    for section, (first, *rest) in pieces.items():
        pairs = [candidate for candidate in asked[section] if candidate.id in passed]
        rejected = [broken[candidate.id] for candidate in asked[section] if candidate.id in broken]
        rules, reasons = Counter(rule for rules in rejected for rule in rules), Counter(lost[section])
        records.append(
            Coverage(
                id=section,
                source=sources[first.document_id],
                path=first.path,
                heading_path=first.heading_path,
                start=first.start,
                chunks=1 + len(rest),
                facts=len({candidate.fact_id for candidate in asked[section]}),
                candidates=len(asked[section]),
                pairs=len(pairs),
                pairs_by_type=in_order(Counter(pair.type for pair in pairs)),
                pairs_by_recipe=in_order(Counter(pair.recipe for pair in pairs)),
                rejected=len(rejected),
                rejected_by_rule=in_order(rules),
                failures_by_reason=in_order(reasons),
                retried=any(candidate.recipe in SECOND_TRIES for candidate in asked[section]) or "nothing-sound" in reasons,
                reason="" if pairs else main_reason(rules + reasons),
            )
        )
    return records


def main_reason(counts: Mapping[str, int]) -> str:
    """The rule or reason that is counted most, the first by name of equals; `not-chosen` only where nothing else is counted."""
    return min(counts, key=lambda name: (name == NOT_CHOSEN, -counts[name], name), default="nothing-recorded")


def in_order(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def covered_share(records: Sequence[Coverage]) -> dict[str, Any]:
    """How many sections there are, how many have a pair, and that share."""
    covered = sum(1 for record in records if record.pairs)
    return {"sections": len(records), "covered": covered, "share": round(covered / len(records), 4)}


def added(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    return sum(map(Counter, counts), Counter())


def by_document(records: Iterable[Coverage]) -> list[tuple[str, list[Coverage]]]:
    """(source/path, its sections in reading order), the smallest covered share first; of equal shares the longest."""
    documents: dict[str, list[Coverage]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record.start):
        documents[f"{record.source}/{record.path}"].append(record)
    return sorted(documents.items(), key=lambda one: (covered_share(one[1])["share"], -len(one[1]), one[0]))


def level(record: Coverage) -> int:
    """The place in LEVELS of a section's colour."""
    return 0 if record.reason == NOT_CHOSEN else 1 + bisect(FROM, record.pairs)


def draw(records: Sequence[Coverage], path: Path) -> None:
    """A PNG with a row of cells for each document, worst covered first, and a cell for each section, coloured by its pairs."""
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows: list[tuple[str, str, list[Coverage]]] = []  # name, share, sections
    for name, sections in by_document(records):
        found = covered_share(sections)
        for start in range(0, len(sections), CELLS):
            is_last = start + CELLS >= len(sections)
            share = f"{found['covered']} of {found['sections']}" if is_last else ""
            rows.append(("" if start else name, share, sections[start : start + CELLS]))
    rest = [record for _, _, sections in rows[MAX_ROWS:] for record in sections]
    rows = rows[:MAX_ROWS]
    width = max(MIN_CELLS, *(len(sections) for _, _, sections in rows))
    grid = np.full((len(rows), width), np.nan)
    for place, (_, _, sections) in enumerate(rows):
        grid[place, : len(sections)] = [level(record) for record in sections]
    picture = Figure(figsize=(9, 1.3 + 0.2 * len(rows)), dpi=144, layout="constrained")
    panel = picture.subplots()
    colours = ListedColormap([colour for _, colour in LEVELS])
    panel.pcolormesh(grid, cmap=colours, vmin=-0.5, vmax=len(LEVELS) - 0.5, edgecolors="white", linewidth=1.6)
    panel.invert_yaxis()
    for place, (_, share, sections) in enumerate(rows):
        panel.text(len(sections) + 0.25, place + 0.5, share, va="center_baseline", fontsize=8, color=SOFT)
    panel.set_xlim(0, 1.09 * width)  # room for the last row's share
    names = [name if len(name) <= LABEL else f"…{name[1 - LABEL :]}" for name, _, _ in rows]
    panel.set_yticks([place + 0.5 for place in range(len(rows))], names, fontsize=8, parse_math=False)
    panel.set_xticks([])
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set_title(
        "A row is a document, worst covered first; a cell is a section, in reading order", fontsize=9, color=SOFT, loc="left"
    )
    if rest:
        found, pages = covered_share(rest), len({(record.source, record.path) for record in rest})
        more = f"and {found['sections']} more sections in {pages} documents, {found['covered']} of them with a pair"
        panel.set_xlabel(more, fontsize=8, color=SOFT, loc="left")
    total = covered_share(records)
    picture.suptitle(f"{total['covered']} of {total['sections']} sections have a pair", fontsize=12, fontweight="bold")
    keys = [Patch(color=colour, label=label) for label, colour in LEVELS]
    picture.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=9)
    with new_file(path) as draft:
        picture.savefig(draft, format="png", metadata={"Software": None})  # else the bytes name matplotlib's version


def main(
    documents: Path,
    chunks: Path,
    candidates: Path,
    failures: Path,
    pairs: Path,
    rejected: Path,
    coverage: Path,
    metrics: Path,
    picture: Path,
) -> None:
    cut = read_records(chunks, Chunk)
    chunk_ids = by_id(cut).keys()
    asked = read_records(candidates, Candidate)
    passed = by_id(read_records(pairs, Pair)).keys()
    broken = {row.id: row.rules for row in read_records(rejected, Rejected)}
    lost = read_records(failures, Failure)
    if stray := [candidate.id for candidate in asked if candidate.chunk_id not in chunk_ids]:
        raise BadInput(f"{candidates}: {stray[0]} names a chunk that {chunks} does not hold. Re-run: dvc repro generate")
    if stray := sorted((passed | broken.keys()) ^ by_id(asked).keys()) or sorted(passed & broken.keys()):
        raise BadInput(
            f"{candidates}: {stray[0]} must be in {pairs} or in {rejected}, and in one of them alone. Re-run: dvc repro validate"
        )
    sources = {document.id: document.source for document in read_records(documents, Document)}
    records = coverage_of(cut, sources, asked, lost, passed, broken)
    retried = [record for record in records if record.retried]
    total = covered_share(records) | {
        "uncovered": Counter(record.reason for record in records if not record.pairs),
        "retried": len(retried),
        "retried_covered": sum(1 for record in retried if record.pairs),
        "pairs_by_type": added(record.pairs_by_type for record in records),
        "pairs_by_recipe": added(record.pairs_by_recipe for record in records),
        "failures_elsewhere": Counter(failure.reason for failure in lost if failure.parent_id not in chunk_ids),
        "sources": {
            source: covered_share([record for record in records if record.source == source])
            for source in {record.source for record in records}
        },
    }
    write_records(coverage, records)
    write_json(metrics, total)
    draw(records, picture)
    why = ", ".join(f"{reason} {count}" for reason, count in total["uncovered"].most_common())
    say(
        f"coverage: {total['covered']} of {total['sections']} sections have a pair ({total['share']:.1%}); without one: {why or 'none'}"
    )


if __name__ == "__main__":
    run(main)
