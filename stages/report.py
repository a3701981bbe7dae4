"""data/*.jsonl + reports/metrics + curves + coverage.png + params.yaml -> reports/report.md, .html, .json, loss.png, scores.png

Writes what a pull request shows: verdict, gates, scores, samples, what was rejected, coverage, figures of the run, lineage. The same
inputs give the same bytes; no model runs, it takes a few seconds. What changed against another branch is the command `compare`'s.
"""

import base64
import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from stages.files import new_file, sha256_of_file, write_json, write_text
from stages.pages import (
    MAX_CELL,
    MAX_CHARACTERS,
    MEASURES,
    NOT_MEASURED,
    SETS,
    Row,
    chance,
    counted,
    dig,
    measured,
    read_figures,
    rule_rows,
    template,
)
from stages.params import Count
from stages.program import BadInput, LimitBroken, run, say
from stages.records import Answer, Coverage, Document, Finding, Question, Rejected, Score, by_id, read_records
from stages.scoreboard import Rated, Scoreboard, SetScores, brief, figure, in_order, read_scoreboard
from stages.verdict import Gate, Gates, judge

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
    "exam",
    "scores",
)
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
    """`count` questions, as many of each set as go, spread from tuned's greatest gain over base to its greatest loss."""
    by_answer = {(score.question_id, score.system): score for score in scores}

    def gain(question: Question) -> float:
        tuned, base = (getattr(by_answer[question.id, system], SETS[question.set].measure) for system in ("tuned", "base"))
        return 0.0 if tuned is None or base is None else tuned - base

    ordered = sorted(questions, key=lambda one: (-gain(one), one.id))
    by_set = {name: [one for one in ordered if one.set == name] for name in SETS}
    shares = Counter[str]()
    while sum(shares.values()) < min(count, len(questions)):  # a set with few questions leaves its share to the others
        open_sets = [name for name in by_set if shares[name] < len(by_set[name])]
        shares.update(open_sets[: count - sum(shares.values())])
    return [question for name, asked in by_set.items() for question in spread(asked, shares[name])]


def answers_to(question: Question, answers: dict[tuple[str, str], Answer], scores: dict[str, Score]) -> dict[str, Any]:
    """`question` with a row per system: name, its answer, the answer's similarity to the reference, whether it is right."""
    systems = in_order([system for asked, system in answers if asked == question.id])
    rows = [("reference", question.reference or "(that the documentation does not cover it)", "", "")]
    for system in systems:
        answer = answers[question.id, system]
        score = scores[answer.id]
        similarity = "" if score.similarity is None else figure(score.similarity)
        rows.append((system, answer.text.strip() or "(empty)", similarity, "yes" if score.passed else "no"))
    return {"set": SETS[question.set].title, "question": question.question, "rows": rows}


def gate_rows(gates: Sequence[Gate]) -> list[Row]:
    """A row per gate: name, outcome, figure with its interval, limit, and what it found in words."""
    return [
        (
            gate.name,
            gate.outcome,
            "" if gate.found is None else brief(gate.found),
            "" if gate.limit is None else f"{gate.limit:g}",
            gate.reason,
        )
        for gate in gates
    ]


def score_table(scores: SetScores, measure: str) -> tuple[Row, list[Row]]:
    """Head and a row per system: the set's own `measure`, the share that passed, both against base on the same questions."""
    head = ("system", MEASURES[measure], "passed", f"{MEASURES[measure]} over base", "won / lost", "p")
    rows: list[Row] = []
    for system in in_order(list(scores.systems)):
        one, against = scores.systems[system], scores.comparisons.get(f"{system}-base")
        gain = against.gains.get(measure) if against else None
        own = [brief(one.measures[name]) if name in one.measures else "" for name in (measure, "passed")]
        pairs = (f"{against.won} / {against.lost}", chance(against.p)) if against else ("", "")
        rows.append((system, *own, brief(gain) if gain else "", *pairs))
    return head, rows


def measure_table(scores: SetScores, measure: str) -> tuple[Row, list[Row]]:
    """Head and a row per system of what `score_table` leaves out: empty answers, the other measures, the gain over tuned."""
    others = [name for name in MEASURES if name not in (measure, "passed")]
    found = [name for name in others if any(name in one.measures for one in scores.systems.values())]
    head = ("system", "empty", *(MEASURES[name] for name in found), f"{MEASURES[measure]} over tuned")
    rows: list[Row] = []
    for system in in_order(list(scores.systems)):
        one, against = scores.systems[system], scores.comparisons.get(f"{system}-tuned")
        gain = against.gains.get(measure) if against else None
        own = [brief(one.measures[name]) if name in one.measures else "" for name in found]
        rows.append((system, str(one.empty), *own, brief(gain) if gain else ""))
    return head, rows


def type_table(scores: SetScores) -> tuple[Row, list[Row]]:
    """Head and a row per system: its similarity by question type; no row where there are no types."""
    kinds = sorted(scores.by_type)
    rows: list[Row] = [
        (system, *(brief(scores.by_type[kind][system]) if system in scores.by_type[kind] else "" for kind in kinds))
        for system in in_order(list(scores.systems))
    ]
    return ("system", *kinds), rows if kinds else []


def rated_in_words(rated: Rated) -> str:
    """How many answers a judge rated, or why none."""
    if not rated.used:
        return f"No judge rated the answers: {rated.why}."
    lost = f"{rated.unparsed:,} replies were unparsed and {rated.failed:,} calls failed"
    return f"A judge rated {rated.scored:,} of {rated.asked:,} answers from 1 to 5, and {lost}: {rated.why}."


def shown_set(name: str, scores: SetScores) -> dict[str, Any]:
    """What the templates show of one question set."""
    title, meaning, measure = SETS[name]
    unknown = scores.unknown
    tuned = scores.comparisons.get("tuned-base")
    return {
        "title": title,
        "meaning": meaning,
        "questions": scores.questions,
        "sections": scores.sections,
        "minimum_effect": figure(tuned.minimum_effect) if tuned and tuned.minimum_effect is not None else "",
        "scores": score_table(scores, measure),
        "measures": measure_table(scores, measure),
        "types": type_table(scores),
        "unknown": {"questions": unknown.questions, "scores": score_table(unknown, measure)} if unknown else None,
    }


def duration(seconds: float | None) -> str:
    """As `1 h 2 min`, `12 min 5 s` or `5.2 s`."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def run_rows(train: dict[str, Any], answer: dict[str, Any], systems: Sequence[str]) -> list[Row]:
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
    for system in systems:
        rows.append((f"Inference speed, {system}", measured(dig(answer, "systems", system, "tokens_per_s"), "{:,.0f} tokens/s")))
    return rows


def quant_rows(export: dict[str, Any], settings: dict[str, Any]) -> list[Row]:
    """(file, size, mean KL, same top token, verdict) of each GGUF file, smallest first; the first that passes ships."""
    limits = [dig(settings, "export", name) for name in ("max_kl", "min_same_top")]
    files = sorted((dig(export, "files") or {}).items(), key=lambda file: dig(file[1], "bytes") or 0)
    rows: list[Row] = []
    for name, file in files:
        kept = "passes" if dig(file, "passes") else f"fails: the limits are {limits[0]} and {limits[1]}"
        if dig(file, "quant") == dig(export, "serve"):
            kept = "ships: the smallest that passes"
        kl, top = (measured(dig(file, key), form) for key, form in (("mean_kl", "{:.4f}"), ("same_top", "{:.1%}")))
        size = dig(file, "bytes")
        rows.append((name, measured(None if size is None else size / 1e6, "{:,.1f} MB"), kl, top, kept))
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


def systems_of(board: Scoreboard) -> list[str]:
    """Every system that some question set was put to."""
    return in_order(sorted({system for one in board.sets.values() for system in one.systems}))


def model_rows(settings: dict[str, Any], board: Scoreboard) -> list[Row]:
    """What answered, and what it was asked with."""
    return [
        ("Base model", str(dig(settings, "models", "base"))),
        *[(f"{system}, SHA-256", board.models[system]) for system in in_order(list(board.models))],
        ("Chat template and system prompt, SHA-256", board.chat_sha256),
        ("Questions, SHA-256", board.questions_sha256),
    ]


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
    """A PNG with a panel per question set: a line per system with its main measure and the share that passed, and intervals."""
    from matplotlib.figure import Figure

    columns = min(3, len(scoreboard.sets))
    rows = -(-len(scoreboard.sets) // columns)
    systems = systems_of(scoreboard)
    size = (max(6.5, 4.2 * columns), 0.6 + rows * (0.9 + 0.36 * len(systems)))
    picture = Figure(figsize=size, dpi=144, layout="constrained")
    panels = picture.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, name in zip(panels, [name for name in SETS if name in scoreboard.sets], strict=False):
        scores = scoreboard.sets[name]
        for shift, measure, colour in ((-0.17, SETS[name].measure, "#3b6fb6"), (0.17, "passed", "#c98a1b")):
            found = {
                place + shift: scores.systems[system].measures[measure]
                for place, system in enumerate(systems)
                if system in scores.systems and measure in scores.systems[system].measures
            }
            means = [one.mean for one in found.values()]
            lows = [one.mean if one.low is None else one.low for one in found.values()]
            highs = [one.mean if one.high is None else one.high for one in found.values()]
            whiskers = [[max(0.0, mean - low) for mean, low in zip(means, lows, strict=True)]]
            whiskers += [[max(0.0, high - mean) for mean, high in zip(means, highs, strict=True)]]
            panel.errorbar(means, list(found), xerr=whiskers, fmt="o", color=colour, markersize=5, elinewidth=2.2, zorder=3)
            for place, mean, high in zip(found, means, highs, strict=True):
                number = panel.text(max(high, mean) + 0.02, place, f"{mean:.2f}", va="center", fontsize=7.5)
                number.set_in_layout(False)  # it lies inside the panel, and measuring it takes half of the time
        panel.set_title(f"{SETS[name].title}: {MEASURES[SETS[name].measure]} (n = {scores.questions})", fontsize=9.5)
        panel.set_yticks(range(len(systems)), systems, fontsize=9)
        panel.xaxis.set_tick_params(labelbottom=True, labelsize=8)
        _tidy(panel, "x")
    for panel in panels[len(scoreboard.sets) :]:
        panel.set_axis_off()
    panels[0].set_xlim(left=min(0.0, panels[0].get_xlim()[0]), right=1.15)
    panels[0].invert_yaxis()  # base on top, as in the tables
    for label, colour in (("measure in the title", "#3b6fb6"), ("share passed", "#c98a1b")):
        panels[0].plot([], [], color=colour, marker="o", markersize=5, linewidth=2.2, label=label)
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


def _tidy(panel: Any, axis: str = "y") -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis=axis, color="#dddddd", linewidth=0.7, zorder=0)
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
    summary: Path,
    loss_picture: Path,
    scores_picture: Path,
    report: Params,
    promote: Gates,
) -> None:
    import yaml

    settings = yaml.safe_load(params.read_text(encoding="utf-8"))
    board = read_scoreboard(metrics / "evaluate.json")
    figures = {path.stem: read_figures(path) for path in sorted(metrics.glob("*.json"))}
    ingest, measure, validate, split, train, export, answer = (
        figures.get(name, {}) for name in ("ingest", "measure", "validate", "split", "train", "export", "answer")
    )
    served = dig(export, "serve")
    if not served:
        raise BadInput(f"{metrics / 'export.json'} does not say which file ships. Run: dvc repro --force export")
    questions = read_records(data / "exam.jsonl", Question)
    said = [one for path in sorted((data / "answers").glob("*.jsonl")) for one in read_records(path, Answer)]
    answers = {(one.question_id, one.system): one for one in said}
    scores = by_id(read_records(data / "scores.jsonl", Score))
    rejected = read_records(data / "rejected.jsonl", Rejected)
    verdict = judge(board, served, promote, figures)
    rows = {
        "by_rule": rule_rows(SUITE, (dig(validate, "by_rule") or {}) | (dig(validate, "flagged") or {})),
        "quality": quality_rows(ingest, measure, validate, split),
        "run": run_rows(train, answer, systems_of(board)),
        "sources": source_rows(read_records(data / "documents.jsonl", Document)),
        "files": _lineage(data),
        "models": model_rows(settings, board),
        "quants": quant_rows(export, settings),
    }
    draw_scores(board, scores_picture)
    draw_loss(read_curves(curves), loss_picture)
    context = rows | {
        "verdict": verdict,
        "gates": gate_rows(verdict.gates),
        "served": served,
        "rated": rated_in_words(board.judge),
        "confidence": f"{100 * board.confidence:g} %",
        "sets": [shown_set(name, board.sets[name]) for name in SETS if name in board.sets],
        "counts": [measured(dig(validate, name), "{:,}") for name in ("candidates", "pairs", "rejected")],
        "judge": ("used" if dig(figures, "judge", "used") else "not used", measured(dig(figures, "judge", "why"))),
        "findings": finding_rows(read_records(data / "findings.jsonl", Finding)),
        "rejected": [(", ".join(one.rules), one.question, one.answer) for one in spread(rejected, REJECTED_EXAMPLES)],
        "covered": [
            measured(dig(figures, "coverage", name), form)
            for name, form in (("sections", "{:,}"), ("covered", "{:,}"), ("share", "{:.1%}"))
        ],
        "pairs_by": [(name, counted(dig(figures, "coverage", f"pairs_by_{name}"))) for name in ("type", "recipe")],
        "why_uncovered": counted(dig(figures, "coverage", "uncovered")),
        "uncovered": uncovered_rows(read_records(data / "coverage.jsonl", Coverage)),
        "max_uncovered": UNCOVERED_EXAMPLES,
        "samples": [
            answers_to(question, answers, scores) for question in pick_samples(questions, list(scores.values()), report.samples)
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
    ruling = {"outcome": verdict.outcome, "reason": verdict.reason, "gates": verdict.gates}
    write_json(summary, {"verdict": ruling, "served": served, **rows})
    say(f"report: {verdict.outcome}: {verdict.reason}")
    say(f"report: {markdown}, {page} and {summary}")


if __name__ == "__main__":
    run(main)
