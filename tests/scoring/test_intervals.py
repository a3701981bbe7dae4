"""scoring: intervals over whole sections, what they could show at least, and one system against another."""

import math

import numpy
import pytest
from scipy import stats

from stages.program import BadRecord
from stages.records import Score
from stages.scoring import Sampling, compare, interval, minimum_effect
from stages.scoring.intervals import _draws

SAMPLING = Sampling(confidence=0.95, resamples=500, seed=1)


def score(name: str, section: str, similarity: float | None, passed: float = 0.0, key_facts: float | None = None) -> Score:
    rest = {
        "rouge_l": None,
        "evidence": None,
        "judge": None,
        "abstained": 0.0,
        "set": "recall",
        "type": "factual",
        "system": "any",
    }
    return Score(id=name, question_id=name, section_id=section, similarity=similarity, passed=passed, key_facts=key_facts, **rest)


def test_two_sections_drawn_whole_give_the_means_of_the_four_draws() -> None:
    # draws: aa -> 1.0, ab and ba -> (1 + 4 * 0) / 5 = 0.2, bb -> 0.0
    found = interval([1.0, 0.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b", "b"], SAMPLING)
    assert (found.mean, found.low, found.high) == (0.2, 0.0, 1.0)
    middle = interval([1.0, 0.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b", "b"], Sampling(0.4, 500, 1))
    assert (middle.low, middle.high) == (0.2, 0.2)


def test_questions_of_one_section_do_not_narrow_the_interval() -> None:
    values = [float(number % 2) for number in range(200)]
    clustered = interval(values, [f"s{number % 4}" for number in range(200)], SAMPLING)
    single = interval(values, [f"s{number}" for number in range(200)], SAMPLING)
    assert (clustered.low, clustered.high) == (0.0, 1.0)
    assert single.low is not None and single.high is not None
    # a mean of 200 coin flips has a standard error of 0.0354, so the 95 % interval is about 0.43 to 0.57
    assert 0.41 < single.low < 0.45 and 0.55 < single.high < 0.59


def test_intervals_are_those_of_scipys_bootstrap() -> None:
    rng = numpy.random.default_rng(7)
    sections = [f"s{number}" for number in rng.integers(0, 17, 60)]
    values = rng.normal(0.1, 0.3, 60)
    groups = {name: [value for value, section in zip(values, sections, strict=True) if section == name] for name in sections}
    drawn = stats.bootstrap(
        ([math.fsum(group) for group in groups.values()], [len(group) for group in groups.values()]),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=500,
        confidence_level=0.9,
        method="percentile",
        rng=numpy.random.default_rng(3),
    ).confidence_interval
    found = interval(list(values), sections, Sampling(confidence=0.9, resamples=500, seed=3))
    assert (found.low, found.high) == (round(float(drawn.low), 6), round(float(drawn.high), 6))


def test_confidence_resamples_and_seed_each_change_the_interval() -> None:
    values, sections = [number / 30 for number in range(30)], [f"s{number}" for number in range(30)]
    found = interval(values, sections, SAMPLING)
    assert interval(values, sections, SAMPLING) == found
    for turned in (Sampling(0.8, 500, 1), Sampling(0.95, 50, 1), Sampling(0.95, 500, 2)):
        assert interval(values, sections, turned) != found


def test_one_section_gives_a_mean_and_no_interval() -> None:
    found = interval([0.2, 0.4], ["a", "a"], SAMPLING)
    assert (found.mean, found.low, found.high) == (0.3, None, None)
    assert minimum_effect([0.2, 0.4], ["a", "a"], 0.95) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_has_no_mean(value: float) -> None:
    with pytest.raises(BadRecord, match="not a number, so there is no mean"):
        interval([0.5, value], ["a", "b"], SAMPLING)
    with pytest.raises(BadRecord, match="not a number"):
        compare([score("q", "a", value)], [score("q", "a", 0.5)], SAMPLING)


def test_no_value_has_no_mean() -> None:
    with pytest.raises(BadRecord, match="there is no score"):
        interval([], [], SAMPLING)


def test_the_minimum_effect_of_single_questions_is_that_of_a_t_test() -> None:
    values = [0.1, -0.2, 0.3, 0.0, 0.5]  # standard deviation 0.27019, so a standard error of 0.12083
    # t of 4 degrees of freedom: 2.7764 for 95 % and 0.9410 for a chance of 80 %
    assert minimum_effect(values, list("abcde"), 0.95) == pytest.approx((2.7764 + 0.9410) * 0.12083, abs=1e-4)
    assert minimum_effect(values, list("abcde"), 0.8) < minimum_effect(values, list("abcde"), 0.95)


def test_the_minimum_effect_of_copied_questions_is_that_of_one_copy() -> None:
    values, sections = [0.1, -0.2, 0.3, 0.0, 0.5], list("abcde")
    assert minimum_effect(values * 3, sections * 3, 0.95) == minimum_effect(values, sections, 0.95)


def test_systems_are_compared_question_by_question_whatever_their_order() -> None:
    mine = [score("q1", "a", 0.2, 1.0), score("q2", "b", 1.0, 1.0), score("q3", "b", 0.5)]
    theirs = [score("q2", "b", 0.9), score("q1", "a", 0.1), score("q4", "c", 0.9, 1.0)]
    found = compare(mine, theirs, SAMPLING)
    # 0.1 better on each of the two questions that both answered, so every draw gives 0.1; unpaired it would reach from -0.7 to 0.9
    assert found is not None and (found.n, found.sections) == (2, 2)
    gain = found.gains["similarity"]
    assert (gain.mean, gain.low, gain.high) == (0.1, 0.1, 0.1)
    assert (found.won, found.lost, found.p) == (2, 0, 0.5)
    assert compare(mine, theirs[2:], SAMPLING) is None


def test_mcnemars_exact_p_counts_only_the_questions_on_which_the_systems_differ() -> None:
    mine = [score(f"q{number}", f"s{number}", None, float(number < 10)) for number in range(20)]
    theirs = [score(f"q{number}", f"s{number}", None, float(number in (0, 1, 15))) for number in range(20)]
    found = compare(mine, theirs, SAMPLING)
    # 8 won and 1 lost: 2 * (1 + 9) / 2^9
    assert found is not None and (found.won, found.lost, found.p) == (8, 1, 0.039062)
    assert set(found.gains) == {"abstained", "passed"} and found.minimum_effect is None
    same = compare(mine, mine, SAMPLING)
    assert same is not None and (same.won, same.lost, same.p) == (0, 0, 1.0)


def test_a_measure_that_some_questions_lack_is_compared_on_the_others() -> None:
    mine = [score("q1", "a", 0.5, key_facts=1.0), score("q2", "b", 0.5)]
    theirs = [score("q1", "a", 0.5, key_facts=0.25), score("q2", "b", 0.5)]
    found = compare(mine, theirs, SAMPLING)
    assert found is not None and found.gains["key_facts"].mean == 0.75


def test_draws_are_made_once_for_all_values_of_as_many_sections() -> None:
    before = _draws.cache_info().misses
    for shift in range(10):
        interval([shift + number for number in range(30)], [f"s{number}" for number in range(30)], Sampling(0.95, 50, 987))
    assert _draws.cache_info().misses == before + 1
