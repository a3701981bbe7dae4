"""Means with bootstrap intervals over sections, and one system against another on the same questions."""

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from stages.params import Count, Positive, Share
from stages.program.errors import BadRecord
from stages.records import Score
from stages.scoreboard import MEASURES, Comparison, Interval

_values = operator.attrgetter(*MEASURES)
POWER = 0.8  # the chance with which a minimum effect is seen; the usual choice (Cohen 1988, section 2.4)


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How sure the intervals are, and how they are drawn."""

    confidence: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
    resamples: Positive
    seed: Count


class Scoring(Sampling, frozen=True, forbid_unknown_fields=True):
    """The section `evaluate` of params.yaml: how intervals are drawn, and from which similarity on an answer can be right."""

    pass_similarity: Share


def interval(values: Sequence[float], sections: Sequence[str], sampling: Sampling) -> Interval:
    """The mean of `values` with its percentile bootstrap interval, drawing whole sections (one name per value).

    Questions on one section stand or fall together, so drawing single questions would make the interval too narrow (Field and
    Welsh 2007, "Bootstrapping clustered data"). The same ends as scipy.stats.bootstrap's, whose draws are made once for all values
    with as many sections. One section gives no interval. Raises BadRecord when a value is not a number, or when there is none.
    """
    return _intervals([(value,) for value in values], sections, sampling)[0]


def means(scores: Sequence[Score], sampling: Sampling) -> dict[str, Interval]:
    """The `interval` of each measure over the scores that have it; a measure that none has is absent."""
    return _means([_values(score) for score in scores], [score.section_id for score in scores], sampling)


def minimum_effect(differences: Sequence[float], sections: Sequence[str], confidence: float) -> float | None:
    """The least true mean of `differences` for which so many sections give an interval above 0 with a chance of POWER.

    (t(1 - a/2) + t(POWER)) * SE with a = 1 - `confidence`, t the quantiles of Student's t with G - 1 degrees of freedom for G
    sections, and SE the clustered standard error of the mean: SE^2 = G / (G - 1) * sum over sections of (sum of its differences -
    their number * mean)^2 / n^2 (Cameron and Miller 2015, "A Practitioner's Guide to Cluster-Robust Inference", section II).
    None from one section.
    """
    (sums,), counts = (part.T for part in _by_section([(value,) for value in differences], sections))
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
    sections = [one.section_id for one, _ in pairs]
    values = [list(zip(_values(one), _values(other), strict=True)) for one, other in pairs]
    differences = [[None if None in both else both[0] - both[1] for both in row] for row in values]
    similar = [(row[0], section) for row, section in zip(differences, sections, strict=True) if row[0] is not None]
    changes, where = [change for change, _ in similar], [section for _, section in similar]
    effect = minimum_effect(changes, where, sampling.confidence) if similar else None
    won = sum(one.passed > other.passed for one, other in pairs)
    lost = sum(one.passed < other.passed for one, other in pairs)
    return Comparison(
        n=len(pairs),
        sections=len(set(sections)),
        gains=_means(differences, sections, sampling),
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


def _means(rows: Sequence[Sequence[float | None]], sections: Sequence[str], sampling: Sampling) -> dict[str, Interval]:
    """By measure, the interval of the rows that have it; a row holds a value for each of MEASURES."""
    together: dict[tuple[int, ...], list[int]] = defaultdict(list)  # measures that the same rows have are drawn at once
    for column, values in enumerate(zip(*rows, strict=True)):
        together[tuple(place for place, value in enumerate(values) if value is not None)].append(column)
    found = {
        MEASURES[column]: one
        for places, columns in together.items()
        if places
        for column, one in zip(
            columns,
            _intervals(
                [[rows[place][column] for column in columns] for place in places], [sections[place] for place in places], sampling
            ),
            strict=True,
        )
    }
    return {measure: found[measure] for measure in MEASURES if measure in found}


def _intervals(rows: Sequence[Sequence[float | None]], sections: Sequence[str], sampling: Sampling) -> list[Interval]:
    """The interval of each column of `rows`, as `interval` describes it."""
    import numpy as np

    sums, counts = _by_section(rows, sections)
    centres = [round(math.fsum(column) / len(rows), 6) for column in zip(*rows, strict=True)]  # type: ignore[arg-type]
    if len(counts) == 1:
        return [Interval(centre, None, None) for centre in centres]
    drawn = _draws(len(counts), sampling.resamples, sampling.seed)
    tail = (1 - sampling.confidence) / 2
    ends = np.percentile((drawn @ sums) / (drawn @ counts)[:, None], [100 * tail, 100 * (1 - tail)], axis=0).round(6)
    return [Interval(centre, float(low), float(high)) for centre, low, high in zip(centres, *ends, strict=True)]


def _by_section(rows: Sequence[Sequence[float | None]], sections: Sequence[str]) -> tuple[Any, Any]:
    """The sums (G, k) of the rows (n, k) of each of G sections, in the order in which sections appear, and their numbers (G,)."""
    import numpy as np

    values = np.asarray(rows, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        fault = "a score is not a number" if len(values) else "there is no score"
        raise BadRecord(f"{fault}, so there is no mean. Rebuild the scores with: dvc repro --force evaluate")
    places: dict[str, int] = {}
    own = np.array([places.setdefault(section, len(places)) for section in sections])
    sums = np.stack([np.bincount(own, weights=column) for column in values.T], axis=1)
    return sums, np.bincount(own).astype(float)


@functools.lru_cache(maxsize=8)
def _draws(sections: int, resamples: int, seed: int) -> Any:
    """How often each draw holds each section, shape (resamples, sections): the draws that scipy.stats.bootstrap makes."""
    import numpy as np

    drawn = np.random.default_rng(seed).integers(0, sections, (resamples, sections))
    places = (drawn + sections * np.arange(resamples)[:, None]).ravel()
    return np.bincount(places, minlength=resamples * sections).reshape(resamples, sections).astype(float)
