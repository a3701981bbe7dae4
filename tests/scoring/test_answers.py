"""scoring: what one answer is worth, by its reference, its key facts, its evidence, and whether it admits not to know."""

import math

import numpy
import pytest

from stages.program import BadRecord
from stages.records import Answer, Question, by_id, content_id, evolve
from stages.scoring import abstains, score_answers

PASS = 0.75


def question(name: str, reference: str = "x the port is 5000", **changes: object) -> Question:
    fields = {"id": name, "set": "recall", "section_id": "s1", "type": "factual"}
    return evolve(Question(**fields, question=f"What about {name}?", reference=reference), **changes)


def answer(name: str, text: str) -> Answer:
    return Answer(id=content_id(name, "base"), question_id=name, system="base", text=text)


class Axes:
    """An embedder whose vectors are given: a text's letter says which."""

    def encode(self, texts: list[str], **_: object) -> numpy.ndarray:
        vectors = {"x": [1.0, 0.0], "d": [0.6, 0.8], "n": [math.nan, 0.0]}
        return numpy.array([vectors.get(text[:1], [1.0, 0.0]) for text in texts])


def scored(asked: Question, text: str) -> "object":
    return score_answers(by_id([asked]), [answer(asked.id, text)], Axes(), PASS)[0]


def test_similarity_is_the_cosine_and_rouge_the_f_measure_of_the_longest_common_words() -> None:
    found = scored(question("q1"), "d The PORT, it is 5000!")
    # cosine of (1, 0) and (0.6, 0.8); 4 common words of 6 said and 5 meant: 2 * (4/6) * (4/5) / (4/6 + 4/5) = 8/11
    assert (found.similarity, found.rouge_l) == (0.6, 0.727273)
    assert found.section_id == "s1" and found.id == content_id("q1", "base")


def test_an_answer_without_a_word_scores_zero_though_its_embedding_would_fit() -> None:
    found = scored(question("q1", key_facts=("5000",), quote="The port is 5000."), " \n")
    assert (found.similarity, found.rouge_l, found.key_facts, found.evidence) == (0.0, 0.0, 0.0, 0.0)
    assert (found.abstained, found.passed) == (0.0, 0.0)


def test_words_of_other_alphabets_count_in_rouge() -> None:
    assert scored(question("q1", "x порт пять тысяч"), "x порт шесть тысяч").rouge_l == 0.75


def test_a_similarity_that_is_not_a_number_is_an_error() -> None:
    with pytest.raises(BadRecord, match="nan, not a number"):
        scored(question("q1"), "n")


def test_what_a_question_does_not_have_is_not_scored_and_not_zero() -> None:
    found = scored(question("q1", "", set="out_of_scope"), "x")
    assert (found.similarity, found.rouge_l, found.key_facts, found.evidence, found.judge) == (None,) * 5


def test_key_facts_count_whatever_their_case_and_blanks_and_never_inside_a_longer_number() -> None:
    asked = question("q1", key_facts=("--Out  path", "5000", "1.5"))
    assert scored(asked, "x use `--out\npath` on 50001 or 11.5").key_facts == 0.333333
    assert scored(asked, "x --out path, 5000 and 1.5.").key_facts == 1.0


def test_evidence_is_the_share_of_the_words_said_that_stand_in_the_quote() -> None:
    asked = question("q1", quote="The port is 5000 by default.")
    assert scored(asked, "x Default port: 5000!").evidence == 0.75
    assert scored(asked, "?!").evidence == 0.0


@pytest.mark.parametrize(
    ("changes", "text", "passed"),
    [
        ({}, "x it is 5000", 1.0),
        ({}, "d it is 5000", 0.0),  # a cosine of 0.6
        ({}, "x I do not know.", 0.0),
        ({"key_facts": ("5000",)}, "x it is 500", 0.0),
        ({"key_facts": ("5000",)}, "x it is 5000", 1.0),
        ({"set": "out_of_scope", "reference": ""}, "x it is 5000", 0.0),
        ({"set": "out_of_scope", "reference": ""}, "The documentation does not cover this.", 1.0),
        ({"set": "out_of_scope", "reference": ""}, "", 0.0),
        ({"set": "general", "reference": "x I cannot know the time."}, "x I do not know.", 1.0),
        ({"set": "general", "reference": "x I cannot know the time."}, "x It is ten.", 0.0),
    ],
)
def test_an_answer_passes_when_it_is_near_and_complete_or_when_it_admits_what_nobody_can_know(
    changes: dict[str, object], text: str, passed: float
) -> None:
    assert scored(question("q1", **changes), text).passed == passed


def test_the_similarity_to_pass_is_a_setting() -> None:
    asked = by_id([question("q1")])
    assert [score_answers(asked, [answer("q1", "d")], Axes(), least)[0].passed for least in (0.59, 0.61)] == [1.0, 0.0]


# twenty answers that abstain and twenty that do not, written before the patterns were tried on them: at first, three abstentions
# were missed and one other answer was taken for one
ABSTAINS = [
    "I don't know.",
    "I'm sorry, but the documentation does not cover this topic.",
    "The docs don't mention any discount for universities.",
    "Unfortunately, I could not find an answer to that in the documentation.",
    "I am not sure what the monthly price is.",
    "There is no information about a mobile app in the handbook.",
    "That is outside the scope of this documentation.",
    "This is not covered by the documentation, so I cannot tell you.",
    "I can’t answer that question. You could ask on the forum.",
    "The provided context doesn't say anything about Photoshop.",
    "Sorry, I have no information on that.",
    "No information is available about bus routes.",
    "That cannot be determined from the documentation.",
    "Nothing in the documentation describes how to mine cryptocurrency.",
    "As an AI, I do not have access to your account, so I can't tell which password you chose.",
    "The handbook says nothing about firmware.",
    "I do not know, but you can ask the maintainers.",
    "Das weiß ich leider nicht, die Dokumentation sagt dazu nichts.",
    "Je ne sais pas : la documentation ne mentionne pas ce sujet.",
    "No lo sé. La documentación no menciona ese tema.",
]
ANSWERS = [
    "The port is 5000 by default.",
    "If the documentation does not cover your case, open an issue.",
    "DVC does not know about files outside of the project until they are added.",
    "I'm not sure about older versions, but the current default is 5000.",
    "Run `dvc destroy`; it does not delete the files themselves.",
    "The stage fails when no file gave text.",
    "An unknown key in params.yaml is an error that names the nearest known key.",
    "You cannot export to a format that is not listed in export.quants.",
    "The column `empty` counts answers without a word.",
    "It is not mentioned in the command line, but it is read from params.yaml.",
    "A held-out question has an answer that the model never saw.",
    "The report says \"not enough evidence\" when the interval includes the gate.",
    "When a passage does not contain the answer, the pair is rejected.",
    "Use `--no-exec` when you do not want to run the stage.",
    "The parser keeps text that does not contain markup.",
    "No, the adapter is not part of the GGUF file.",
    "The judge cannot find a chunk whose id is missing, so the stage stops.",
    "The setting `generate.max_chunks` limits what is asked; 0 means no limit. I do not know of another way.",
    "Wenn die Dokumentation nichts sagt, gilt der Standardwert 5000.",
    "There is no need to restart the server.",
]  # fmt: skip


def test_abstentions_are_found_with_high_precision_and_recall() -> None:
    assert len(ABSTAINS) == len(ANSWERS) == 20
    missed = [text for text in ABSTAINS if not abstains(text)]
    wrong = [text for text in ANSWERS if abstains(text)]
    recall = 1 - len(missed) / len(ABSTAINS)
    precision = recall * len(ABSTAINS) / (recall * len(ABSTAINS) + len(wrong))
    assert recall == 1, missed
    assert precision >= 20 / 21, wrong


def test_only_the_first_two_sentences_can_abstain_and_an_answer_that_goes_on_does_not() -> None:
    assert abstains("Good question. I do not know.")
    assert not abstains("It is red. It is round. I do not know more.")
    assert not abstains("I do not know for certain. However, the port should be 5000.")
