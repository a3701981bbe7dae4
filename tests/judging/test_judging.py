"""judging: the probes of the audit, and what becomes of a judge's replies."""

import json
import re

import pytest
import yaml
from fake_judge import ratings

from stages.judging import DIMENSIONS, PROBES, Judging, judgement_of, probes_of, read_probes
from stages.llm import Reply
from stages.params import convert_section
from stages.program import BadParams


def test_half_of_the_probes_right_is_never_enough() -> None:
    shipped = yaml.safe_load((PROBES.parents[2] / "params.yaml").read_text(encoding="utf-8"))["judge"]
    assert convert_section("judge", shipped | {"audit_pass_share": 0.51}, Judging, "params.yaml")
    with pytest.raises(BadParams, match=r"judge\.audit_pass_share: expected `float` > 0\.5"):
        convert_section("judge", shipped | {"audit_pass_share": 0.5}, Judging, "params.yaml")


def test_the_probes_are_twins_whose_answers_fit_their_own_passage_better() -> None:
    twins = read_probes(PROBES)
    right, swapped = probes_of(twins)
    assert len(right) == len(swapped) == 2 * len(twins) == 16
    for own, other in zip(right.values(), swapped.values(), strict=True):
        assert (own.topic, own.text, own.question) == (other.topic, other.text, other.question)
        passage, good, bad = (set(re.findall(r"\w+", text.lower())) for text in (own.text, own.answer, other.answer))
        assert len(good - passage) <= 1 and len(bad - passage) > len(good - passage)


@pytest.mark.parametrize(
    ("answer", "too_low"),
    [
        (ratings(4, 4, 4), ()),
        (ratings(3, 4, 5), ("faithfulness",)),
        (ratings(5, 1, 5), ("answerability",)),
        (ratings(2, 5, 3), ("faithfulness", "usefulness")),
    ],
)
def test_ratings_below_the_lowest_accepted_are_named(answer: str, too_low: tuple[str, ...]) -> None:
    judgement = judgement_of("id", Reply(text=answer), 4)
    assert (judgement.status, judgement.reason, judgement.too_low) == ("scored", "as asked", too_low)
    assert {name: getattr(judgement, name) for name in DIMENSIONS}.items() <= json.loads(answer).items()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "5",
        "[]",
        ratings(0),
        ratings(6),
        ratings(5).replace("5", "NaN", 1),
        ratings(5).replace("5", "null", 1),
        ratings(5).replace("5", '"5"', 1),
        ratings(5).replace("5", "4.5", 1),
        ratings(5, answer="A better answer."),
        '{"reason": "no usefulness", "faithfulness": 1, "answerability": 1}',
        f"Here you are: {ratings(1)}",
    ],
)
def test_what_is_not_the_json_asked_for_is_unparsed_and_no_number(text: str) -> None:
    judgement = judgement_of("id", Reply(text=text), 4)
    assert judgement.status == "unparsed" and judgement.reason.startswith("not the JSON asked for: ")
    assert [getattr(judgement, name) for name in DIMENSIONS] == [None, None, None] and judgement.too_low == ()


def test_a_reply_that_was_cut_says_so() -> None:
    judgement = judgement_of("id", Reply(text='{"reason": "and so on and so', is_whole=False), 4)
    assert (judgement.status, judgement.reason) == ("unparsed", "cut at judge.max_tokens")
