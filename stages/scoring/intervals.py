"""Means with bootstrap intervals over sections, and one system against another on the same questions."""

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from stages.params import Count, Positive
from stages.program.errors import BadRecord
from stages.records import Score
from stages.scoreboard import MEASURES, Comparison, Interval

POWER = 0.8  # the chance with which a minimum effect is seen; the usual choice (Cohen 1988, section 2.4)


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How sure the intervals are, and how they are drawn."""

    confidence: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
    resamples: Positive
    seed: Count


def interval(values: Sequence[float], sections: Sequence[str], sampling: Sampling) -> Interval:
    """The mean of `values` with its percentile bootstrap interval, drawing whole sections (one name per value).

    Questions on one section stand or fall together, so drawing single questions would make the interval too narrow (Field and
    Welsh 2007, "Bootstrapping clustered data"). The same ends as scipy.stats.bootstrap's, whose draws are made once for all values
    with as many sections. One section gives no interval. Raises BadRecord when a value is not a number, or when there is none.
    """
    import numpy as np

    sums, counts = _by_section(values, sections)
    mean = round(math.fsum(values) / len(values), 6)
    if len(counts) == 1:
        return Interval(mean, None, None)
    drawn = _draws(len(counts), sampling.resamples, sampling.seed)
    means = (drawn @ sums) / (drawn @ counts)
    tail = (1 - sampling.confidence) / 2
    low, high = np.percentile(means, [100 * tail, 100 * (1 - tail)])
    return Interval(mean, round(float(low), 6), round(float(high), 6))


def minimum_effect(differences: Sequence[float], sections: Sequence[str], confidence: float) -> float | None:
    """The least true mean of `differences` for which so many sections give an interval above 0 with a chance of POWER.

    (t(1 - a/2) + t(POWER)) * SE with a = 1 - `confidence`, t the quantiles of Student's t with G - 1 degrees of freedom for G
    sections, and SE the clustered standard error of the mean: SE^2 = G / (G - 1) * sum over sections of (sum of its differences -
    their number * mean)^2 / n^2 (Cameron and Miller 2015, "A Practitioner's Guide to Cluster-Robust Inference", section II).
    None from one section.
    """
    sums, counts = _by_section(differences, sections)
    groups = len(counts)
    if groups == 1:
        return None
    deviations = sums - counts * (sums.sum() / counts.sum())
    error = math.sqrt(groups / (groups - 1) * float(deviations @ deviations)) / counts.sum()
    return round(_errors_needed(groups, confidence) * float(error), 6)


def compare(mine: Sequence[Score], theirs: Sequence[Score], sampling: Sampling) -> Comparison | None:
    """`mine` against `theirs` on the questions that both answered, whatever their order; None where there is none.

    A measure that one side lacks for a question leaves the question out of that measure's gain.
    """
    others = {score.question_id: score for score in theirs}
    pairs = [
        (one, others[one.question_id]) for one in sorted(mine, key=lambda score: score.question_id) if one.question_id in others
    ]
    if not pairs:
        return None
    gains: dict[str, Interval] = {}
    effect = None
    for measure in MEASURES:
        both = [(getattr(one, measure), getattr(other, measure), one.section_id) for one, other in pairs]
        found = [(one - other, section) for one, other, section in both if one is not None and other is not None]
        if found:
            differences, sections = [value for value, _ in found], [section for _, section in found]
            gains[measure] = interval(differences, sections, sampling)
            if measure == "similarity":
                effect = minimum_effect(differences, sections, sampling.confidence)
    won = sum(one.passed > other.passed for one, other in pairs)
    lost = sum(one.passed < other.passed for one, other in pairs)
    return Comparison(
        n=len(pairs),
        sections=len({one.section_id for one, _ in pairs}),
        gains=gains,
        minimum_effect=effect,
        won=won,
        lost=lost,
        p=_mcnemar(won, lost),
    )


@functools.lru_cache
def _errors_needed(sections: int, confidence: float) -> float:
    """The minimum effect, in standard errors."""
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, sections - 1) + t.ppf(POWER, sections - 1))


@functools.lru_cache
def _mcnemar(won: int, lost: int) -> float:
    """The chance that fair coins part as unevenly as `won` to `lost`, two-sided (McNemar 1947, in its exact form)."""
    from scipy.stats import binomtest

    return round(float(binomtest(won, won + lost, 0.5).pvalue), 6) if won + lost else 1.0


def _by_section(values: Sequence[float], sections: Sequence[str]) -> tuple[Any, Any]:
    """The sum and the number of the values of each section, as arrays, in the order in which sections appear."""
    import numpy as np

    if not values:
        raise BadRecord("there is no score, so there is no mean. Rebuild the scores with: dvc repro --force evaluate")
    if not all(map(math.isfinite, values)):
        raise BadRecord("a score is not a number, so there is no mean. Rebuild the scores with: dvc repro --force evaluate")
    places: dict[str, int] = {}
    rows = np.array([places.setdefault(section, len(places)) for section in sections])
    return np.bincount(rows, weights=np.asarray(values, dtype=float)), np.bincount(rows).astype(float)


@functools.lru_cache(maxsize=8)
def _draws(sections: int, resamples: int, seed: int) -> Any:
    """How often each draw holds each section, shape (resamples, sections): the draws that scipy.stats.bootstrap makes."""
    import numpy as np

    drawn = np.random.default_rng(seed).integers(0, sections, (resamples, sections))
    places = (drawn + sections * np.arange(resamples)[:, None]).ravel()
    return np.bincount(places, minlength=resamples * sections).reshape(resamples, sections).astype(float)
