"""evidence: what can stand as an answer, verbatim, and where it stands."""

import re
from pathlib import Path

import pytest

import stages
from stages.evidence import Passage, fold, lead_of, locate, passages_of, readable, sentences_of, words

HANDBOOK = sorted((Path(stages.__file__).parents[1] / "docs").glob("*.md"))


def short(text: str) -> list[str]:
    return [passage.answer for passage in passages_of(text) if passage.length == "short"]


def long(text: str) -> list[Passage]:
    return [passage for passage in passages_of(text) if passage.length == "long"]


# text


def test_a_quote_is_found_with_white_space_compared_folded() -> None:
    assert locate("b  c", "a b\n c d") == (2, 6)
    assert locate("a.c", "abc a.c") == (4, 7)
    assert locate("b d", "a b c d") is None
    assert locate(" ", "a b") is None
    assert locate("", "a b") is None


def test_of_two_places_the_first_counts() -> None:
    assert locate("a b", "x a b a  b") == (2, 5)


def test_questions_are_compared_without_case_and_marks() -> None:
    assert words("How, long — is IT?") == words("how long is it") == "how long is it"


def test_white_space_folds_to_single_blanks() -> None:
    assert fold(" a\n\tb\u00a0 c ") == "a b c"


# passages


def test_sentences_of_paragraphs_and_list_items_are_passages_and_tables_code_and_headings_are_not() -> None:
    text = (
        "## A heading that is as long as a sentence, with a full stop.\n\n"
        "The water tank of the machine holds two litres. The lamp of the\nmachine turns red when the tank is empty.\n\n"
        "- The first item of the list is a whole sentence.\n\n"
        "| a cell with a sentence as long as the others. | b |\n|---|---|\n| one more cell with a rather long sentence. | d |\n\n"
        "```\nprint('The code block holds a long sentence as well.')\n```\n"
    )
    sentences = [
        "The water tank of the machine holds two litres.",
        "The lamp of the machine turns red when the tank is empty.",
        "The first item of the list is a whole sentence.",
    ]
    assert short(text) == sentences_of(text) == sentences
    assert long(text) == []  # the paragraph of two sentences has 105 characters, and a long passage needs 120


def test_a_sentence_that_leans_on_the_one_before_is_taken_with_it() -> None:
    text = "The water tank of the machine holds two litres. It must be emptied every evening."
    assert short(text) == ["The water tank of the machine holds two litres.", text]
    assert sentences_of(text) == ["The water tank of the machine holds two litres.", "It must be emptied every evening."]


def test_a_sentence_that_leans_on_nothing_is_no_passage() -> None:
    assert passages_of("This must be emptied every evening before the kitchen closes.") == []
    assert passages_of("- It must be emptied every evening before the kitchen closes.") == []


def test_too_short_too_long_and_unfinished_sentences_are_left_out() -> None:
    too_short, shortest = "A" * 38 + ".", "B" * 39 + "."
    longest, too_long = "C" * 319 + ".", "D" * 320 + "."
    assert short(f"{too_short}\n\n{shortest}\n\n{longest}\n\n{too_long}") == [shortest, longest]
    assert passages_of("The steps to clean the machine every evening are these:") == []
    assert passages_of("Why is the machine that I bought in May so loud?") == []


def test_an_abbreviation_does_not_end_a_sentence() -> None:
    sentence = "Some teas, e.g. Oolong from the high mountains, may be steeped twice."
    assert short(sentence) == sentences_of(sentence) == [sentence]


def test_a_paragraph_of_several_sentences_is_a_long_passage_and_a_single_sentence_is_not() -> None:
    one = "The water tank of the machine holds two litres of fresh and cold water from the tap in the kitchen of the house."
    two = f"{one} The lamp turns red when it is empty."
    assert [(passage.quote, passage.answer) for passage in long(two)] == [(two, two)]
    assert long(one + " " * 10) == []
    assert long(f"{two} {'A' * (480 - len(two) - 2)}.") != [] == long(f"{two} {'A' * (480 - len(two) - 1)}.")


def test_a_paragraph_that_announces_code_or_a_list_is_a_long_passage_with_it() -> None:
    announcement = "To start the machine in the morning after a night in the cold kitchen, run these two commands in this order:"
    code = "```bash\ntea fill  --all\n    tea start\n```"
    (passage,) = long(f"## Start\n\n{announcement}\n\n{code}\n\nThen wait.")
    assert passage.answer == f"{announcement}\n\n{code}"  # a code block keeps its lines
    assert passage.quote == f"{announcement} ```bash tea fill --all tea start ```"
    items = "- green tea\n- black tea, which\n  steeps long"
    (passage,) = long(f"{announcement}\n\n{items}\n\nThen wait.")
    assert passage.answer == f"{announcement}\n\n{items}"
    assert long(f"{announcement[:-1]}.\n\n{code}") == []  # nothing is announced


def test_a_quote_is_verbatim_and_its_answer_reads_without_markup() -> None:
    text = "Set the [timeout](https://x.example/t) of the **client**\nto ten seconds with `--wait <s>`."
    (passage,) = passages_of(text)
    assert passage.quote == "Set the [timeout](https://x.example/t) of the **client** to ten seconds with `--wait <s>`."
    assert passage.answer == "Set the timeout of the client to ten seconds with `--wait <s>`."
    assert locate(passage.quote, text) == (0, len(text))


def test_paragraphs_that_markers_break_up_are_left_out() -> None:
    text = "Plain words\nover two lines.\n\n> quoted words\n> over two lines\n\n> one line quoted\n"
    assert sentences_of(text) == ["Plain words over two lines.", "one line quoted"]


def test_every_passage_of_the_handbook_stands_in_its_page_word_for_word() -> None:
    assert len(HANDBOOK) > 10
    for page in HANDBOOK:
        text = page.read_text(encoding="utf-8")
        passages = passages_of(text)
        assert passages, page
        for passage in passages:
            place = locate(passage.quote, text)
            assert place is not None and fold(text[slice(*place)]) == passage.quote, passage
            assert not re.search(r"\]\(|\*\*", re.sub("`[^`]*`", "", passage.answer)), passage


@pytest.mark.parametrize(
    ("quote", "answer"),
    [
        ("See the [guide](https://x.example/a_b) now.", "See the guide now."),
        ("See the [guide][ref] and [notes][] now.", "See the guide and notes now."),
        ("Press <kbd>Ctrl</kbd> twice.", "Press Ctrl twice."),
        ("Pass `<name>` and `List[int]` here.", "Pass `<name>` and `List[int]` here."),
        ("A *very* **bold** __move__.", "A very bold move."),
        ("Keep snake_case_names and 2 * 3 * 4.", "Keep snake_case_names and 2 * 3 * 4."),
        ("white \n  space\tfolds", "white space folds"),
        ("", ""),
    ],
)
def test_an_answer_keeps_words_and_code_and_drops_markup(quote: str, answer: str) -> None:
    assert readable(quote) == answer


# lead


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("## Tank\n\nTwo litres, as **written** on its\nside\n\nMore.", "Two litres, as written on its side"),
        ("Short.\n\nWords that go on for thirty characters or more", "Words that go on for thirty characters or more"),
        ("Run this:\n\n```\nx = 1\ny = 2345678901234567890\n```", "Run this:\n\n```\nx = 1\ny = 2345678901234567890\n```"),
        (f"Run all of this in the morning:\n\n```\n{'y' * 480}\n```", "Run all of this in the morning:"),
        ("The first sentence is short enough. " + "More. " * 90, "The first sentence is short enough."),
    ],
    ids=["no full stop", "the first is too short", "with its code", "its code is too long", "too long a paragraph"],
)
def test_a_section_leads_with_what_it_says_first(text: str, answer: str) -> None:
    lead = lead_of(text)
    assert lead is not None and lead.answer == answer
    assert locate(lead.quote, text) is not None


@pytest.mark.parametrize(
    "text", ["", "## Heading only, of some length\n", "Short.", "```\ncode of thirty characters or more\n```", "x" * 481]
)
def test_a_section_without_a_paragraph_that_can_stand_has_no_lead(text: str) -> None:
    assert lead_of(text) is None
