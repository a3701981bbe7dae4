"""The scoreboard: every system's scores on the same questions. `evaluate` writes it, `report` shows it, `promote` judges by it."""

from pathlib import Path

import msgspec

from stages.program.errors import BadInput

COLUMNS = ("system", "n", "empty", "similarity", "ROUGE-L", "over base", "over tuned")


class Interval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mean and its bootstrap interval; `low` and `high` are None where one section alone gives no interval."""

    mean: float
    low: float | None
    high: float | None


class SystemScores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One system on one question set: `n` answers, `empty` of them without a word."""

    n: int
    empty: int
    similarity: Interval
    rouge_l: Interval


class SetScores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question set: scores by system, and paired gains in similarity by `<system>-<baseline>`."""

    sections: int
    systems: dict[str, SystemScores]
    gains: dict[str, Interval]


class Scoreboard(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """reports/metrics/evaluate.json. `held_out` is None, and absent there, where the corpus was too small to hold a section out."""

    confidence: float
    recall: SetScores
    held_out: SetScores | None = None

    def sets(self) -> dict[str, SetScores]:
        """The sets that hold questions, by name."""
        return {"recall": self.recall} | ({"held_out": self.held_out} if self.held_out else {})


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
    """A row of COLUMNS per system; a gain that is not measured, as base's over itself, is empty."""

    def gain(system: str, baseline: str) -> str:
        found = scores.gains.get(f"{system}-{baseline}")
        return brief(found) if found else ""

    return [
        (
            system,
            str(one.n),
            str(one.empty),
            brief(one.similarity),
            brief(one.rouge_l),
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
