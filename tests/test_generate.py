"""generate: what is asked, what each reply comes to, and that nothing is lost whatever the teacher's server does."""

import functools
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import stamina
import yaml
from conftest import MODELS
from fake_endpoint import FakeEndpoint, Turn

from stages.embedding import Embed, embedding
from stages.evidence import fold
from stages.executor import LOCAL
from stages.generate import (
    Params,
    Ranked,
    candidates_of,
    curated_drafts,
    distinct,
    found_sections,
    main,
    places_in,
    round_trips,
    sound_sections,
    spread,
    without,
)
from stages.llm import Endpoint
from stages.program import BadInput, BadModelFile, LimitBroken, ServerFailed
from stages.recipes import Draft
from stages.records import Candidate, Chunk, Curated, Failure, content_id, read_records, write_records

ROOT = Path(__file__).parents[1]
GENERATE = Params(
    recipe="quote-first",
    endpoints=(),
    engine="auto",
    types=("factual", "conceptual", "procedural"),
    pairs_per_chunk=2,
    wordings=2,
    temperature=0.7,
    max_tokens=64,
    seed=100,
    min_similarity=0.3,
    max_chunks=0,
    concurrency=4,
    timeout_s=20,
)
KETTLE = "The tank of the kettle holds two litres of fresh water. To clean the kettle, fill the tank with vinegar and boil twice."
BIKE = "The front light of the bicycle needs three small batteries. A chain of steel connects the pedals of the bicycle with its wheel."
CAT = (
    "The grey cat follows the postman through the whole village. To call the cat, open the window and rattle with a box of food."
)
STUB = "Two litres and not one drop more"


def chunk(text: str, page: str, start: int = 0, heading: str = "Use", **changes: Any) -> Chunk:
    path, headings = f"{page.lower()}.md", (page, heading)
    return Chunk(
        id=content_id(headings, fold(text)),
        document_id=page,
        section_id=content_id(path, headings),
        path=path,
        heading_path=headings,
        start=start,
        end=start + len(text),
        text=text,
        **changes,
    )


CHUNKS = (chunk(KETTLE, "Kettle"), chunk(BIKE, "Bicycle"), chunk(CAT, "Cat"))


def but(**changes: Any) -> Params:
    return msgspec.structs.replace(GENERATE, **changes)


@pytest.fixture(autouse=True)
def without_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two attempts, at once; a server rests for 20 ms at first; all tests share one embedder, which embeds each text once."""
    monkeypatch.setattr("stages.llm.pool.FIRST_REST_S", 0.02)
    monkeypatch.setattr("stages.generate.embedding", kept_embedding)
    stamina.set_testing(True, attempts=2)
    yield
    stamina.set_testing(False)


kept_embedding = functools.cache(embedding)


# spread


def test_a_subset_takes_a_chunk_from_every_document_before_a_second_from_any() -> None:
    chunks = [chunk(f"{page}{n}", page) for page in ("a", "b", "c") for n in range(3)]
    assert [one.text for one in spread(chunks, 4)] == ["a0", "b0", "c0", "a1"]
    assert [one.text for one in spread(chunks, 2)] == ["a0", "b0"]


def test_no_limit_or_a_high_one_takes_all_in_their_order() -> None:
    chunks = [chunk(text, page) for text, page in (("x", "b"), ("y", "a"))]
    assert spread(chunks, 0) == spread(chunks, 2) == spread(chunks, 9) == chunks


# round trips, with vectors made by hand


def draft(
    question: str, answer: str = "A tank holds two litres of water, as a rule.", page: str = "Kettle", quote: str = ""
) -> Draft:
    return Draft(chunk(answer, page), "free", "factual", question, answer, quote or answer)


def turned(vectors: dict[str, float]) -> Callable[[list[str]], Any]:
    """Texts as points on a circle, each at the angle of the first key that it contains; nearness is the cosine of the difference."""

    def embed(texts: list[str]) -> Any:
        angles = [next(angle for part, angle in vectors.items() if part in text) for text in texts]
        return np.array([(np.cos(angle), np.sin(angle)) for angle in np.deg2rad(angles)])

    return embed


HERE = "A tank holds two litres of water, as a rule."
THERE = "A lamp shows the heat of the water in colours."
PAGES = (chunk(HERE, "Kettle"), chunk(THERE, "Lamp"))


def trips_of(drafts: list[Draft], chunks: Sequence[Chunk], embed: Embed) -> list[Ranked]:
    return round_trips(drafts, places_in(chunks, embed), embed)


def test_a_question_nearest_to_its_own_passage_has_rank_1() -> None:
    (trip,) = trips_of([draft("Tank?")], PAGES, turned({"ank?": 0, "litres": 10, "colours": 90}))
    assert (trip.draft.question, trip.rank, trip.similarity) == ("Tank?", 1, 0.9848)  # cos 10 degrees


def test_a_question_that_leads_elsewhere_is_put_again_with_its_page_and_kept_if_that_helps() -> None:
    places = {"In Kettle, tank?": 12, "ank?": 80, "litres": 10, "colours": 90}
    (trip,) = trips_of([draft("Tank?")], PAGES, turned(places))
    assert (trip.draft.question, trip.rank, trip.similarity) == ("In Kettle, tank?", 1, 0.9994)  # cos 2 degrees
    (trip,) = trips_of([draft("Tank?")], PAGES, turned(places | {"In Kettle, tank?": 70}))
    assert (trip.draft.question, trip.rank, trip.similarity) == ("Tank?", 2, 0.342)  # cos 70 degrees; naming was of no use


def test_a_passage_that_is_nearer_by_a_hair_is_a_tie() -> None:
    # cos 46 degrees is 0.695 and cos 44 is 0.719, 0.025 more; cos 43 is 0.731, 0.037 more
    (tie,) = trips_of([draft("In Kettle?")], PAGES, turned({"In Kettle?": 45, "litres": -1, "colours": 89}))
    (beaten,) = trips_of([draft("In Kettle?")], PAGES, turned({"In Kettle?": 45, "litres": -1, "colours": 88}))
    assert (tie.rank, beaten.rank) == (1, 2)


def test_a_passage_that_holds_the_quote_or_lacks_the_questions_code_is_not_elsewhere() -> None:
    part = draft("In Kettle?", quote="two litres of water")
    around = [*PAGES, chunk("Of two litres of water is a tank a good home, colours apart.", "Pot")]
    (trip,) = trips_of([part], around, turned({"In Kettle?": 90, "Pot": 90, "litres": 0, "colours": 0}))
    assert trip.rank == 1
    (trip,) = trips_of([draft("In Kettle, `tank`?")], PAGES, turned({"?": 90, "litres": 0, "colours": 90}))
    assert trip.rank == 1  # the nearer passage does not know `tank`
    named = [PAGES[0], chunk("A lamp shows the heat of the `tank` in colours.", "Lamp")]
    (trip,) = trips_of([draft("In Kettle, `tank`?")], named, turned({"?": 90, "litres": 0, "colours": 90}))
    assert trip.rank == 2


def test_a_passage_within_a_longer_quote_is_not_elsewhere() -> None:
    whole = draft("In Kettle?", f"{HERE} {THERE}")
    (trip,) = trips_of([whole], PAGES, turned({"?": 90, "litres": 0, "colours": 90}))
    assert trip.rank == 1
    (trip,) = trips_of([draft("In Kettle?")], PAGES, turned({"?": 90, "litres": 0, "colours": 90}))
    assert trip.rank == 2


def test_a_question_made_from_a_heading_leads_to_its_section() -> None:
    pages = [chunk(HERE, "Kettle"), chunk(THERE, "Kettle", start=90)]
    circle = turned({"?": 90, "litres": 0, "colours": 90})
    by_heading = msgspec.structs.replace(draft("In Kettle?"), recipe="heading")
    assert [trip.rank for trip in trips_of([by_heading, draft("In Kettle?")], pages, circle)] == [1, 2]
    assert [trip.rank for trip in trips_of([by_heading], PAGES, circle)] == [1]  # it names its section, whatever lies nearer


def test_without_drafts_or_passages_there_is_nothing_to_rank() -> None:
    assert trips_of([], PAGES, turned({"": 0})) == []
    (trip,) = trips_of([draft("Tank?", "short")], [chunk("short", "Kettle")], turned({"": 0}))
    assert (trip.rank, trip.similarity) == (1, 1.0)


def test_wordings_of_a_fact_are_numbered_best_first_and_equal_ones_count_once() -> None:
    trips = [
        Ranked(draft("Far?"), 0.9, 3),
        Ranked(draft("Near?"), 0.6, 1),
        Ranked(draft("Nearest?"), 0.8, 1),
        Ranked(draft("Near?"), 0.1, 9),
        Ranked(draft("Near?", THERE, "Lamp"), 0.5, 1),
    ]
    found = candidates_of(distinct(trips), "model")
    by_question = {(one.question, one.answer): (one.wording, one.rank, one.similarity) for one in found}
    assert by_question == {
        ("Nearest?", HERE): (1, 1, 0.8),
        ("Near?", HERE): (2, 1, 0.6),
        ("Far?", HERE): (3, 3, 0.9),
        ("Near?", THERE): (1, 1, 0.5),
    }
    assert len({one.fact_id for one in found}) == 2 and len({one.id for one in found}) == 4


# sections without a sound draft


def test_a_section_is_sound_when_a_draft_of_its_own_has_no_fault_and_is_near_enough() -> None:
    lamp = chunk(THERE, "Lamp")
    near = turned({"?": 60, "Lamp": 0})  # cosine 0.5
    sound = Draft(lamp, "free", "factual", "What does a lamp show?", THERE, THERE)
    faulty = msgspec.structs.replace(sound, quote="A lamp shows nothing.")
    assert sound_sections([faulty, sound], near, 0.49) == {lamp.section_id}
    assert sound_sections([faulty, sound], near, 0.51) == set()
    assert sound_sections([faulty], near, 0.1) == sound_sections([], near, 0.1) == set()


def test_a_section_is_found_when_a_draft_of_its_own_leads_back_to_it() -> None:
    lamp = chunk(THERE, "Lamp")
    sound = Draft(lamp, "free", "factual", "What does a lamp show?", THERE, THERE)
    faulty = msgspec.structs.replace(sound, quote="A lamp shows nothing.")
    lost = [Ranked(sound, 0.9, 2), Ranked(sound, 0.4, 1), Ranked(faulty, 0.9, 1)]
    assert found_sections(lost, 0.5) == set()
    assert found_sections([*lost, Ranked(sound, 0.5, 1)], 0.5) == {lamp.section_id}


def test_the_other_sections_come_with_their_chunks_in_reading_order() -> None:
    first, later, lamp = chunk("one", "Kettle"), chunk("two", "Kettle", start=10), chunk(THERE, "Lamp")
    assert without(set(), [lamp, later, first]) == {first.section_id: [first, later], lamp.section_id: [lamp]}
    assert without({lamp.section_id}, [lamp, later, first]) == {first.section_id: [first, later]}


# curated pairs


def curated(quote: str, question: str = "What does the kettle hold?") -> Curated:
    return Curated(
        id=content_id(question, quote), question=question, answer="Two litres.", quote=quote, type="factual", origin="old.json"
    )


def test_a_curated_pair_stands_under_the_first_chunk_that_holds_its_quote_or_is_lost_by_name() -> None:
    here, gone = curated("holds  two litres"), curated("holds three litres")
    drafts, lost = curated_drafts([here, gone], CHUNKS)
    assert [(one.chunk, one.recipe, one.question, one.answer) for one in drafts] == [
        (CHUNKS[0], "curated", "What does the kettle hold?", "Two litres.")
    ]
    assert [(one.parent_id, one.reason, one.detail) for one in lost] == [
        (gone.id, "no-evidence", "old.json: no chunk holds its quote")
    ]


# main


def teacher(body: dict[str, Any]) -> str:
    """A good reply: of offered questions always the first, else one that follows from the page alone."""
    prompt = body["messages"][-1]["content"]
    if "response_format" not in body:
        sentence = prompt.partition("Text:\n")[2].partition(".")[0]
        return json.dumps([{"question": f"What is said of {sentence[:40]}?", "answer": f"{sentence}."}])
    wanted = body["response_format"]["json_schema"]["schema"]["properties"]
    if "pairs" in wanted:
        page = body["messages"][1]["content"].partition("Page:\n")[2]
        quote = page.partition(".")[0] + "."
        wordings = wanted["pairs"]["items"]["properties"]["questions"]["minItems"]
        pair = {"quote": quote, "answer": quote, "questions": [f"What about {quote[:-1]} ({n})?" for n in range(wordings)]}
        return json.dumps({"pairs": [pair] * wanted["pairs"]["minItems"]})
    if "question" in wanted:
        return json.dumps({"question": f"What about {prompt.partition('Answer: ')[2][:30]}?"})
    return json.dumps({key: offered["enum"][0] for key, offered in wanted.items()})


class Files:
    """The paths of one run in `folder`."""

    def __init__(self, folder: Path, *chunks: Chunk, pairs: Sequence[Curated] = ()) -> None:
        self.chunks, self.curated, self.store = folder / "chunks.jsonl", folder / "curated.jsonl", folder / "store"
        self.outputs = [folder / name for name in ("candidates.jsonl", "failures.jsonl", "metrics.json")]
        write_records(self.chunks, chunks)
        write_records(self.curated, pairs)

    def run(self, *fakes: FakeEndpoint, options: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        """The metrics of a run with `fakes`, after its account was checked."""
        settings = but(endpoints=tuple(Endpoint(fake.url, "fake") for fake in fakes), **changes)
        main(
            self.chunks,
            self.curated,
            self.store,
            *self.outputs,
            generate=settings,
            models=MODELS,
            executor=LOCAL,
            **(options or {}),
        )
        metrics: dict[str, Any] = json.loads(self.outputs[2].read_text()) if self.outputs[2].exists() else {}
        if metrics:
            candidates, lost = self.candidates(), self.failures()
            assert metrics["calls"] == metrics["accepted"] + metrics["rejected"] + metrics["failed"]
            requests = {loss.detail[-13:] for loss in lost if loss.detail.endswith(")")}
            assert len(requests) == metrics["rejected"] + metrics["failed"]
            assert len(candidates) == metrics["candidates"]
            told_of = {one.chunk_id for one in candidates} | {loss.parent_id for loss in lost}
            assert {one.id for one in read_records(self.chunks, Chunk)} <= told_of
        return metrics

    def candidates(self) -> list[Candidate]:
        return read_records(self.outputs[0], Candidate)

    def failures(self) -> list[Failure]:
        return read_records(self.outputs[1], Failure)

    def reasons(self, page: Chunk) -> list[str]:
        return sorted(loss.reason for loss in self.failures() if loss.parent_id == page.id)

    def written(self) -> list[bytes]:
        return [path.read_bytes() for path in self.outputs]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path, *CHUNKS)


def test_a_good_teacher_gives_the_first_offered_questions_with_their_passages(files: Files) -> None:
    with FakeEndpoint(text=teacher) as fake:
        metrics = files.run(fake)
    assert len(fake.bodies) == 6
    assert {key: metrics[key] for key in ("chunks", "facts", "calls", "accepted", "rejected", "failed")} == {
        "chunks": 3, "facts": 6, "calls": 6, "accepted": 6, "rejected": 0, "failed": 0,
    }  # fmt: skip
    kettle = {one.question: one for one in files.candidates() if one.chunk_id == CHUNKS[0].id}
    assert sorted(kettle) == [
        "Can you tell me what the tank of the kettle holds?",
        "How do I clean the kettle?",
        "What does the tank of the kettle hold?",
        "What should I do to clean the kettle?",
    ]
    tank = kettle["What does the tank of the kettle hold?"]
    assert tank.answer == tank.quote == "The tank of the kettle holds two litres of fresh water."
    assert (tank.type, tank.recipe, tank.model, tank.rank) == ("factual", "quote-first", "fake", 1)
    assert {one.wording for one in kettle.values()} == {1, 2}
    assert metrics["by_recipe"] == {"quote-first": 12}
    assert metrics["by_type"] == {"factual": 8, "procedural": 4}
    assert files.failures() == []


# what a server can do wrong, about the bicycle only: its two passages; its heading asks without a call then

FAILED: dict[Turn, str] = {
    "429": "status 429",
    "500": "status 500",
    "400": "status 400",
    "slow": "timed out",
    "drip": "timed out",
    "reset": "unreachable",
    "no choices": "empty reply",
    "null": "empty reply",
    "empty": "unreadable reply",
    "half json": "unreadable reply",
    "huge": "unreadable reply: more than 4 MB",
    "wrong keys": "unreadable reply",
    "wrong types": "unreadable reply",
    "nan": "unreadable reply",
    "nested": "unreadable reply",
    "html": "unreadable reply",
    "declined": "refused: I can't help with that.",
}
UNUSABLE: dict[str, str] = {
    "refusal": "I'm sorry, but I can't help with that.",
    "prose": "Der Hund liegt neben dem Ofen.",
    "empty": "",
    "half json": '{"question_1": "What do',
    "wrong keys": '{"query": "What is it?"}',
    "nan": '{"question_1": NaN, "question_2": NaN, "question": NaN}',
    "huge json": json.dumps({"question_1": "What " * 50_000}),
    "null": "null",
}


@pytest.mark.parametrize("fault", FAILED)
def test_calls_that_a_server_fails_are_counted_as_failed_with_their_reason(fault: Turn, files: Files) -> None:
    stamina.set_testing(True, attempts=1)
    with FakeEndpoint(lambda prompt, _: fault if "bicycle" in prompt else "ok", teacher) as fake:
        metrics = files.run(fake, timeout_s=2 if fault in ("slow", "drip") else 20)
    assert (metrics["calls"], metrics["accepted"], metrics["rejected"], metrics["failed"]) == (6, 4, 0, 2)
    assert files.reasons(CHUNKS[1]) == ["call-failed"] * 2
    failed = [loss.detail for loss in files.failures() if loss.reason == "call-failed"]
    assert all(detail.startswith(FAILED[fault]) for detail in failed), failed
    assert (metrics["sections_tried_again"], metrics["sections_without_sound"]) == (1, 0)
    assert {one.recipe for one in files.candidates() if one.chunk_id == CHUNKS[1].id} == {"heading"}


@pytest.mark.parametrize("reply", UNUSABLE)
def test_replies_that_cannot_be_used_are_counted_as_rejected_with_their_reason(reply: str, files: Files) -> None:
    def sometimes(body: dict[str, Any]) -> str:
        return UNUSABLE[reply] if "bicycle" in body["messages"][-1]["content"] else teacher(body)

    with FakeEndpoint(text=sometimes) as fake:
        metrics = files.run(fake)
        assert (metrics["calls"], metrics["accepted"], metrics["rejected"], metrics["failed"]) == (6, 4, 2, 0)
        assert files.reasons(CHUNKS[1]) == ["unusable-reply"] * 2
        before = files.written(), len(fake.bodies)
        files.run(fake)
        assert (files.written(), len(fake.bodies)) == before  # kept, and not asked for again


def test_a_reply_cut_at_the_limit_is_rejected_and_says_so(files: Files) -> None:
    with FakeEndpoint(lambda prompt, _: "length" if "bicycle" in prompt else "ok", teacher) as fake:
        assert files.run(fake)["rejected"] == 2
    assert {loss.detail[:27] for loss in files.failures() if loss.reason == "unusable-reply"} == {"cut at generate.max_tokens "}


def test_a_fault_that_passes_costs_nothing_but_another_try(files: Files) -> None:
    with FakeEndpoint(lambda _, call: "ok" if call else "500", teacher) as fake:
        metrics = files.run(fake, concurrency=1)
    assert (metrics["calls"], metrics["accepted"], len(fake.bodies)) == (6, 6, 12)


def test_a_failed_call_is_asked_again_by_the_next_run_and_no_other(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeEndpoint(text=teacher) as fake:
        files.run(fake)
        calm = files.written()
    (files.store / "generate.sqlite").unlink()
    with FakeEndpoint(lambda prompt, _: "400" if "bicycle" in prompt else "ok", teacher) as fake:
        files.run(fake)
    with FakeEndpoint(text=teacher) as fake:
        files.run(fake)
        assert len(fake.bodies) == 2 and all("bicycle" in body["messages"][-1]["content"] for body in fake.bodies)
    assert files.written() == calm
    assert (
        "6 calls (4 reused, 2 generated, 0 of earlier texts no longer used) = 6 accepted + 0 rejected" in capsys.readouterr().out
    )


def test_a_model_that_is_swapped_stops_the_stage_and_writes_nothing(files: Files) -> None:
    with (
        FakeEndpoint(lambda prompt, _: "swapped" if "cat" in prompt else "ok", teacher) as fake,
        pytest.raises(ServerFailed, match="answered as model .*, and as .* before"),
    ):
        files.run(fake, concurrency=1)
    assert not any(path.exists() for path in files.outputs)


def test_a_server_that_dies_stops_the_stage_and_the_next_run_asks_the_rest(files: Files) -> None:
    with FakeEndpoint(text=teacher, dies_after=2) as fake, pytest.raises(ServerFailed, match="after 2 of 6 calls"):
        files.run(fake, concurrency=1)
    assert not any(path.exists() for path in files.outputs)
    with FakeEndpoint(text=teacher) as fake:
        assert files.run(fake)["accepted"] == 6
        assert len(fake.bodies) == 4


def test_a_teacher_that_never_answers_in_json_is_an_error_and_nothing_is_written(files: Files) -> None:
    with FakeEndpoint() as fake, pytest.raises(LimitBroken, match=r"none of 6 calls gave a question \(not the JSON asked for"):
        files.run(fake)
    assert not any(path.exists() for path in files.outputs)


def test_chunks_without_a_passage_are_an_error(tmp_path: Path) -> None:
    with FakeEndpoint() as fake, pytest.raises(BadInput, match="no chunk holds a passage to ask about; add prose"):
        Files(tmp_path, chunk("Short.", "A"), chunk("- a\n- b", "B")).run(fake)
    assert fake.bodies == []


def test_questions_in_another_language_become_candidates_that_lead_elsewhere_or_far_away(files: Files) -> None:
    def foreign(body: dict[str, Any]) -> str:
        prompt = body["messages"][1]["content"]
        said = json.loads(teacher(body))
        if "bicycle" in prompt:
            said["pairs"][0]["questions"] = ["Wer wohnt heute noch im Schloss des Königs?", "Wie spät ist es jetzt in Tokio?"]
        return json.dumps(said)

    with FakeEndpoint(text=foreign) as fake:
        files.run(fake, recipe="free", types=("factual",), pairs_per_chunk=1)
    wrong = [one for one in files.candidates() if one.chunk_id == CHUNKS[1].id and one.recipe == "free"]
    assert len(wrong) == 2
    assert all(one.similarity < 0.3 for one in wrong)  # validate.min_similarity is higher


# recipes


def test_the_free_recipe_repairs_once_and_keeps_the_same_account(files: Files) -> None:
    def careless(body: dict[str, Any]) -> str:
        said = teacher(body)
        return said if len(body["messages"]) > 2 else said.replace('"quote": "', '"quote": "Not so: ')

    with FakeEndpoint(text=careless) as fake:
        metrics = files.run(fake, recipe="free", types=("factual",), pairs_per_chunk=1)
    assert (metrics["calls"], metrics["repaired"], metrics["failed"]) == (6, 3, 0)
    repairs = [body["messages"] for body in fake.bodies if len(body["messages"]) > 2]
    assert len(repairs) == 3
    assert all(len(messages) == 4 and "copied word for word" in messages[3]["content"] for messages in repairs)


def test_a_repair_that_fails_as_well_is_not_repaired_again(files: Files) -> None:
    with FakeEndpoint(text=lambda body: "no" if "bicycle" in body["messages"][1]["content"] else teacher(body)) as fake:
        metrics = files.run(fake, recipe="free", types=("factual",))
    assert (metrics["calls"], metrics["repaired"], metrics["rejected"], len(fake.bodies)) == (5, 1, 2, 5)  # and a second try
    assert files.reasons(CHUNKS[1])[-2:] == ["unusable-reply"] * 2


def test_the_kits_recipe_keeps_the_same_account_and_finds_the_evidence(files: Files) -> None:
    with FakeEndpoint(text=teacher) as fake:
        metrics = files.run(fake, recipe="synthetic-data-kit")
    assert metrics["by_recipe"] == {"synthetic-data-kit": 3} and metrics["accepted"] == 3
    assert {one.quote for one in files.candidates()} == {text.partition(". ")[0] + "." for text in (KETTLE, BIKE, CAT)}


def test_a_section_that_got_nothing_is_asked_by_its_heading_or_else_in_the_teachers_words(tmp_path: Path) -> None:
    headed = chunk(STUB, "Lamp", heading="The tank")
    nameless = msgspec.structs.replace(chunk(STUB, "Options"), heading_path=("Options",))
    files = Files(tmp_path, *CHUNKS, headed, nameless)
    with FakeEndpoint(text=teacher) as fake:
        metrics = files.run(fake)
    assert (metrics["calls"], metrics["sections_tried_again"]) == (7, 1)
    found = {one.chunk_id: one for one in files.candidates() if one.recipe in ("heading", "open")}
    assert (found[nameless.id].recipe, found[nameless.id].question) == ("open", f"What about {STUB[:30]}?")
    assert found[headed.id].recipe == "heading" and found[headed.id].question.endswith("the tank in Lamp?")
    assert {one.answer for one in found.values()} == {one.quote for one in found.values()} == {STUB}


# curated


def test_curated_pairs_are_candidates_beside_the_generated_ones_and_need_no_teacher(tmp_path: Path) -> None:
    gone = curated("a quote that no page holds")
    files = Files(tmp_path, *CHUNKS, pairs=[curated("holds two litres of fresh water"), gone])
    with FakeEndpoint(text=teacher) as fake:
        metrics = files.run(fake)
    assert metrics["by_recipe"] == {"curated": 1, "quote-first": 12}
    (brought,) = [one for one in files.candidates() if one.recipe == "curated"]
    assert (brought.question, brought.answer, brought.chunk_id) == ("What does the kettle hold?", "Two litres.", CHUNKS[0].id)
    assert [(loss.parent_id, loss.reason) for loss in files.failures()] == [(gone.id, "no-evidence")]
    assert (metrics["calls"], metrics["accepted"]) == (6, 6)


# what a rerun costs; test_incremental.py has the cost of edits


def test_a_second_run_asks_nothing_and_writes_the_same_bytes(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeEndpoint(text=teacher) as fake:
        files.run(fake)
        before = files.written()
        files.run(fake)
        assert len(fake.bodies) == 6
    assert files.written() == before
    assert "6 calls (6 reused, 0 generated" in capsys.readouterr().out


def test_a_subset_names_the_chunks_that_were_not_chosen(files: Files) -> None:
    with FakeEndpoint(text=teacher) as fake:
        metrics = files.run(fake, max_chunks=2)
    assert (metrics["chunks"], metrics["calls"]) == (2, 4)
    assert [(loss.parent_id, loss.reason) for loss in files.failures()] == [(CHUNKS[0].id, "not-chosen")]


def test_one_sentence_in_two_chunks_is_one_call_and_a_candidate_of_both(tmp_path: Path) -> None:
    one, other = chunk(KETTLE, "Kettle"), chunk(f"{KETTLE} And a bit more.", "Kettle", start=500)
    files = Files(tmp_path, one, other)
    with FakeEndpoint(text=teacher) as fake:
        metrics = files.run(fake)
    assert (len(fake.bodies), metrics["calls"], metrics["facts"]) == (2, 2, 4)
    assert {candidate.chunk_id for candidate in files.candidates()} == {one.id, other.id}


def test_workers_and_the_order_of_endpoints_leave_the_outputs_as_they_are(tmp_path: Path) -> None:
    written = []
    with FakeEndpoint(text=teacher, latency_s=0.02) as one, FakeEndpoint(text=teacher) as other:
        for place, (fakes, concurrency) in enumerate([((one,), 1), ((one,), 4), ((one, other), 4), ((other, one), 2)]):
            (tmp_path / str(place)).mkdir()
            files = Files(tmp_path / str(place), *CHUNKS, chunk(STUB, "Lamp"))
            files.run(*fakes, concurrency=concurrency)
            written.append(files.written())
        assert other.bodies
    assert written[1:] == written[:1] * 3


# settings: each changes what is asked or what comes out

ASKED: dict[str, Any] = {
    "recipe": "free",
    "types": ("factual",),
    "pairs_per_chunk": 1,
    "wordings": 1,
    "temperature": 0.8,
    "max_tokens": 65,
    "seed": 101,
    "max_chunks": 1,
}


def keys_asked(folder: Path, **changes: Any) -> set[str]:
    """The keys of all requests of a run."""
    folder.mkdir()
    files = Files(folder, *CHUNKS)
    with FakeEndpoint(text=teacher) as fake:
        files.run(fake, **changes)
    return {key for (key,) in sqlite3.connect(files.store / "generate.sqlite").execute("SELECT key FROM replies")}


@pytest.fixture(scope="module")
def usual_keys(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.generate.embedding", kept_embedding)
        return keys_asked(tmp_path_factory.mktemp("usual") / "run")


@pytest.mark.parametrize("setting", ASKED)
def test_a_setting_changes_the_requests(setting: str, tmp_path: Path, usual_keys: set[str]) -> None:
    changed = keys_asked(tmp_path / "run", **{setting: ASKED[setting]})
    assert len(usual_keys) == 6
    if setting == "max_chunks":
        assert changed < usual_keys and len(changed) == 2
    elif setting == "pairs_per_chunk":
        assert len(changed) == 3
    elif setting == "types":  # facts keep their requests where all their questions are of that type
        assert changed and changed != usual_keys
    else:
        assert changed and not changed & usual_keys


@pytest.mark.parametrize(("min_similarity", "sections"), [(0.3, 0), (0.999, 3)])
def test_a_section_without_a_question_nearer_than_min_similarity_is_tried_again(
    min_similarity: float, sections: int, files: Files
) -> None:
    with FakeEndpoint(text=teacher) as fake:
        metrics = files.run(fake, min_similarity=min_similarity)
    assert metrics["sections_tried_again"] == metrics["by_recipe"].get("heading", 0) / 3 == sections


def test_every_setting_is_turned_in_this_file() -> None:
    elsewhere = {"endpoints", "engine", "concurrency", "timeout_s", "min_similarity"}
    assert {*ASKED, *elsewhere} == set(Params.__struct_fields__)


def test_concurrency_bounds_the_calls_in_flight(tmp_path: Path) -> None:
    for concurrency in (1, 3):
        (tmp_path / str(concurrency)).mkdir()
        with FakeEndpoint(text=teacher, latency_s=0.05) as fake:
            Files(tmp_path / str(concurrency), *CHUNKS).run(fake, concurrency=concurrency)
        assert fake.most_at_once == concurrency


def test_timeout_is_how_long_a_reply_is_waited_for(tmp_path: Path) -> None:
    stamina.set_testing(True, attempts=1)
    for timeout_s, failed in ((1, 2), (20, 0)):
        (tmp_path / str(timeout_s)).mkdir()
        with FakeEndpoint(text=teacher, latency_s=1.2) as fake:
            files = Files(tmp_path / str(timeout_s), CHUNKS[0])
            if failed:
                with pytest.raises(LimitBroken, match=r"none of 2 calls gave a question \(timed out\)"):
                    files.run(fake, timeout_s=timeout_s)
            else:
                assert files.run(fake, timeout_s=timeout_s)["failed"] == 0


def test_without_endpoints_the_engine_is_started_for_the_teacher(tmp_path: Path) -> None:
    files = Files(tmp_path, *CHUNKS)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/config.json").write_text("{}")
    models = msgspec.structs.replace(MODELS, teacher=str(tmp_path / "teacher"))
    with pytest.raises(BadModelFile, match=r"teacher is not a \.gguf file, which llama\.cpp needs"):
        main(
            files.chunks,
            files.curated,
            files.store,
            *files.outputs,
            generate=but(engine="llama.cpp"),
            models=models,
            executor=LOCAL,
        )


# estimate


def test_an_estimate_counts_what_is_missing_and_costs_nothing(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeEndpoint(text=teacher) as fake:
        assert files.run(fake, options={"estimate": True}) == {}
        assert fake.bodies == [] and not any(path.exists() for path in files.outputs)
        found = re.search(
            r"3 chunks, 6 calls, 0 of them kept: 6 to ask, ([\d,]+) prompt tokens and at most 384 new ones, time not",
            capsys.readouterr().out,
        )
        assert (
            found is not None and 1000 < int(found[1].replace(",", "")) < 4000
        )  # 6 prompts of some 1,500 characters, 4 to a token
        files.run(fake, max_chunks=2)
        capsys.readouterr()
        prices = {"estimate": True, "prompt_price": 2000.0, "new_price": 1_000_000.0}
        files.run(fake, options=prices)
        assert len(fake.bodies) == 4
    said = capsys.readouterr().out
    found = re.search(
        r"6 calls, 4 of them kept: 2 to ask, ([\d,]+) prompt tokens and 14 new ones, about \d+\.\d min .*, (\d+\.\d\d) at", said
    )
    assert found is not None, said  # the fake says 7 new tokens for each reply
    assert abs(float(found[2]) - (14 + int(found[1].replace(",", "")) * 0.002)) < 0.01


def test_an_estimate_for_an_own_teacher_counts_with_its_tokenizer_and_starts_no_server(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.run(options={"estimate": True}) == {}
    found = re.search(r"6 to ask, ([\d,]+) prompt tokens", capsys.readouterr().out)
    assert found is not None and 1000 < int(found[1].replace(",", "")) < 4000


# the command


def test_an_unreachable_server_is_one_line_and_exit_code_1(files: Files, tmp_path: Path) -> None:
    with FakeEndpoint() as fake:
        url = fake.url
    settings = msgspec.to_builtins(but(endpoints=(Endpoint(url, "fake"),)))
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump({"generate": settings, "models": msgspec.to_builtins(MODELS), "executor": msgspec.to_builtins(LOCAL)})
    )
    paths = [files.chunks, files.curated, files.store, *files.outputs]
    ended = subprocess.run(
        [sys.executable, "-m", "stages.generate", *map(str, paths)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(f"generate: the LLM server at {url} stopped answering after 0 of 6 calls"), ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_names_the_options_and_answers_without_the_heavy_libraries() -> None:
    code = (
        "import sys, stages.generate; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy', 'httpx')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    said = subprocess.run(
        [sys.executable, "-m", "stages.generate", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(option in said.stdout for option in ("--estimate", "--prune", "--prompt-price", "--new-price"))
