"""reports + another git revision -> reports/pull-request.md: the report, with what this branch changes, for a comment

Compares with the commit that this branch and --against have in common, by DVC's metrics and params diff, and question by question where
that commit's answers can be fetched from DVC's cache or remote. Nothing is run again; takes about ten seconds.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from stages.files import write_text
from stages.pages import MAX_CELL, MAX_CHARACTERS, MEASURES, SETS, Row, chance, dig, read_figures, template
from stages.program import BadInput, run, say
from stages.records import Answer, Question, Record, Score, by_id, read_records
from stages.scoreboard import Scoreboard, brief, figure, in_order, read_scoreboard
from stages.scoring import Sampling, compare

RESAMPLES = 2000
MAX_CHANGED = 20  # questions whose answers are shown before and after
MAX_ROWS = 60  # of settings or figures that differ
MAX_COMPARISON = MAX_CHARACTERS // 2  # the report takes the rest
PAIRED = ("questions", "before", "now", "difference", "passed", "won / lost", "p")
UNPAIRED = ("questions", "before", "now", "difference")
Kind = TypeVar("Kind", bound=Record)


class Before(msgspec.Struct, frozen=True):
    """What the other commit holds. `scores` and `answers` are None where its data cannot be fetched, for the reason `missing`."""

    commit: str
    scoreboard: Scoreboard | None
    report: dict[str, Any]
    scores: list[Score] | None = None
    answers: list[Answer] | None = None
    missing: str = ""


def git(*arguments: str) -> str | None:
    """What a git command prints, or None where it fails."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def dvc(*arguments: str) -> str:
    """What a DVC command prints. Raises BadInput with its complaint where it fails."""
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [f"exit code {done.returncode}"]
        raise BadInput(f"dvc {arguments[0]}: {complaints[0].removeprefix('ERROR: ').removeprefix('unexpected error - ')}")
    return done.stdout


def common_commit(against: str) -> str:
    """The commit that HEAD and `against` have in common. Raises BadInput where there is none."""
    if git("rev-parse", "--verify", "--quiet", f"{against}^{{commit}}") is None:
        raise BadInput(f"{against} is not a revision of this repository. Fetch it with git, or name another with --against")
    common = git("merge-base", "HEAD", against)
    if common is None:
        raise BadInput(f"HEAD and {against} have no commit in common here. In a shallow clone: git fetch --unshallow")
    return common.strip()


def at_commit(commit: str, path: Path, kind: type[Any]) -> Any:
    """The JSON file `path` of `commit` as `kind`; None where it is not there or has another shape, as from an older Docsmith."""
    text = git("show", f"{commit}:{path.as_posix()}")
    try:
        return None if text is None else msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None


def fetched(commit: str, path: Path, kind: type[Kind]) -> list[Kind]:
    """The records of `path` as DVC keeps it for `commit`, from the cache or the remote. Raises BadInput where neither has it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        dvc("get", ".", path.as_posix(), "--rev", commit, "--out", str(copy))
        return read_records(copy, kind)


def read_before(commit: str, reports: Path, data: Path, served: str) -> Before:
    """What `commit` holds of a finished run."""
    board = at_commit(commit, reports / "metrics/evaluate.json", Scoreboard)
    report = at_commit(commit, reports / "report.json", dict[str, Any]) or {}
    if board is None:
        return Before(commit, None, report)
    if not (data / "scores.jsonl").is_file():
        return Before(commit, board, report, missing=f"{data / 'scores.jsonl'} is not here; fetch it with dvc pull")
    try:
        scores = fetched(commit, data / "scores.jsonl", Score)
        answers = fetched(commit, data / f"answers/{report.get('served', served)}.jsonl", Answer)
    except BadInput as error:
        return Before(commit, board, report, missing=str(error))
    return Before(commit, board, report, scores, answers)


def paired_rows(mine: Sequence[Score], theirs: Sequence[Score], system: str, before: str, sampling: Sampling) -> list[Row]:
    """A row per question set: set and measure, then PAIRED, for `system` as it is now against `before` as it was then, on the same questions."""
    rows: list[Row] = []
    for name, (title, _, measure) in SETS.items():
        now = {one.question_id: one for one in mine if (one.set, one.system) == (name, system)}
        then = {one.question_id: one for one in theirs if (one.set, one.system) == (name, before)}
        both = sorted(now.keys() & then.keys())
        found = compare([now[one] for one in both], [then[one] for one in both], sampling)
        if found is None:
            continue
        means = [_mean([getattr(scores[one], measure) for one in both]) for scores in (then, now)]
        passed = " to ".join(_mean([scores[one].passed for one in both]) for scores in (then, now))
        gain = brief(found.gains[measure]) if measure in found.gains else ""
        asked = f"{found.n} of {len(now)}" if found.n < len(now) else str(found.n)
        rows.append(
            (f"{title}, {MEASURES[measure]}", asked, *means, gain, passed, f"{found.won} / {found.lost}", chance(found.p))
        )
    return rows


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return figure(sum(known) / len(known)) if known else ""


def unpaired_rows(now: Scoreboard, then: Scoreboard, system: str, before: str) -> list[Row]:
    """A row per question set: set and measure, then UNPAIRED, from means alone; the questions may differ, so the difference has no interval."""
    rows: list[Row] = []
    for name in [name for name in SETS if name in now.sets and name in then.sets]:
        mine, theirs = now.sets[name].systems.get(system), then.sets[name].systems.get(before)
        measure = SETS[name].measure
        if mine and theirs and measure in mine.measures and measure in theirs.measures:
            new, old = mine.measures[measure], theirs.measures[measure]
            what = f"{SETS[name].title}, {MEASURES[measure]}"
            rows.append((what, str(mine.n), brief(old), brief(new), figure(new.mean - old.mean)))
    return rows


def changed_answers(
    questions: Sequence[Question], now: dict[str, tuple[Answer, Score]], then: dict[str, tuple[Answer, Score]]
) -> list[dict[str, Any]]:
    """The questions whose answers differ in words, the greatest loss first, with rows of system, answer, similarity, right.

    `now` and `then` hold answer and score by question id.
    """

    def gain(question: Question) -> tuple[float, float]:
        (_, old), (_, new) = then[question.id], now[question.id]
        return new.passed - old.passed, (new.similarity or 0.0) - (old.similarity or 0.0)

    both = [one for one in questions if one.id in now and one.id in then]
    changed = [one for one in both if now[one.id][0].text.split() != then[one.id][0].text.split()]
    return [
        {
            "set": SETS[one.set].title,
            "question": one.question,
            "rows": [
                ("reference", one.reference or "(that the documentation does not cover it)", "", ""),
                *(_answer_row(label, *answers[one.id]) for label, answers in (("before", then), ("now", now))),
            ],
        }
        for one in sorted(changed, key=lambda one: (gain(one), one.id))
    ]


def _answer_row(label: str, answer: Answer, score: Score) -> Row:
    similarity = "" if score.similarity is None else figure(score.similarity)
    return label, answer.text.strip() or "(empty)", similarity, "yes" if score.passed else "no"


def difference_rows(differences: dict[str, dict[str, dict[str, Any]]]) -> list[Row]:
    """(file and setting or figure, before, now, difference) of what `dvc metrics diff --json` or `dvc params diff --json` says."""
    return [
        (
            f"{path} {name}".removeprefix("params.yaml "),
            *(_value(one.get(end)) for end in ("old", "new")),
            _signed(one.get("diff")),
        )
        for path, values in sorted(differences.items())
        for name, one in sorted(values.items())
    ]


def with_addresses(markdown: str, pictures: str) -> str:
    """`markdown` with the address `pictures` before the names of its pictures, so that they show in a comment; as it is for ""."""
    return (
        re.sub(r"(?m)^(!\[[^\]]*\]\()(?=[\w.-]+\.png\)$)", rf"\g<1>{pictures.rstrip('/')}/", markdown) if pictures else markdown
    )


def in_one_comment(comparison: str, report: str) -> str:
    """`comparison` after the head of `report`, its verdict and gates, and then as many of the report's sections as a comment holds."""
    body, mark, settings = report.partition("<details><summary>params.yaml</summary>")  # a comment in there may begin with ##
    head, *sections = [*re.split(r"(?m)^(?=## )", body), mark + settings]
    left_out: list[str] = []
    while True:
        names = ", ".join(re.sub(r"^## |<[^>]*>", "", section.partition("\n")[0]) for section in left_out)
        note = (
            f"Left out here, as a comment holds {MAX_CHARACTERS:,} characters, and in reports/report.md: {names}.\n"
            if names
            else ""
        )
        text = head + comparison + "".join(sections) + note
        if len(text) <= MAX_CHARACTERS or not sections:
            return text
        left_out.insert(0, sections.pop())


def _value(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _signed(value: Any) -> str:
    return f"{value:+.6g}" if isinstance(value, int | float) and not isinstance(value, bool) else ""


def compared(before: Before, board: Scoreboard, served: str, reports: Path, data: Path) -> dict[str, Any]:
    """What compare.md.jinja shows of `before` and of the run at hand."""
    was = before.report.get("served", served)
    settings = difference_rows(msgspec.json.decode(dvc("params", "diff", "--json", before.commit)))
    shown: dict[str, Any] = {
        "outcome": dig(before.report, "verdict", "outcome"),
        "served": served,
        "was": was,
        "missing": before.missing,
        "settings": settings,
        "other_rule": [name for name, *_ in settings if name.startswith(("evaluate.", "models.embedder"))],
        "figures": [
            row
            for row in difference_rows(msgspec.json.decode(dvc("metrics", "diff", "--json", before.commit)))
            if "evaluate.json" not in row[0] and not re.fullmatch(r"[0-9a-f]{32,}", row[2])  # scores stand above, hashes below
        ],
        "others": [],
        "changed": [],
        "asked": 0,
    }
    if before.scoreboard is None:
        return shown
    if before.scores is None or before.answers is None:
        return shown | {"head": list(UNPAIRED), "rows": unpaired_rows(board, before.scoreboard, served, was)}
    sampling = Sampling(board.confidence, RESAMPLES, board.seed)
    scores = read_records(data / "scores.jsonl", Score)
    systems = {one.system for one in scores} & {one.system for one in before.scores} - {served, was}
    now = _with_scores(read_records(data / f"answers/{served}.jsonl", Answer), scores)
    then = _with_scores(before.answers, before.scores)
    return shown | {
        "head": list(PAIRED),
        "rows": paired_rows(scores, before.scores, served, was, sampling),
        "others": [
            (system, *row)
            for system in in_order(list(systems))
            for row in paired_rows(scores, before.scores, system, system, sampling)
        ],
        "asked": len(now.keys() & then.keys()),
        "changed": changed_answers(read_records(data / "exam.jsonl", Question), now, then),
    }


def _with_scores(answers: Sequence[Answer], scores: Sequence[Score]) -> dict[str, tuple[Answer, Score]]:
    known = by_id(scores)
    return {one.question_id: (one, known[one.id]) for one in answers}


def main(against: str = "origin/main", pictures: str = "", reports: Path = Path("reports"), data: Path = Path("data")) -> None:
    comment = reports / "pull-request.md"
    if not (reports / "report.md").is_file():
        nothing = f"There is no {reports / 'report.md'}, so there is nothing to compare. Make and commit a run: dvc repro"
        write_text(comment, f"{nothing}\n")
        say(f"compare: {nothing}")
        return
    report = (reports / "report.md").read_text(encoding="utf-8")
    served = read_figures(reports / "report.json")["served"]
    commit = common_commit(against)
    before = read_before(commit, reports, data, served)
    context = {
        "against": against,
        "commit": commit[:8],
        "has_run": before.scoreboard is not None,
        "max_rows": MAX_ROWS,
        "max_cell": MAX_CELL,
    }
    if before.scoreboard is not None:
        board = read_scoreboard(reports / "metrics/evaluate.json")
        context |= {"confidence": f"{100 * board.confidence:g} %", **compared(before, board, served, reports, data)}
    drawn = template("compare.md.jinja")
    for most in range(MAX_CHANGED, -1, -1):
        comparison = drawn.render(context | {"most": most})
        if len(comparison) <= MAX_COMPARISON:
            break
    write_text(comment, in_one_comment(comparison, with_addresses(report, pictures)))
    say(f"compare: {comment} compares with {against} at {commit[:8]}{'' if before.scoreboard else ', which holds no run'}")


if __name__ == "__main__":
    run(main)
