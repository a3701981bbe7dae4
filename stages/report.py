"""data/*.jsonl + reports/metrics + curves + coverage.png + params.yaml -> reports/report.md, report.html, loss.png, scores.png

Writes what a pull request shows: verdict, scores, samples, what was rejected, coverage, figures of the run, lineage. The same inputs
give the same bytes; no model runs, it takes a few seconds.
"""

import base64
import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from stages.files import new_file, sha256_of_file, write_text
from stages.pages import MAX_CELL, NOT_MEASURED, Row, counted, dig, measured, read_figures, rule_rows, template
from stages.params import Count
from stages.program import BadInput, BadParams, LimitBroken, run, say
from stages.records import Answer, Coverage, Document, Finding, Question, Rejected, Score, by_id, read_records
from stages.scoreboard import COLUMNS, Interval, Scoreboard, figure, in_order, read_scoreboard, score_rows
from stages.verdict import Gates, judge

MAX_CHARACTERS = 65_536  # GitHub's limit for one comment
MAX_SOURCES = 20
MAX_PATHS = 5  # of the documents with one kind of finding
REJECTED_EXAMPLES = 5
UNCOVERED_EXAMPLES = 10
SUITE = Path(__file__).with_name("validate_suite.yaml")
LINEAGE = (
    "documents",
    "chunks",
    "findings",
    "candidates",
    "measurements",
    "pairs",
    "rejected",
    "coverage",
    "train",
    "dev",
    "questions",
    "scores",
)
SETS = {
    "recall": ("Recall", "New wordings of facts that were trained: does the model know the documentation?"),
    "held_out": ("Held-out sections", "Sections that were never trained: what does the model say about what it cannot know?"),
}
Item = TypeVar("Item")


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the report shows besides numbers."""

    samples: Count  # questions whose answers are shown side by side


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of `items` at equal distances from the first to the last; the middle one for 1, all where there are fewer."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[len(items) // 2]]
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def pick_samples(questions: Sequence[Question], scores: Sequence[Score], count: int) -> list[Question]:
    """`count` questions, a third of them held out, spread from tuned's greatest gain over base to its greatest loss."""
    similarity = {(score.question_id, score.system): score.similarity for score in scores}
    ordered = sorted(questions, key=lambda one: (similarity[one.id, "base"] - similarity[one.id, "tuned"], one.id))
    recall, held_out = ([one for one in ordered if one.set == name] for name in SETS)
    from_held_out = min(len(held_out), count // 3)
    return spread(recall, count - from_held_out) + spread(held_out, from_held_out)


def answers_to(question: Question, answers: dict[tuple[str, str], Answer], scores: dict[str, Score]) -> dict[str, Any]:
    """`question` with a row per system: name, its answer, the answer's similarity to the reference."""
    systems = in_order([system for asked, system in answers if asked == question.id])
    rows = [("reference", question.reference, "")]
    for system in systems:
        answer = answers[question.id, system]
        rows.append((system, answer.text.strip() or "(empty)", figure(scores[answer.id].similarity)))
    return {"set": SETS[question.set][0], "question": question.question, "rows": rows}


def duration(seconds: float | None) -> str:
    """As `1 h 2 min`, `12 min 5 s` or `5.2 s`."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def run_rows(train: dict[str, Any], export: dict[str, Any], answer: dict[str, Any], systems: Sequence[str]) -> list[Row]:
    """The table that the recipe ends with, for this run: time, trainer, sizes, speeds, memory, accelerator."""
    rows: list[Row] = [
        ("Training time", duration(dig(train, "seconds"))),
        ("Trainer", measured(dig(train, "trainer"))),
        ("Accelerator", measured(dig(train, "device"))),
        ("Steps", measured(dig(train, "steps"), "{:,}")),
        ("Training speed", measured(dig(train, "tokens_per_s"), "{:,.0f} tokens/s")),
        ("Peak memory in training", measured(dig(train, "peak_memory_mb"), "{:,.0f} MB")),
        ("Final training loss", measured(dig(train, "final_loss"), "{:.3f}")),
        ("Dev loss", measured(dig(train, "dev_loss"), "{:.3f}")),
    ]
    for name in sorted(dig(export, "files") or {}):
        size = dig(export, "files", name, "bytes")
        rows.append((f"Size of {name}", measured(None if size is None else size / 1e6, "{:,.1f} MB")))
    for system in systems:
        rows.append((f"Inference speed, {system}", measured(dig(answer, "systems", system, "tokens_per_s"), "{:,.0f} tokens/s")))
    return rows


def quality_rows(ingest: dict[str, Any], measure: dict[str, Any], validate: dict[str, Any], split: dict[str, Any]) -> list[Row]:
    """What was found in documents and pairs besides broken rules, what people decided, and which pairs nobody trains on."""
    return [
        ("Findings in the documents", counted(dig(ingest, "findings"))),
        ("Candidates with a secret", measured(dig(measure, "with_secrets"), "{:,}")),
        ("Candidates with personal data", measured(dig(measure, "with_personal_data"), "{:,}")),
        ("Clusters of like candidates", measured(dig(measure, "clusters"), "{:,}")),
        ("Candidates in the largest cluster", measured(dig(measure, "largest_cluster"), "{:,}")),
        *[(f"Review: {name}", measured(dig(validate, "review", name), "{:,}")) for name in ("accepted", "edited", "rejected")],
        ("Review: evidence no longer there", measured(dig(validate, "review", "stale"), "{:,}")),
        ("Pairs not used", measured(dig(split, "unused"), "{:,}")),
        ("Why not used", counted(dig(split, "unused_by_reason"))),
    ]


def finding_rows(findings: Sequence[Finding]) -> list[Row]:
    """A row per kind of finding: kind, how many, in which files. What was found is not shown."""
    rows: list[Row] = []
    for kind, count in sorted(Counter(one.kind for one in findings).items()):
        paths = sorted({f"{one.source}/{one.path}" for one in findings if one.kind == kind})
        more = [f"and {len(paths) - MAX_PATHS} more"] if len(paths) > MAX_PATHS else []
        rows.append((kind, f"{count:,}", ", ".join(paths[:MAX_PATHS] + more)))
    return rows


def uncovered_rows(sections: Sequence[Coverage]) -> list[Row]:
    """The sections without a pair as rows of main reason, rejected candidates and section; those with most candidates first."""
    bare = sorted((one for one in sections if not one.pairs), key=lambda one: (-one.rejected, one.source, one.path, one.start))
    return [(one.reason, f"{one.rejected:,}", " > ".join((one.path, *one.heading_path))) for one in bare]


def source_rows(documents: Sequence[Document]) -> list[Row]:
    """A row per source and revision: source, documents, revision; at most MAX_SOURCES, then one that counts the rest."""
    counts = sorted(Counter((document.source, document.revision) for document in documents).items())
    rows: list[Row] = [(source, str(count), revision or "files without a revision") for (source, revision), count in counts]
    left_out = rows[MAX_SOURCES:]
    return rows[:MAX_SOURCES] + ([(f"and {len(left_out)} more", "", "")] if left_out else [])


def in_one_comment(template: Any, context: dict[str, Any]) -> str:
    """report.md, with as many samples as fit into a comment. Raises LimitBroken when it does not fit without any."""
    samples = context["samples"]
    for shown in range(len(samples), -1, -1):
        text: str = template.render(context | {"samples": samples[:shown], "left_out": len(samples) - shown})
        if len(text) <= MAX_CHARACTERS:
            return text
    raise LimitBroken(f"report.md has {len(text):,} characters without any sample; a comment holds {MAX_CHARACTERS:,}")


def read_curves(folder: Path) -> dict[str, list[tuple[float, ...]]]:
    """Rows of numbers by split, step and loss first, in the files' order. Raises BadInput for a line that is none."""
    curves: dict[str, list[tuple[float, ...]]] = {}
    for split in ("train", "dev"):
        path = folder / f"{split}.csv"
        with open(path, newline="", encoding="utf-8") as lines:
            _, *rows = csv.reader(lines)
        for number, row in enumerate(rows, start=2):
            try:
                step, loss, *others = map(float, row)
            except ValueError:
                raise BadInput(
                    f"{path}:{number}: {','.join(row)} does not begin with step,loss. Rebuild: dvc repro --force train"
                ) from None
            curves.setdefault(split, []).append((step, loss, *others))
    return curves


def draw_scores(scoreboard: Scoreboard, path: Path) -> None:
    """A PNG with a panel per question set: bars of similarity and ROUGE-L by system, with their intervals."""
    from matplotlib.figure import Figure

    sets = scoreboard.sets()
    picture = Figure(figsize=(11 if len(sets) > 1 else 6, 3.8), dpi=144, layout="constrained")
    panels = picture.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for panel, (name, scores) in zip(panels, sets.items(), strict=True):
        systems = in_order(list(scores.systems))
        for shift, measure, label, colour in (
            (-0.2, "similarity", "similarity", "#3b6fb6"),
            (0.2, "rouge_l", "ROUGE-L", "#d9a441"),
        ):
            found: list[Interval] = [getattr(scores.systems[system], measure) for system in systems]
            places = [place + shift for place in range(len(systems))]
            panel.bar(places, [one.mean for one in found], width=0.37, color=colour, label=label, zorder=2)
            for place, one in zip(places, found, strict=True):
                low, high = (one.mean if end is None else end for end in (one.low, one.high))
                if low != high:
                    whiskers = [[max(0.0, one.mean - low)], [max(0.0, high - one.mean)]]
                    panel.errorbar(place, one.mean, yerr=whiskers, color="#222222", capsize=3, linewidth=1.1, zorder=3)
                panel.text(place, max(high, 0.0) + 0.015, f"{one.mean:.2f}", ha="center", va="bottom", fontsize=8)
        panel.set_xticks(range(len(systems)), systems)
        panel.set_title(f"{SETS[name][0]} (n = {scores.systems['base'].n})", fontsize=10)
        _tidy(panel)
    panels[0].set_ylim(top=1.1)
    panels[0].set_ylabel("mean score")
    handles, labels = panels[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _save(picture, path)


def draw_loss(curves: dict[str, list[tuple[float, ...]]], path: Path) -> None:
    """A PNG of training and dev loss by step, and of the learning rate behind them."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 3.2), dpi=144, layout="constrained")
    panel = picture.subplots()
    for split, colour, marker in (("train", "#3b6fb6", ""), ("dev", "#c2452d", "o")):
        if split in curves:
            steps, losses, *others = zip(*curves[split], strict=True)
            panel.plot(
                steps, losses, color=colour, marker=marker or ("o" if len(steps) == 1 else None), markersize=4, label=split
            )
            if others:
                rate = panel.twinx()
                rate.fill_between(steps, others[0], color="#888888", alpha=0.12, linewidth=0)
                rate.set_ylim(bottom=0)
                rate.set_ylabel("learning rate (grey)", fontsize=8)
                rate.spines[["top"]].set_visible(False)
    if curves:
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=9)
    else:
        panel.text(0.5, 0.5, "no loss was logged", ha="center", va="center", transform=panel.transAxes)
    panel.set_xlabel("step")
    panel.set_ylabel("loss")
    _tidy(panel)
    _save(picture, path)


def _tidy(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#dddddd", linewidth=0.7, zorder=0)
    panel.set_axisbelow(True)


def _save(picture: Any, path: Path) -> None:
    with new_file(path) as draft:
        picture.savefig(draft, format="png", metadata={"Software": None})  # else the bytes name matplotlib's version


def _image(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _lineage(data: Path) -> list[Row]:
    paths = [data / f"{name}.jsonl" for name in LINEAGE] + sorted((data / "answers").glob("*.jsonl"))
    return [
        (path.relative_to(data).as_posix(), f"{len(path.read_bytes().splitlines()):,}", sha256_of_file(path)[:12])
        for path in paths
        if path.is_file()
    ]


def main(
    data: Path,
    metrics: Path,
    curves: Path,
    params: Path,
    coverage_picture: Path,
    markdown: Path,
    page: Path,
    loss_picture: Path,
    scores_picture: Path,
    report: Params,
    promote: Gates,
) -> None:
    import yaml

    settings = yaml.safe_load(params.read_text(encoding="utf-8"))
    served = dig(settings, "export", "serve")
    if not served:
        raise BadParams(f"{params}: export.serve is missing; it names the quant that is shipped, as q8_0")
    board = read_scoreboard(metrics / "evaluate.json")
    ingest, measure, judged, validate, coverage, split, train, export, answer = (
        read_figures(metrics / f"{name}.json")
        for name in ("ingest", "measure", "judge", "validate", "coverage", "split", "train", "export", "answer")
    )
    questions = read_records(data / "questions.jsonl", Question)
    said = [one for path in sorted((data / "answers").glob("*.jsonl")) for one in read_records(path, Answer)]
    answers = {(one.question_id, one.system): one for one in said}
    scores = by_id(read_records(data / "scores.jsonl", Score))
    rejected = read_records(data / "rejected.jsonl", Rejected)
    draw_scores(board, scores_picture)
    draw_loss(read_curves(curves), loss_picture)
    context = {
        "verdict": judge(board, served, promote),
        "served": served,
        "confidence": f"{100 * board.confidence:g} %",
        "columns": COLUMNS,
        "sets": [
            {
                "title": SETS[name][0],
                "meaning": SETS[name][1],
                "sections": one.sections,
                "rows": score_rows(one),
            }
            for name, one in board.sets().items()
        ],
        "counts": [measured(dig(validate, name), "{:,}") for name in ("candidates", "pairs", "rejected")],
        "judge": ("used" if dig(judged, "used") else "not used", measured(dig(judged, "why"))),
        "by_rule": rule_rows(SUITE, (dig(validate, "by_rule") or {}) | (dig(validate, "flagged") or {})),
        "quality": quality_rows(ingest, measure, validate, split),
        "findings": finding_rows(read_records(data / "findings.jsonl", Finding)),
        "rejected": [(", ".join(one.rules), one.question, one.answer) for one in spread(rejected, REJECTED_EXAMPLES)],
        "covered": [
            measured(dig(coverage, name), form) for name, form in (("sections", "{:,}"), ("covered", "{:,}"), ("share", "{:.1%}"))
        ],
        "pairs_by": [(name, counted(dig(coverage, f"pairs_by_{name}"))) for name in ("type", "recipe")],
        "why_uncovered": counted(dig(coverage, "uncovered")),
        "uncovered": uncovered_rows(read_records(data / "coverage.jsonl", Coverage)),
        "max_uncovered": UNCOVERED_EXAMPLES,
        "samples": [
            answers_to(question, answers, scores) for question in pick_samples(questions, list(scores.values()), report.samples)
        ],
        "run": run_rows(train, export, answer, in_order(list(board.recall.systems))),
        "sources": source_rows(read_records(data / "documents.jsonl", Document)),
        "files": _lineage(data),
        "models": [
            ("Base model", str(dig(settings, "models", "base"))),
            ("Base model, SHA-256", measured(dig(export, "base_sha256") or dig(train, "base_sha256"))),
            ("Chat template and system prompt, SHA-256", measured(dig(export, "chat_sha256") or dig(train, "chat_sha256"))),
        ],
        "params": params.read_text(encoding="utf-8"),
        "max_cell": MAX_CELL,
        "max_characters": f"{MAX_CHARACTERS:,}",
    }
    shown = {"scores": scores_picture, "loss": loss_picture, "coverage": coverage_picture}
    pictures = {name: Path(os.path.relpath(path, markdown.parent)).as_posix() for name, path in shown.items()}
    write_text(markdown, in_one_comment(template("report.md.jinja"), context | {"pictures": pictures}))
    images = {name: _image(path) for name, path in shown.items()}
    write_text(page, template("report.html.jinja").render(context | {"pictures": images}))
    verdict = context["verdict"]
    say(f"report: {verdict.outcome}: {verdict.reason}")
    say(f"report: {markdown} and {page}")


if __name__ == "__main__":
    run(main)
