"""recipes.asks: what each recipe asks about a chunk, and what it makes of each reply, good or bad."""

import json
import math
from typing import Any

import msgspec
import pytest
import yaml

from stages.evidence import Passage
from stages.generate import Params
from stages.llm import Reply
from stages.recipes import (
    Ask,
    Draft,
    asks_about,
    drafts_in,
    faults_of,
    heading_drafts,
    naming,
    repair_of,
    retries_of,
    with_evidence,
)
from stages.recipes.asks import PROMPTS, facts_of
from stages.records import Chunk

SETTINGS = Params(
    recipe="quote-first",
    endpoints=(),
    engine="auto",
    types=("factual", "conceptual", "procedural"),
    pairs_per_chunk=2,
    wordings=3,
    temperature=0.7,
    max_tokens=64,
    seed=100,
    min_similarity=0.5,
    max_chunks=0,
    concurrency=4,
    timeout_s=20,
)
PROMPT = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
EVEN, ODD = "00000000000000a0", "00000000000000a1"
PROCEDURAL = "To clean the kettle, fill the tank with vinegar and boil twice."
CONCEPTUAL = "A kettle is an electric pot that boils a litre in four minutes."
FACTUAL = "The tank of the kettle holds two litres of fresh water."


def chunk(text: str, name: str = EVEN, headings: tuple[str, ...] = ("Kettle", "Tank")) -> Chunk:
    return Chunk(id=name, document_id="d", section_id="s", path="d.md", heading_path=headings, start=0, end=len(text), text=text)


def but(**changes: Any) -> Params:
    return msgspec.structs.replace(SETTINGS, **changes)


def said(answer: object) -> Reply:
    return Reply(json.dumps(answer))


# which passages


@pytest.mark.parametrize(
    ("pairs", "answers"),
    [
        (1, [PROCEDURAL]),
        (2, [PROCEDURAL, CONCEPTUAL]),
        (3, [PROCEDURAL, CONCEPTUAL, FACTUAL]),
        (4, [PROCEDURAL, CONCEPTUAL, FACTUAL, "To open the kettle, press the small button on the lid."]),
    ],
)
def test_the_types_take_turns_from_the_rarest_on(pairs: int, answers: list[str]) -> None:
    text = "\n\n".join((FACTUAL, CONCEPTUAL, PROCEDURAL, "To open the kettle, press the small button on the lid."))
    facts = facts_of(chunk(text), but(pairs_per_chunk=pairs))
    assert [passage.answer for passage, _ in facts] == answers
    assert [forms[0][0] for _, forms in facts] == ["procedural", "conceptual", "factual", "procedural"][:pairs]


def test_only_types_that_are_asked_for_are_offered() -> None:
    text = "\n\n".join((FACTUAL, CONCEPTUAL, PROCEDURAL))
    assert [passage.answer for passage, _ in facts_of(chunk(text), but(types=("conceptual",), pairs_per_chunk=9))] == [CONCEPTUAL]
    option = "`--days <number>` - sets how many days a book may be kept."
    ((_, forms),) = facts_of(chunk(option, headings=("lend",)), but(types=("procedural",)))
    assert forms == [
        ("procedural", "How do I set how many days a book may be kept with `lend`?"),
        ("procedural", "Which option of `lend` sets how many days a book may be kept?"),
    ]


def test_every_other_chunk_has_a_long_passage_and_not_its_first_sentence_as_well() -> None:
    paragraph = f"{FACTUAL} The lamp of the kettle shows the heat of the water in five colours."
    text = f"{paragraph}\n\n{CONCEPTUAL}"
    lamp = "The lamp of the kettle shows the heat of the water in five colours."
    assert [passage.answer for passage, _ in facts_of(chunk(text, EVEN), but(pairs_per_chunk=9))] == [CONCEPTUAL, FACTUAL, lamp]
    assert [passage.answer for passage, _ in facts_of(chunk(text, ODD), but(pairs_per_chunk=9))] == [paragraph, CONCEPTUAL, lamp]
    assert [passage.answer for passage, _ in facts_of(chunk(text, ODD), but(pairs_per_chunk=1))] == [CONCEPTUAL]


def test_a_sentence_that_answers_no_question_is_not_chosen() -> None:
    assert facts_of(chunk("Beautiful days in the green hills of the far north."), SETTINGS) == []
    assert asks_about(chunk("Beautiful days in the green hills of the far north."), SETTINGS, "m") == []


def test_a_chunk_that_begins_inside_code_is_not_asked_about_its_code() -> None:
    inside = msgspec.structs.replace(chunk(f"{FACTUAL}\n```\n\n{CONCEPTUAL}"), fence="```")
    assert [passage.answer for passage, _ in facts_of(inside, SETTINGS)] == [CONCEPTUAL]


# quote-first


def test_the_questions_of_a_fact_are_dealt_to_the_wordings_and_the_schema_allows_no_other() -> None:
    (ask,) = asks_about(chunk("The tank depends on the pump of the kettle and the valve."), but(wordings=4), "m")
    assert ask.choices == {"question_1": [("factual", "What does the tank depend on?")]}  # fewer forms than wordings
    (ask,) = asks_about(chunk(CONCEPTUAL), but(wordings=2), "m")
    offered = {key: [question for _, question in forms] for key, forms in ask.choices.items()}
    assert offered == {
        "question_1": ["What is a kettle?", "Can you explain what a kettle is?", "How is a kettle defined?"],
        "question_2": ["What is meant by a kettle?", "How would you describe a kettle?"],
    }
    schema = json.loads(bytes(ask.request.schema or b""))
    assert {key: value["enum"] for key, value in schema["properties"].items()} == offered
    assert schema["required"] == ["question_1", "question_2"] and schema["additionalProperties"] is False
    assert (ask.type, ask.passage and ask.passage.answer) == ("conceptual", CONCEPTUAL)


def test_a_request_shows_the_examples_in_the_form_of_the_reply_and_then_the_passage() -> None:
    (ask,) = asks_about(chunk(CONCEPTUAL), SETTINGS, "sha")
    roles = [role for role, _ in ask.request.messages]
    assert roles == ["system", *["user", "assistant"] * len(PROMPT["quote-first"]["examples"]), "user"]
    assert json.loads(ask.request.messages[2][1])["question_1"] == "How do I rinse the coffee machine?"
    assert ask.request.messages[-1][1] == f"Topic: Kettle > Tank\nAnswer: {CONCEPTUAL}"
    assert (ask.request.model_sha256, ask.request.temperature, ask.request.max_tokens, ask.request.seed) == ("sha", 0.7, 64, 100)


def test_a_chosen_question_becomes_a_draft_with_the_passage_and_its_own_type() -> None:
    option = "`--days <number>` - sets how many days a *book* may be kept."
    (ask,) = asks_about(chunk(option, headings=("lend",)), but(wordings=2), "m")
    how, what = "How do I set how many days a book may be kept with `lend`?", "What does the `--days` option of `lend` do?"
    drafts = drafts_in(ask, said({"question_2": how, "question_1": what}))
    assert [(draft.question, draft.type) for draft in drafts] == [(how, "procedural"), (what, "factual")]
    assert {(draft.answer, draft.quote, draft.recipe, draft.key) for draft in drafts} == {
        (option.replace("*", ""), option, "quote-first", ask.key)
    }


# free


def test_the_free_recipe_asks_for_pairs_per_chunk_in_all_and_the_types_take_turns() -> None:
    seen = set()
    for number in range(6):
        asks = asks_about(chunk(FACTUAL, f"{number:016x}"), but(recipe="free", pairs_per_chunk=4), "m")
        pairs = {ask.type: json.loads(bytes(ask.request.schema or b""))["properties"]["pairs"] for ask in asks}
        assert sorted(entry["minItems"] for entry in pairs.values()) == [1, 1, 2]
        assert all(entry["minItems"] == entry["maxItems"] for entry in pairs.values())
        seen |= {kind for kind, entry in pairs.items() if entry["minItems"] == 2}
    assert seen == set(SETTINGS.types)


def test_a_free_request_shows_the_whole_chunk_and_wants_evidence_first_and_all_wordings() -> None:
    (ask,) = asks_about(chunk(f"\n{FACTUAL}\n\n{CONCEPTUAL}\n"), but(recipe="free", types=("factual",), wordings=5), "m")
    prompt = ask.request.messages[1][1]
    assert f"Topic: Kettle > Tank\nPage:\n{FACTUAL}\n\n{CONCEPTUAL}\n\nWrite 2 factual questions" in prompt
    assert "in 5 ways" in prompt and "Ask for names, values" in prompt and "{" not in prompt
    pair = json.loads(bytes(ask.request.schema or b""))["properties"]["pairs"]["items"]
    assert pair["required"] == ["quote", "answer", "questions"]
    assert (pair["properties"]["questions"]["minItems"], pair["properties"]["questions"]["maxItems"]) == (5, 5)


def test_a_free_reply_gives_a_draft_for_each_wording() -> None:
    (ask,) = asks_about(chunk(FACTUAL), but(recipe="free", types=("factual",)), "m")
    pair = {"quote": "two litres\n of fresh", "answer": " Two litres. ", "questions": ["How \\n much?", "How many litres?"]}
    drafts = drafts_in(ask, said({"pairs": [pair, pair | {"questions": ["What else?"]}]}))
    assert [draft.question for draft in drafts] == ["How \\n much?", "How many litres?", "What else?"]
    assert {(draft.answer, draft.quote) for draft in drafts} == {("Two litres.", "two litres of fresh")}


def free(question: str = "How much does the tank hold?", answer: str = "Two litres.", quote: str = "holds two litres") -> Any:
    return {"pairs": [{"questions": [question], "answer": answer, "quote": quote}]}


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (
            said(free(quote="holds three litres")),
            "How much does the tank hold?: the quote is not copied word for word from the page",
        ),
        (said(free(quote="")), "the quote is not copied"),
        (said(free("Tell me about the tank.")), "the question is no question"),
        (said(free("Why?")), "the question is no question"),
        (said(free("What is it that the tank holds?")), "the question does not name its subject"),
        (said(free("How do they boil water?")), "the question does not name its subject"),
        (said(free(answer="I'm sorry, I can't say.")), "it refuses, or speaks of the text"),
        (
            said(free("What does the text say about tanks?", answer="The page says two litres.")),
            "it refuses, or speaks of the text",
        ),
        (Reply("Two litres!"), "not the JSON asked for"),
        (said({"pairs": []}), "no pairs in the reply"),
        (Reply(json.dumps(free())[:40], is_whole=False), "cut at generate.max_tokens"),
    ],
)
def test_a_free_reply_with_a_fault_is_asked_for_again_with_the_fault_named(reply: Reply, fault: str) -> None:
    (ask,) = asks_about(chunk(FACTUAL), but(recipe="free", types=("factual",)), "m")
    repair = repair_of(ask, reply, SETTINGS)
    assert repair is not None and repair.key != ask.key
    assert repair.request.messages[:2] == ask.request.messages
    (_, shown), (role, wish) = repair.request.messages[2:]
    assert shown == reply.text and role == "user" and fault in wish
    assert (repair.chunk, repair.recipe, repair.type) == (ask.chunk, "free", "factual")
    assert drafts_in(repair, said(free()))[0].key == repair.key


def test_a_sound_reply_and_a_failed_call_and_other_recipes_need_no_repair() -> None:
    (ask,) = asks_about(chunk(FACTUAL), but(recipe="free", types=("factual",)), "m")
    assert repair_of(ask, said(free()), SETTINGS) is None
    assert repair_of(ask, Reply("", failed="timed out"), SETTINGS) is None
    (choose,) = asks_about(chunk(FACTUAL), SETTINGS, "m")
    assert repair_of(choose, Reply("no JSON"), SETTINGS) is None


def test_a_repair_shows_no_more_of_a_huge_reply_than_the_teacher_may_write() -> None:
    (ask,) = asks_about(chunk(FACTUAL), but(recipe="free", types=("factual",)), "m")
    repair = repair_of(ask, Reply("x" * 100_000), but(max_tokens=10))
    assert repair is not None and repair.request.messages[2] == ("assistant", "x" * 40)


def test_a_draft_with_evidence_that_names_its_subject_has_no_fault() -> None:
    draft = Draft(chunk(FACTUAL), "free", "factual", "What is the item of the tank?", "I do what I can.", "two  litres")
    assert faults_of(draft) == []


# synthetic-data-kit


def test_the_kit_is_asked_in_one_request_without_a_schema_and_its_type_takes_turns() -> None:
    asks = [asks_about(chunk(FACTUAL, f"{n:016x}"), but(recipe="synthetic-data-kit"), "m") for n in range(3)]
    assert [[ask.type for ask in some] for some in asks] == [["factual"], ["conceptual"], ["procedural"]]
    request = asks[0][0].request
    assert request.schema is None and request.messages[-1][1].endswith(f"Text:\n{FACTUAL}\n")


def embed(texts: list[str]) -> Any:
    """Unit vectors over a few words."""
    import numpy as np

    rows = np.array([[text.lower().count(word) + 1e-3 for word in ("tank", "litre", "lamp", "colour", "moon")] for text in texts])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_kits_pairs_get_the_nearest_sentence_as_evidence_or_none() -> None:
    lamp = "The lamp of the kettle shows the heat in five colours."
    page = chunk(f"{FACTUAL}\n\n{lamp}")
    (ask,) = asks_about(page, but(recipe="synthetic-data-kit"), "m")
    pairs = [
        ("What does the tank hold?", "Two litres."),
        ("Which colours has the lamp?", "Five colours."),
        ("Where is the moon?", "The moon is far."),
    ]
    drafts = drafts_in(ask, said([{"question": question, "answer": answer} for question, answer in pairs]))
    assert [draft.quote for draft in drafts] == ["", "", ""]
    kept = Draft(page, "free", "factual", "What?", "That.", "the quote")
    assert [draft.quote for draft in with_evidence([kept, *drafts], embed)] == ["the quote", FACTUAL, lamp, ""]
    assert math.isclose(embed(["tank tank"])[0][0], 1, abs_tol=1e-3)  # else nearness means nothing


# second tries

LEAD = "Two litres, as *written* on the left side"


def test_a_heading_asks_without_a_call_and_is_answered_by_what_its_section_says_first() -> None:
    page = chunk(f"Short.\n\n{LEAD}", headings=("Kettle", "The tank"))
    assert [(draft.recipe, draft.type, draft.question, draft.key) for draft in heading_drafts(page, SETTINGS)] == [
        ("heading", "conceptual", "What should I know about the tank in Kettle?", ""),
        ("heading", "conceptual", "What does the documentation say about the tank in Kettle?", ""),
        ("heading", "conceptual", "Can you explain the tank in Kettle?", ""),
    ]
    assert {(draft.answer, draft.quote) for draft in heading_drafts(page, SETTINGS)} == {(LEAD.replace("*", ""), LEAD)}
    assert heading_drafts(page, but(types=("factual",))) == []
    assert heading_drafts(chunk("Short.", headings=("Kettle", "The tank")), SETTINGS) == []
    assert retries_of(page, SETTINGS, "m") == []


def test_where_the_heading_asks_nothing_the_teacher_writes_a_question() -> None:
    (ask,) = retries_of(chunk(LEAD, headings=("Options",)), SETTINGS, "m")
    assert (ask.recipe, ask.type, ask.choices) == ("open", "conceptual", {})
    assert ask.passage == Passage(LEAD, LEAD.replace("*", ""), "long")
    (draft,) = drafts_in(ask, said({"question": "How much does\nthe tank hold?"}))
    assert (draft.question, draft.answer, draft.quote) == ("How much does the tank hold?", ask.passage.answer, LEAD)
    assert json.loads(bytes(ask.request.schema or b""))["properties"]["question"]["pattern"].startswith("^(How|What|")
    assert ask.request.messages[-1][1] == f"Topic: Options\nAnswer: {ask.passage.answer}\nWrite a conceptual question."
    assert retries_of(chunk("Short.", headings=("Options",)), SETTINGS, "m") == []


# bad replies

(CHOOSE,) = asks_about(chunk(FACTUAL), but(wordings=1), "m")
(FREE,) = asks_about(chunk(FACTUAL), but(recipe="free", types=("factual",)), "m")
(KIT,) = asks_about(chunk(FACTUAL), but(recipe="synthetic-data-kit"), "m")
(OPEN,) = retries_of(chunk(FACTUAL, headings=()), SETTINGS, "m")
GOOD = {"question_1": "What does the tank of the kettle hold?"}
NO_JSON = "not the JSON asked for"
REFUSAL = Reply("I'm sorry, but I can't help with that.")


def test_the_good_reply_that_the_bad_ones_differ_from_is_good() -> None:
    assert [draft.question for draft in drafts_in(CHOOSE, said(GOOD))] == [GOOD["question_1"]]


@pytest.mark.parametrize("ask", [CHOOSE, FREE, KIT, OPEN], ids=lambda ask: ask.recipe)
@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("", failed="timed out"), "^timed out$"),
        (Reply("{}", is_whole=False), "^cut at generate.max_tokens$"),
        (REFUSAL, f"{NO_JSON}|no pair"),
        (Reply(""), f"{NO_JSON}|no pair"),
        (Reply(" \n"), f"{NO_JSON}|no pair"),
        (Reply(json.dumps(free())[:60]), f"{NO_JSON}|no pair|lost or changed"),
        (Reply("NaN"), f"{NO_JSON}|no pair"),
        (Reply("null"), f"{NO_JSON}|no pair"),
        (Reply("[]"), f"{NO_JSON}|no pair"),
        (Reply("{}"), "not offered|no pair"),
        (said({"query": "What does the tank hold?"}), f"{NO_JSON}|not offered|no pair"),
        (said(GOOD | {"question_9": "Why?"}), f"{NO_JSON}|not offered|no pair"),
        (Reply("\udc80"), f"{NO_JSON}|no pair"),
        (Reply("[" * 100_000), f"{NO_JSON}|no pair"),
    ],
    ids=[
        "failed",
        "cut",
        "refusal",
        "empty",
        "blank",
        "half",
        "NaN",
        "null",
        "list",
        "object",
        "wrong key",
        "more keys",
        "bytes",
        "deep",
    ],
)
def test_a_reply_that_cannot_be_used_says_why_in_every_recipe(ask: Ask, reply: Reply, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        drafts_in(ask, reply)


@pytest.mark.parametrize(
    ("ask", "reply", "reason"),
    [
        (CHOOSE, said({"question_1": "Who made the tank?"}), "a question that was not offered"),
        (CHOOSE, said({"question_1": 7}), NO_JSON),
        (CHOOSE, Reply('{"question_1": NaN}'), NO_JSON),
        (CHOOSE, said([GOOD]), NO_JSON),
        (OPEN, said({"question": "What?", "answer": "That."}), "no pairs in the reply"),
        (
            FREE,
            said({"pairs": [{"question": "What?", "answer": "That.", "quote": "two"}]}),
            f"{NO_JSON}.*unknown field `question`",
        ),
        (FREE, said({"pairs": [{"questions": ["What?"], "answer": "That."}]}), f"{NO_JSON}.*`quote`"),
        (FREE, said({"pairs": [{"questions": "What?", "answer": "That.", "quote": "two"}]}), NO_JSON),
        (FREE, said({"pairs": [{"questions": [], "answer": "That.", "quote": "two"}]}), "no pairs in the reply"),
        (FREE, Reply('{"pairs": [{"questions": ["What?"], "answer": NaN, "quote": "two"}]}'), NO_JSON),
        (KIT, said([{"question": "What does the tank hold?"}]), f"{NO_JSON}.*`answer`"),
    ],
)
def test_a_reply_of_the_wrong_kind_is_refused_by_its_own_recipe(ask: Ask, reply: Reply, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        drafts_in(ask, reply)


# naming the page


@pytest.mark.parametrize(
    ("headings", "question", "named"),
    [
        (("Kettle", "Tank"), "What does the tank hold?", "In Kettle, what does the tank hold?"),
        (("lend",), "How do I list books?", "In `lend`, how do I list books?"),
        (("Kettle",), "What does the KETTLE hold?", "What does the KETTLE hold?"),
        (("Options", "Tank"), "What does the tank hold?", "What does the tank hold?"),
        (("Why a kettle?", "Tank"), "What does the tank hold?", "What does the tank hold?"),
        ((), "What does the tank hold?", "What does the tank hold?"),
    ],
)
def test_a_page_is_named_at_the_head_of_a_question_that_does_not_name_it(headings: Any, question: str, named: str) -> None:
    assert naming(Draft(chunk(FACTUAL, headings=headings), "free", "factual", question, "a", "q")).question == named
