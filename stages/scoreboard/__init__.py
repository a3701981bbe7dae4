"""The scoreboard: every system's scores on the same questions. `evaluate` writes it, `report` shows it, `promote` judges by it."""

from pathlib import Path
from typing import get_args

import msgspec

from stages.program.errors import BadInput
from stages.records import SetName

SETS: tuple[str, ...] = get_args(SetName)
MEASURES = ("similarity", "rouge_l", "key_facts", "evidence", "judge", "abstained", "passed")  # the numbers of a Score
BASELINES = ("base", "tuned")  # what every other system is compared with
COLUMNS = (
    "system",
    "n",
    "empty",
    "similarity",
    "ROUGE-L",
    "key facts",
    "judge",
    "passed",
    "abstained",
    "over base",
    "over tuned",
)


class Interval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mean and its bootstrap interval; `low` and `high` are None where one section alone gives no interval."""

    mean: float
    low: float | None
    high: float | None


class SystemScores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One system on one question set: `n` answers, `empty` of them without a word. A measure that nothing was scored by is absent."""

    n: int
    empty: int
    measures: dict[str, Interval]


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One system against another on the same questions, question by question."""

    n: int
    sections: int
    gains: dict[str, Interval]  # by measure: the mean of the differences
    minimum_effect: float | None  # the least gain in similarity that so many sections show with a chance of 80 %
    won: int  # questions that the first passed and the second did not
    lost: int
    p: float  # of McNemar's exact test, two-sided: 1 where won and lost are both 0


class SetScores(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One question set: scores by system, comparisons by `<system>-<baseline>`, similarity by question type and system."""

    questions: int
    sections: int
    systems: dict[str, SystemScores]
    comparisons: dict[str, Comparison]
    by_type: dict[str, dict[str, Interval]]
    unknown: "SetScores | None" = None  # the same for the questions that base did not pass; it has none of its own


class Rated(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether a judge rated the answers, and why or why not; how many replies had ratings: asked = scored + unparsed + failed."""

    used: bool
    why: str
    asked: int = 0
    scored: int = 0
    unparsed: int = 0
    failed: int = 0


class Scoreboard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """reports/metrics/evaluate.json. A set without a question is absent; sets are never averaged together."""

    confidence: float
    seed: int
    sets: dict[str, SetScores]
    models: dict[str, str]  # system -> SHA-256 of the file or folder that answered
    questions_sha256: str
    chat_sha256: str  # of the chat template and system prompt that the questions were asked with
    leaks: tuple[str, ...]  # ids of questions that stand in the training data, word for word or nearly
    secrets: tuple[str, ...] = ()  # ids of the tuned model's answers, and of its files', that hold a secret
    judge: Rated = Rated(used=False, why="no judge was asked")  # what boards from before there were ratings say


def read_scoreboard(path: Path) -> Scoreboard:
    """The scoreboard that `evaluate` wrote. Raises BadInput when it is missing, empty or of another shape."""
    if not path.is_file():
        raise BadInput(f"{path} is missing, so there are no scores to go by. Build it with: dvc repro evaluate")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Scoreboard)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BadInput(f"{path} is not a scoreboard: {error}. Rebuild it with: dvc repro --force evaluate") from None


def in_order(systems: list[str]) -> list[str]:
    """`systems` as tables and pictures show them: base, tuned, then the others by name."""
    return sorted(systems, key=lambda system: (system != "base", system != "tuned", system))


def score_rows(scores: SetScores) -> list[tuple[str, ...]]:
    """A row of COLUMNS per system; a measure or gain that is not there is empty."""

    def gain(system: str, baseline: str) -> str:
        found = scores.comparisons.get(f"{system}-{baseline}")
        return brief(found.gains["similarity"]) if found and "similarity" in found.gains else ""

    def measure(one: SystemScores, name: str) -> str:
        return brief(one.measures[name]) if name in one.measures else ""

    return [
        (
            system,
            str(one.n),
            str(one.empty),
            *(measure(one, name) for name in ("similarity", "rouge_l", "key_facts", "judge", "passed", "abstained")),
            gain(system, "base"),
            gain(system, "tuned"),
        )
        for system, one in ((system, scores.systems[system]) for system in in_order(list(scores.systems)))
    ]


def show(interval: Interval, confidence: float) -> str:
    """As `0.123 (95 % 0.100 to 0.150)`, or the mean alone where there is no interval."""
    if interval.low is None or interval.high is None:
        return figure(interval.mean)
    return f"{figure(interval.mean)} ({100 * confidence:g} % {figure(interval.low)} to {figure(interval.high)})"


def brief(interval: Interval) -> str:
    """As `0.123 [0.100 to 0.150]`, for a table whose head names the confidence; the mean alone where there is no interval."""
    if interval.low is None or interval.high is None:
        return figure(interval.mean)
    return f"{figure(interval.mean)} [{figure(interval.low)} to {figure(interval.high)}]"


def figure(value: float) -> str:
    """Three decimals, and never -0.000."""
    return f"{round(value, 3) + 0.0:.3f}"
