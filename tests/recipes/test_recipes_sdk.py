"""recipes.sdk: the kit's prompt goes out as it is, its parser's silent losses become reasons, and evidence is found or denied."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from conftest import MODELS

from stages.models import load_embedder
from stages.recipes.sdk import evidence_for, messages_for, pairs_in, spans_of

TWO = [
    {"question": "Which port does the server use?", "answer": "Port `5000`,\nunless another is set."},
    {"question": "What is “DVC”?", "answer": 'A tool that "versions" data \\ files.'},
]
BOTH = [(pair["question"], pair["answer"]) for pair in TWO]


@pytest.fixture(scope="module")
def embed() -> Callable[[list[str]], Any]:
    embedder = load_embedder(MODELS.embedder)
    return lambda texts: embedder.encode(texts, normalize_embeddings=True)


def test_the_kits_own_prompt_is_one_message_that_ends_with_the_chunk(capsys: pytest.CaptureFixture[str]) -> None:
    text = "# Ports\n\nThe server uses {port} 5000.\n\nIt can be changed."
    ((role, content),) = messages_for(text, 2)
    assert role == "system"
    assert content.startswith("Create question-answer pairs from this text for LLM training.")
    assert content.endswith(f"Text:\n{text}\n") and '"answer": "Answer 1."' in content
    assert capsys.readouterr() == ("", "")


def test_a_long_chunk_stays_one_message() -> None:
    text = "\n\n".join(f"Paragraph {number} is about ports. " * 10 for number in range(50))
    assert len(text) > 4000  # the kit's own limit
    ((_, content),) = messages_for(text, 2)
    assert text in content


@pytest.mark.parametrize(
    "reply",
    [
        json.dumps(TWO),
        json.dumps({"pairs": TWO}),
        f"Here they are:\n```json\n{json.dumps(TWO, indent=2, ensure_ascii=False)}\n```\nAnything else?",
        json.dumps(TWO).replace("}", ",}").replace("]", ",]"),
        json.dumps([pair | {"difficulty": "easy"} for pair in TWO]),
    ],
    ids=["plain", "wrapped", "fenced", "trailing commas", "more fields"],
)
def test_replies_that_the_kit_can_read_give_every_pair(reply: str) -> None:
    assert pairs_in(reply) == BOTH


def test_more_pairs_than_the_kit_would_ask_for_are_all_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDK_VERBOSE", "true")
    many = [{"question": f"Question {number}?", "answer": f"Answer {number}."} for number in range(40)]
    assert len(pairs_in(json.dumps(many))) == 40
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "found no pair"),
        ("[]", "found no pair"),
        ("I cannot help with that.", "found no pair"),
        ("[{'question': 'Which port?', 'answer': '5000'}]", "found no pair"),
        ("ERROR: Connection\nerror.", "ERROR: Connection error."),
        ('[{"q": "Which port?", "a": "5000"}]', "missing required field `question`"),
        ('[{"question": "Which port?"}]', "missing required field `answer`"),
        ('[{"question": "Which port?", "answer": NaN}]', "Expected `str`, got `float`"),
        ('[{"question": "Which port?", "answer": " "}]', "Expected `str` matching regex"),
        ("[1, 2]", "Expected `object`, got `int`"),
        # the kit makes fewer or other pairs of these, without a word
        ('[{"question": "Which port?", "answer": "5000"}, {"question": "Which host?", "answ', "1 pairs from a reply with 2"),
        ('[{"question": "Which port?", "answer": "5000"}, {"question": "Which ho', "1 pairs from a reply with 2"),
        ('[{"question": "Which port?", "answer": "The "usual" one"}]', "lost or changed words"),
        ('{"question": "Which port?", "answer": "5000\\nor 80"}', "lost or changed words"),
        ('[{"question": "Which list?", "answer": "Write f(x, [1, ])."}]', "lost or changed words"),
    ],
)
def test_a_reply_that_gives_no_pair_or_not_as_written_says_why(reply: str, reason: str) -> None:
    with pytest.raises(ValueError) as raised:
        pairs_in(reply)
    assert reason in str(raised.value) and "\n" not in str(raised.value)


def test_an_answer_over_two_lines_of_the_reply_is_not_a_change() -> None:
    assert pairs_in('[{"question": "Which port?", "answer": "Port\n  5000"}]') == [("Which port?", "Port 5000")]


def test_the_kit_is_imported_only_when_it_is_used() -> None:
    code = "import stages.recipes.sdk, sys; sys.exit('synthetic_data_kit' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


TEXT = """# Server

The server listens on port 5000. It answers
four questions at once.

## Limits

- A body that is too large gets the status 413.
"""


def test_spans_are_sentences_and_neighbours_that_stand_together_in_the_text() -> None:
    one, two, three = (
        "The server listens on port 5000.",
        "It answers four questions at once.",
        "A body that is too large gets the status 413.",
    )
    assert spans_of(TEXT) == [one, two, three, f"{one} {two}"]


def test_evidence_is_what_speaks_of_both_question_and_answer(embed: Callable[[list[str]], Any]) -> None:
    pairs = [
        ("Which status does a body that is too large get?", "413"),
        ("Where does the server listen?", "It uses port 5000."),
        ("What is the capital of France?", "Paris is the capital of France."),
        ("Question 1?", "Answer 1."),
        ("How many servers are there?", "There are three servers in the cluster."),  # about the subject
        ("Which status does a body that is too large get?", "Paris is the capital of France."),  # the question alone is near
        ("What is the capital of France?", "The server listens on port 5000."),  # the answer alone is near
    ]
    found = evidence_for(pairs, spans_of(TEXT), embed)
    assert found == ["A body that is too large gets the status 413.", "The server listens on port 5000.", *[""] * 5]


def test_without_spans_or_pairs_there_is_no_evidence(embed: Callable[[list[str]], Any]) -> None:
    assert evidence_for(BOTH, [], embed) == ["", ""]
    assert evidence_for([], ["A sentence."], embed) == []
