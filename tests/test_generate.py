import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import stamina
import yaml
from conftest import MODELS
from fake_endpoint import FakeEndpoint

from stages.generate import (
    PROMPTS,
    Ask,
    Draft,
    Fact,
    Params,
    asks_free,
    asks_quote_first,
    drafts_of,
    facts_of,
    main,
    paragraphs_of,
    ranked,
    readable,
    spread,
    type_of,
)
from stages.llm import Reply, Request, Store, request_key
from stages.models import load_embedder
from stages.program import BadInput, LimitBroken, ServerFailed
from stages.records import Candidate, Chunk, Failure, content_id, read_records, write_records

GENERATE = Params(
    recipe="quote-first",
    endpoint="",
    engine="auto",
    types=("factual", "conceptual", "procedural"),
    pairs_per_chunk=2,
    samples=3,
    temperature=0.7,
    max_tokens=64,
    seed=100,
    max_chunks=0,
    concurrency=4,
    timeout_s=20,
)
ALL = GENERATE.types
PROMPT = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
TEA = "Green tea steeps for three minutes at eighty degrees. A kettle is an electric pot that boils a litre in four minutes."
BIKE = "The front light of the bicycle shines for twelve hours. The chain of the bicycle needs oil after every ride in the rain."
CAT = "The grey cat sleeps on the piano for most of the day. The vet of the cat has a practice behind the town hall."


def chunk(text: str, document: str = "d", heading: tuple[str, ...] = ("Manual",), **changes: Any) -> Chunk:
    path = f"{document}.md"
    return Chunk(
        id=content_id(heading, text),
        document_id=document,
        section_id=content_id(path, heading),
        path=path,
        heading_path=heading,
        start=0,
        end=len(text),
        text=text,
        **changes,
    )


def but(**changes: Any) -> Params:
    return msgspec.structs.replace(GENERATE, **changes)


def answers(text: str, limit: int = 99) -> list[str]:
    return [fact.answer for fact in facts_of(chunk(text), limit, ALL)]


@pytest.fixture(scope="module")
def embed() -> Callable[[list[str]], Any]:
    embedder = load_embedder(MODELS.embedder)
    return lambda texts: embedder.encode(texts, normalize_embeddings=True)


# spread


def test_a_subset_takes_a_chunk_from_every_document_before_a_second_from_any() -> None:
    chunks = [chunk(f"{document}{n}", document) for document in ("a", "b", "c") for n in range(3)]
    assert [one.text for one in spread(chunks, 4)] == ["a0", "b0", "c0", "a1"]
    assert [one.text for one in spread(chunks, 2)] == ["a0", "b0"]


def test_no_limit_or_a_high_one_takes_all_in_their_order() -> None:
    chunks = [chunk(text, document) for text, document in (("x", "b"), ("y", "a"))]
    assert spread(chunks, 0) == spread(chunks, 2) == spread(chunks, 9) == chunks


# facts


def test_sentences_of_paragraphs_and_list_items_are_facts_and_tables_code_and_headings_are_not() -> None:
    text = (
        "## A heading that is as long as a sentence, with a full stop.\n\n"
        "The water tank of the machine holds two litres. The lamp of the\nmachine turns red when the tank is empty.\n\n"
        "- The first item of the list is a whole sentence.\n\n"
        "| a cell with a sentence as long as the others. | b |\n|---|---|\n| one more cell with a rather long sentence. | d |\n\n"
        "```\nprint('The code block holds a long sentence as well.')\n```\n"
    )
    assert answers(text) == [
        "The water tank of the machine holds two litres.",
        "The lamp of the machine turns red when the tank is empty.",
        "The first item of the list is a whole sentence.",
    ]


def test_a_sentence_that_leans_on_the_one_before_is_taken_with_it() -> None:
    text = "The water tank of the machine holds two litres. It must be emptied every evening."
    assert answers(text) == [
        "The water tank of the machine holds two litres.",
        "The water tank of the machine holds two litres. It must be emptied every evening.",
    ]


def test_a_sentence_that_leans_on_nothing_is_no_fact() -> None:
    assert answers("This must be emptied every evening before the kitchen closes.") == []


def test_too_short_too_long_and_unfinished_sentences_are_left_out() -> None:
    short, exact = "A" * 38 + ".", "B" * 39 + "."
    longest, too_long = "C" * 319 + ".", "D" * 320 + "."
    assert answers(f"{short}\n\n{exact}\n\n{longest}\n\n{too_long}") == [exact, longest]
    assert answers("The steps to clean the machine every evening are these:") == []


def test_an_abbreviation_does_not_end_a_sentence() -> None:
    sentence = "Some teas, e.g. Oolong from the high mountains, may be steeped twice."
    assert answers(sentence) == [sentence]


def test_a_limit_spreads_the_facts_over_the_chunk() -> None:
    sentences = [f"Sentence number {n} of the chunk is long enough to be a fact." for n in range(6)]
    assert answers(" ".join(sentences), limit=3) == [sentences[0], sentences[2], sentences[4]]
    assert answers(" ".join(sentences), limit=99) == sentences


def test_a_quote_is_verbatim_and_its_answer_reads_without_markup() -> None:
    (fact,) = facts_of(
        chunk("Set the [timeout](https://x.example/t) of the **client**\nto ten seconds with `--wait <s>`."), 9, ALL
    )
    assert fact.quote == "Set the [timeout](https://x.example/t) of the **client** to ten seconds with `--wait <s>`."
    assert fact.answer == "Set the timeout of the client to ten seconds with `--wait <s>`."
    assert fact.type == "procedural"


def test_paragraphs_that_markers_break_up_are_left_out() -> None:
    text = "Plain words\nover two lines.\n\n> quoted words\n> over two lines\n\n> one line quoted\n"
    assert paragraphs_of(text) == ["Plain words over two lines.", "one line quoted"]


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


@pytest.mark.parametrize(
    ("answer", "types", "kind"),
    [
        ("Use the short strap to roll the tent.", ALL, "procedural"),
        ("After that you can close the lid.", ALL, "procedural"),
        ("A kettle is a pot that boils water.", ALL, "conceptual"),
        ("The tank holds two litres.", ALL, "factual"),
        ("Use the short strap to roll the tent.", ("factual", "conceptual"), "factual"),
        ("The tank holds two litres.", ("procedural",), "procedural"),
        ("A kettle is a pot that boils water.", ("factual",), "factual"),
    ],
)
def test_the_type_follows_the_wording_within_the_types_that_are_asked_for(answer: str, types: Any, kind: str) -> None:
    assert type_of(answer, types) == kind


# asks


def test_each_fact_is_asked_about_samples_times_with_different_keys() -> None:
    asks = asks_quote_first(chunk(TEA), GENERATE, PROMPT["quote-first"], "model")
    assert [(ask.fact.answer[:9] if ask.fact else "", ask.sample, ask.request.seed) for ask in asks] == [
        ("Green tea", 0, 100),
        ("Green tea", 1, 101),
        ("Green tea", 2, 102),
        ("A kettle ", 0, 100),
        ("A kettle ", 1, 101),
        ("A kettle ", 2, 102),
    ]
    assert len({request_key(ask.request) for ask in asks}) == 6
    roles = [role for role, _ in asks[0].request.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user", "assistant", "user"]
    assert asks[0].request.messages[-1][1] == (
        "Topic: Manual\nAnswer: Green tea steeps for three minutes at eighty degrees.\nWrite a factual question."
    )
    assert asks[3].type == "conceptual"


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.8}, {"max_tokens": 65}, {"seed": 200}, {"types": ("procedural",)}],
)
def test_a_setting_that_changes_the_question_changes_the_key(change: dict[str, Any]) -> None:
    keys = [
        {request_key(ask.request) for ask in asks_quote_first(chunk(TEA), set_, PROMPT["quote-first"], "m")}
        for set_ in (GENERATE, but(**change))
    ]
    assert not keys[0] & keys[1]


def test_the_free_recipe_asks_for_pairs_per_chunk_in_all_and_the_types_take_turns() -> None:
    seen = set()
    for text in ("a", "b", "c", "d", "e", "f", "g", "h"):
        asks = asks_free(chunk(text), but(recipe="free", pairs_per_chunk=4), PROMPT["free"], "m")
        shares = {ask.type: json.loads(bytes(ask.request.schema or b""))["properties"]["pairs"] for ask in asks}
        assert sum(share["minItems"] for share in shares.values()) == 4
        assert all(share["minItems"] == share["maxItems"] for share in shares.values())
        assert sorted(share["minItems"] for share in shares.values()) == [1, 1, 2]
        seen |= {kind for kind, share in shares.items() if share["minItems"] == 2}
    assert seen == set(ALL)


def test_a_free_request_shows_the_whole_chunk_and_how_many_pairs_to_write() -> None:
    (ask,) = asks_free(chunk(TEA), but(recipe="free", types=("factual",)), PROMPT["free"], "m")
    assert ask.fact is None
    assert TEA in ask.request.messages[1][1]
    assert "Write 2 factual questions" in ask.request.messages[1][1]


# drafts

REQUEST = Request("m", (("user", "u"),), 0.0, 1, 0)
FACT_ASK = Ask(chunk(TEA), Fact("the *quote*", "the quote", "factual"), "factual", 0, REQUEST)
FREE_ASK = Ask(chunk(TEA), None, "factual", 0, REQUEST)


def test_a_reply_gives_a_draft_with_the_facts_answer_and_quote() -> None:
    (draft,) = drafts_of(FACT_ASK, Reply('{"question": "How \\n long?"}'))
    assert (draft.question, draft.answer, draft.quote) == ("How long?", "the quote", "the *quote*")


def test_a_free_reply_gives_a_draft_for_each_pair() -> None:
    pair = {"question": "How long?", "answer": " Three\nminutes. ", "quote": "for three\n  minutes"}
    drafts = drafts_of(FREE_ASK, Reply(json.dumps({"pairs": [pair, pair]})))
    assert [(draft.question, draft.answer, draft.quote) for draft in drafts] == [
        ("How long?", "Three\nminutes.", "for three minutes")
    ] * 2


@pytest.mark.parametrize(
    ("ask", "reply", "reason"),
    [
        (FACT_ASK, Reply("How long?"), "not the JSON asked for"),
        (FACT_ASK, Reply('{"question": "How lo'), "not the JSON asked for"),
        (FACT_ASK, Reply('{"query": "How long?"}'), "not the JSON asked for.*query"),
        (FACT_ASK, Reply('{"question": "a?", "answer": "b"}'), "not the JSON asked for.*answer"),
        (FACT_ASK, Reply('{"question": 7}'), "not the JSON asked for"),
        (FACT_ASK, Reply(""), "not the JSON asked for"),
        (FACT_ASK, Reply('{"question": "How long?"}', is_whole=False), "cut at max_tokens"),
        (FACT_ASK, Reply("", failed="timed out"), "timed out"),
        (FREE_ASK, Reply('{"pairs": []}'), "no pairs in the reply"),
        (FREE_ASK, Reply('{"pairs": [{"question": "a?", "answer": "b"}]}'), "not the JSON asked for.*quote"),
        (FREE_ASK, Reply('[{"question": "a?", "answer": "b", "quote": "c"}]'), "not the JSON asked for"),
    ],
)
def test_a_reply_without_a_draft_says_why(ask: Ask, reply: Reply, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        drafts_of(ask, reply)


# ranks


def draft(question: str, answer: str, sample: int = 0) -> Draft:
    return Draft(Ask(chunk(TEA), Fact(answer, answer, "factual"), "factual", sample, REQUEST), question, answer, answer)


STEEP, BOIL = TEA.partition(" A kettle")[0], "A kettle" + TEA.partition(" A kettle")[2]


def test_a_question_nearest_to_its_own_quote_has_rank_1_and_one_about_another_fact_has_not(embed: Any) -> None:
    rows = {
        one.question: one
        for one in ranked(
            [
                draft("How long does green tea steep?", STEEP),
                draft("How fast does a kettle boil a litre?", STEEP),
                draft("What is a kettle?", BOIL),
            ],
            embed,
            "model",
            "quote-first",
        )
    }
    assert rows["How long does green tea steep?"].rank == 1
    assert rows["How fast does a kettle boil a litre?"].rank == 2
    assert rows["What is a kettle?"].rank == 1
    assert 0.5 < rows["How long does green tea steep?"].similarity <= 1


def test_wordings_of_a_fact_are_numbered_best_first(embed: Any) -> None:
    drafts = [
        draft("Is water wet in the sea?", STEEP, 0),
        draft("How fast does a kettle boil?", STEEP, 1),
        draft("How long does green tea steep?", STEEP, 2),
    ]
    rows = sorted(ranked([*drafts, draft("What is a kettle?", BOIL)], embed, "m", "quote-first"), key=lambda row: row.wording)
    steep = [row for row in rows if row.answer == STEEP]
    assert [row.wording for row in steep] == [1, 2, 3]
    assert steep[0].question == "How long does green tea steep?"
    assert [(row.rank, -row.similarity) for row in steep] == sorted((row.rank, -row.similarity) for row in steep)
    assert len({row.fact_id for row in steep}) == 1
    assert [row.wording for row in rows if row.answer == BOIL] == [1]


def test_equal_questions_about_a_fact_stay_one_candidate_of_the_earliest_sample(embed: Any) -> None:
    rows = ranked(
        [draft("What is green tea?", STEEP, 2), draft("What is green tea?", STEEP, 1), draft("What is green tea?", BOIL, 0)],
        embed,
        "m",
        "free",
    )
    assert sorted((row.answer, row.sample, row.recipe) for row in rows) == [(BOIL, 0, "free"), (STEEP, 1, "free")]


# main


def question_of(body: dict[str, Any]) -> str:
    """A question that follows from the prompt alone: for an answer "The cat sleeps." it is "What about The cat sleeps?"."""
    prompt = body["messages"][-1]["content"]
    found = re.search(r"Answer: (.{10,60}?)[ .]*\n", prompt) or re.search(r"Answer: (.{60})", prompt)
    if found:
        return json.dumps({"question": f"What about {found[1]}?"})
    page = prompt.partition("Page:\n")[2]
    quote = page.partition(".")[0] + "."
    wanted = int(re.search(r"Write (\d+)", prompt)[1])  # type: ignore[index]
    pairs = [{"question": f"What about {quote[:-1]} in case {n}?", "answer": quote, "quote": quote} for n in range(wanted)]
    return json.dumps({"pairs": pairs})


class Files:
    """The paths of one run in `folder`."""

    def __init__(self, folder: Path, *chunks: Chunk) -> None:
        self.chunks, self.store = folder / "chunks.jsonl", folder / "store"
        self.candidates, self.failures, self.metrics = (
            folder / "candidates.jsonl",
            folder / "failures.jsonl",
            folder / "metrics.json",
        )
        write_records(self.chunks, chunks)

    def run(self, endpoint: str, **changes: Any) -> dict[str, Any]:
        models = msgspec.structs.replace(MODELS, teacher="fake")
        settings = but(endpoint=endpoint, **changes)
        main(self.chunks, self.store, self.candidates, self.failures, self.metrics, generate=settings, models=models)
        metrics: dict[str, Any] = json.loads(self.metrics.read_text())
        assert metrics["calls"] == metrics["usable"] + metrics["unusable"]
        lost = read_records(self.failures, Failure)
        whole_chunks = [loss for loss in lost if loss.reason in ("no-fact", "not-chosen")]
        assert len(read_records(self.chunks, Chunk)) == metrics["chunks_asked"] + len(whole_chunks)
        assert len(lost) - len(whole_chunks) == metrics["unusable"]
        assert len(read_records(self.candidates, Candidate)) == metrics["candidates"]
        return metrics

    def written(self) -> list[bytes]:
        return [path.read_bytes() for path in (self.candidates, self.failures, self.metrics)]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    stub = chunk("Too short.", "d")
    return Files(tmp_path, chunk(TEA, "a"), chunk(BIKE, "b"), chunk(CAT, "c"), stub)


def test_every_call_is_usable_or_unusable_and_every_chunk_asked_or_lost(files: Files) -> None:
    def sometimes_broken(body: dict[str, Any]) -> str:
        return "I would ask this." if "chain of the bicycle" in body["messages"][-1]["content"] else question_of(body)

    with FakeEndpoint(text=sometimes_broken) as fake:
        metrics = files.run(fake.url)
    assert len(fake.bodies) == metrics["calls"] == 18  # 3 chunks x 2 facts x 3 samples
    assert (metrics["usable"], metrics["unusable"]) == (15, 3)
    assert (metrics["chunks"], metrics["chunks_asked"], metrics["facts"]) == (4, 3, 5)
    assert (metrics["candidates"], metrics["repeated"]) == (5, 10)  # the fake's three samples are equal
    reasons = sorted((loss.reason, loss.detail[:22]) for loss in read_records(files.failures, Failure))
    assert reasons == [("no-fact", "no sentence can stand ")] + [("unusable-reply", "not the JSON asked for")] * 3
    cat = next(one for one in read_records(files.candidates, Candidate) if one.answer.startswith("The vet"))
    assert cat.quote == "The vet of the cat has a practice behind the town hall."
    assert cat.chunk_id == chunk(CAT, "c").id
    assert (cat.rank, cat.recipe, cat.wording) == (1, "quote-first", 1)


def test_the_free_recipe_keeps_the_same_account(files: Files) -> None:
    with FakeEndpoint(text=question_of) as fake:
        metrics = files.run(fake.url, recipe="free", types=("factual", "conceptual"), pairs_per_chunk=3)
    # 4 chunks, each asked once for each type; the types' shares are 2 and 1, and both replies tell of case 0
    assert metrics["calls"] == metrics["usable"] == len(fake.bodies) == 8
    assert (metrics["candidates"], metrics["repeated"]) == (8, 4)
    assert {one.recipe for one in read_records(files.candidates, Candidate)} == {"free"}


def test_a_second_run_asks_nothing_and_writes_the_same_bytes(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeEndpoint(text=question_of) as fake:
        files.run(fake.url)
        before = files.written()
        assert len(fake.bodies) == 18
        files.run(fake.url)
        assert len(fake.bodies) == 18
    assert files.written() == before
    assert "18 calls (18 reused, 0 asked" in capsys.readouterr().out


def test_an_edited_sentence_is_the_only_one_asked_about(files: Files) -> None:
    with FakeEndpoint(text=question_of) as fake:
        files.run(fake.url)
        edited = CAT.replace("behind the town hall", "beside the old mill")
        write_records(files.chunks, [chunk(TEA, "a"), chunk(BIKE, "b"), chunk(edited, "c")])
        fake.bodies.clear()
        metrics = files.run(fake.url)
    assert metrics["calls"] == 18
    assert len(fake.bodies) == 3
    assert all("beside the old mill" in body["messages"][-1]["content"] for body in fake.bodies)
    assert not any("town hall" in one.quote for one in read_records(files.candidates, Candidate))


def test_a_subset_names_the_chunks_that_were_not_chosen(files: Files) -> None:
    with FakeEndpoint(text=question_of) as fake:
        metrics = files.run(fake.url, max_chunks=2)
    assert (metrics["chunks"], metrics["calls"]) == (2, 12)
    lost = {loss.parent_id: loss.reason for loss in read_records(files.failures, Failure)}
    assert lost == {chunk(CAT, "c").id: "not-chosen", chunk("Too short.", "d").id: "not-chosen"}


def test_one_sentence_in_two_chunks_is_a_candidate_of_both(tmp_path: Path) -> None:
    one, other = chunk(TEA, "a"), chunk(f"{TEA} And a bit more.", "b")
    files = Files(tmp_path, one, other)
    with FakeEndpoint(text=question_of) as fake:
        files.run(fake.url)
    assert {candidate.chunk_id for candidate in read_records(files.candidates, Candidate)} == {one.id, other.id}


def test_a_teacher_that_never_gives_json_is_an_error_and_nothing_is_written(files: Files) -> None:
    with FakeEndpoint() as fake, pytest.raises(LimitBroken, match=r"none of 18 calls gave a question \(not the JSON asked for"):
        files.run(fake.url)
    assert not files.candidates.exists()


def test_chunks_without_a_sentence_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no chunk holds a sentence to ask about"):
        Files(tmp_path, chunk("Short."), chunk("- a\n- b")).run("http://127.0.0.1:9/v1")


def test_a_server_that_dies_stops_the_stage_and_a_rerun_asks_the_rest(files: Files) -> None:
    stamina.set_testing(True, attempts=2)
    try:
        with FakeEndpoint(text=question_of, dies_after=6) as fake, pytest.raises(ServerFailed, match="after 6 of 18 calls"):
            files.run(fake.url)
    finally:
        stamina.set_testing(False)
    assert not files.candidates.exists()


def test_an_unreachable_server_is_one_line_and_exit_code_1_and_kept_replies_stay(files: Files, tmp_path: Path) -> None:
    with FakeEndpoint(text=question_of) as fake:
        files.run(fake.url)
    kept = (files.store / "replies.sqlite").read_bytes()
    settings = msgspec.to_builtins(but(endpoint=fake.url, seed=500, concurrency=16))
    models = {"base": MODELS.base, "teacher": "fake", "embedder": MODELS.embedder}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"generate": settings, "models": models}))
    paths = [files.chunks, files.store, files.candidates, files.failures, files.metrics]
    ended = subprocess.run(
        [sys.executable, "-m", "stages.generate", *map(str, paths)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert (
        ended.stderr.strip()
        .splitlines()[-1]
        .startswith(f"generate: the LLM server at {fake.url} stopped answering after 0 of 18 calls")
    )
    assert "Traceback" not in ended.stderr
    assert (files.store / "replies.sqlite").read_bytes() == kept
    assert (
        len(
            Store(files.store).find(
                request_key(ask.request)
                for ask in asks_quote_first(chunk(TEA, "a"), GENERATE, PROMPT["quote-first"], f"{fake.url} fake")
            )
        )
        == 6
    )
