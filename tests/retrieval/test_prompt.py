"""stages.retrieval.prompt: what fits is shown whole, what does not is left out or cut where a sentence or line ends."""

from stages.records import Chunk
from stages.retrieval import with_passages
from stages.retrieval.prompt import ASK


def chunk(heading: str, text: str, fence: str = "") -> Chunk:
    return Chunk(
        id=heading,
        document_id="d",
        section_id="s",
        path="p.md",
        heading_path=("Guide", heading),
        start=0,
        end=len(text),
        text=text,
        fence=fence,
    )


FIRST = chunk("Lamp", "The lamp is bright. It has a sensor.\nHold the sensor.\n- two seconds")
SECOND = chunk("Radio", "The radio is loud.")
QUESTION = "How do I dim the lamp?"
EMPTY = len(f"{ASK}\n\n[Guide > Lamp]\n\n\nQuestion: {QUESTION}")


def within(chars: int) -> tuple[str, int]:
    return with_passages(QUESTION, [FIRST, SECOND], lambda text: len(text) <= chars)


def test_passages_stand_with_their_headings_between_the_task_and_the_question() -> None:
    assert within(10_000) == (
        f"{ASK}\n\n[Guide > Lamp]\n{FIRST.text}\n\n[Guide > Radio]\nThe radio is loud.\n\nQuestion: How do I dim the lamp?",
        2,
    )


def test_a_passage_that_does_not_fit_is_left_out_from_the_end() -> None:
    whole = within(10_000)[0]
    assert within(len(whole))[1] == 2
    text, count = within(len(whole) - 1)
    assert count == 1 and "Radio" not in text and FIRST.text in text and text.endswith(f"Question: {QUESTION}")


def test_one_passage_that_is_too_long_is_cut_behind_the_last_sentence_or_line_that_fits() -> None:
    for kept in (
        "The lamp is bright.",
        "The lamp is bright. It has a sensor.",
        "The lamp is bright. It has a sensor.\nHold the sensor.",
    ):
        for spare in (0, 5):
            text, count = within(EMPTY + len(kept) + spare)
            assert (text, count) == (f"{ASK}\n\n[Guide > Lamp]\n{kept}\n\nQuestion: {QUESTION}", 1)


def test_the_question_stands_alone_where_no_sentence_fits_and_where_there_is_no_passage() -> None:
    assert within(EMPTY + 10) == (QUESTION, 0)
    assert with_passages(QUESTION, [], lambda text: False) == (QUESTION, 0)


def test_a_passage_from_within_a_code_block_is_shown_as_code() -> None:
    text, _ = with_passages(QUESTION, [chunk("Run", "dvc repro\n```", fence="```")], lambda text: True)
    assert "[Guide > Run]\n```\ndvc repro\n```\n\nQuestion:" in text
