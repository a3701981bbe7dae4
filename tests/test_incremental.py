"""The growth laws: an edit costs the calls for its own words, and nothing else changes. Real stages, and a fake endpoint that counts."""

import functools
import importlib
import inspect
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from fake_endpoint import FakeEndpoint, chosen

from stages import generate, measure
from stages.evidence import fold
from stages.llm import Store
from stages.params import read_section
from stages.recipes import asks
from stages.records import Candidate, Document, Pair, by_id, read_records

REPOSITORY = Path(__file__).parents[1]
COMMANDS = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
STAGES = ("collect", "ingest", "chunk", "generate", "judge", "measure", "validate")
CALLS = 13  # 6 sections of 2 facts, and a page without a fact or a heading, which the teacher is asked about freely

KETTLE = """# The Alto kettle

## Boiling

The Alto kettle boils one litre of cold water in three minutes.

The kettle makes a clicking sound when the water boils.

## Descaling

Descaling removes the white lime that hard water leaves behind.

To remove the lime, fill the kettle with half a litre of vinegar.
"""
LAMP = """# The Brio lamp

## Light

The Brio lamp gives eight hundred lumens of warm white light.

To start the Brio lamp, hold the touch sensor for two seconds.

## Battery

The battery of the Brio lamp needs nine hours of sunshine.

To replace the battery, open the foot of the lamp with a coin.

## Colours

For the curious: blue, green, red and amber glass.
"""
RADIO = """# The Corso radio

## Stations

The Corso radio stores forty stations in its memory.

To save a station, press one of the number keys until the radio beeps.

## Alarm

The alarm of the Corso radio starts quietly and grows louder.

To set the alarm, turn the left wheel of the radio at night.
"""
BIKE = """# The Dura bicycle

## Chain

The chain of the Dura bicycle needs two drops of oil each week.

To clean the chain, turn the pedals of the bicycle backwards.
"""
NOTES = "Without a heading: clear glass, brushed steel, black rubber.\n"
PAGES = {"kettle.md": KETTLE, "lamp.md": LAMP, "notes.md": NOTES, "radio.md": RADIO}


class Project:
    """A folder with pages, params.yaml and the stages' files, in which the stages run as dvc.yaml calls them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.candidates, self.pairs = folder / "data/candidates.jsonl", folder / "data/pairs.jsonl"

    def page(self, name: str) -> Path:
        return self.folder / "pages" / name

    def outputs(self) -> list[bytes]:
        return [(self.folder / "data" / name).read_bytes() for name in ("candidates.jsonl", "generate_failures.jsonl")]

    def set(self, url: str, **changes: Any) -> None:
        params = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
        params["collect"] = {"sources": {"pages": {"path": "pages"}}, "remotes": {}}
        params["models"]["base"] = params["models"]["embedder"]  # it only counts tokens here, and need not be unpacked first
        params["chunk"] |= {"max_tokens": 256, "min_prose_chars": 30}
        params["generate"] |= {"recipe": "quote-first", "pairs_per_chunk": 2, "wordings": 2, "min_similarity": 0.0}
        params["generate"] |= {"endpoints": [{"url": url, "model": "fake"}], "concurrency": 1, "timeout_s": 30} | changes
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")

    def run(self, *stages: str, **flags: bool) -> None:
        """Runs `stages` in this process."""
        here = Path.cwd()
        os.chdir(self.folder)
        try:
            for name in stages:
                main = importlib.import_module(f"stages.{name}").main
                arguments = inspect.signature(main, eval_str=True).parameters.values()
                words = [argument.annotation(word) for argument, word in zip(arguments, words_of(name)[3:], strict=False)]
                sections = {
                    argument.name: read_section(argument.name, argument.annotation)
                    for argument in arguments
                    if issubclass(argument.annotation, msgspec.Struct)
                }
                main(*words, **sections, **(flags if name == "generate" else {}))
        finally:
            os.chdir(here)

    def asked(self, stages: tuple[str, ...] = STAGES[:4], text: Any = chosen, prune: bool = False, **changes: Any) -> list[str]:
        """Runs `stages`; the last message of every call that was made."""
        with FakeEndpoint(text=text) as fake:
            self.set(fake.url, **changes)
            self.run(*stages, prune=prune)
        return [body["messages"][-1]["content"] for body in fake.bodies]

    def start_generate(self) -> subprocess.Popen[str]:
        """The stage generate as a program of its own."""
        return subprocess.Popen(
            [sys.executable, *words_of("generate")[1:]],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def words_of(stage: str) -> list[str]:
    command: str = (COMMANDS[stage].get("do") or COMMANDS[stage])["cmd"]
    return command.replace("${key}", "pages").split()


@pytest.fixture(scope="module", autouse=True)
def texts_embedded_once() -> Iterator[None]:
    """The embedder costs more than everything else here, and the same few texts come up in every run."""
    with pytest.MonkeyPatch.context() as patch:
        kept = functools.cache(generate.embedding)
        for stage in (generate, measure):
            patch.setattr(stage, "embedding", kept)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The pages above after all stages; nobody writes here again."""
    project = Project(tmp_path_factory.mktemp("undisturbed"))
    (project.folder / "pages").mkdir()
    (project.folder / "data").mkdir()
    for name in ("curated.jsonl", "review.jsonl"):
        (project.folder / "data" / name).touch()
    for name, text in PAGES.items():
        project.page(name).write_text(text, encoding="utf-8")
    assert len(project.asked(STAGES)) == CALLS
    assert len(read_records(project.pairs, Pair)) >= 12
    return project


@pytest.fixture
def project(undisturbed: Project, tmp_path: Path) -> Project:
    """A copy of `undisturbed`, with its store of replies."""
    shutil.copytree(undisturbed.folder, tmp_path / "project")
    return Project(tmp_path / "project")


def pairs_of(project: Project) -> dict[str, Pair]:
    return by_id(read_records(project.pairs, Pair))


def without(pairs: dict[str, Pair], *fields: str) -> dict[str, dict[str, Any]]:
    return {
        name: {field: value for field, value in msgspec.structs.asdict(pair).items() if field not in fields}
        for name, pair in pairs.items()
    }


def test_an_edited_paragraph_costs_the_call_for_its_new_words(project: Project, undisturbed: Project) -> None:
    edited = KETTLE.replace("boils one litre of cold water in three minutes", "boils two litres of cold water in five minutes")
    project.page("kettle.md").write_text(edited, encoding="utf-8")
    asked = project.asked()
    assert len(asked) == 1
    assert "two litres of cold water" in asked[0]
    before, after = (read_records(each.candidates, Candidate) for each in (undisturbed, project))
    assert any("one litre" in one.quote for one in before)
    assert not any("one litre" in one.quote for one in after)
    assert any("two litres" in one.quote for one in after)
    others = {one.id for one in before} & {one.id for one in after}
    sections = [sum("kettle" in one.question for one in some) for some in (before, after)]
    assert sections[0] == sections[1]  # the section's other fact is still there, under a new chunk
    assert {one.id for one in before if "kettle" not in f"{one.question}{one.quote}".lower()} <= others


def test_a_renamed_page_costs_nothing_and_changes_the_path_of_its_pairs_only(project: Project, undisturbed: Project) -> None:
    project.page("lamp.md").rename(project.page("a-light.md"))
    assert project.asked(STAGES) == []
    assert project.candidates.read_bytes() == undisturbed.candidates.read_bytes()
    before, after = pairs_of(undisturbed), pairs_of(project)
    assert without(after, "path", "section_id") == without(before, "path", "section_id")  # a section's id holds its path
    assert {pair.path for pair in before.values()} >= {"kettle.md", "lamp.md", "radio.md"}
    assert all(after[name].path == pair.path.replace("lamp.md", "a-light.md") for name, pair in before.items())


def test_a_moved_section_costs_nothing_and_its_pairs_follow_it(project: Project, undisturbed: Project) -> None:
    head, boiling, descaling = KETTLE.split("## ")
    project.page("kettle.md").write_text(f"{head}## {descaling}\n## {boiling}", encoding="utf-8")
    assert project.asked(STAGES) == []
    assert project.candidates.read_bytes() == undisturbed.candidates.read_bytes()
    before, after = pairs_of(undisturbed), pairs_of(project)
    places = ("document_id", "quote_start", "quote_end")
    assert without(after, *places) == without(before, *places)
    moved = {after[name].heading_path[-1] for name in before if after[name].quote_start != before[name].quote_start}
    assert moved == {"Boiling", "Descaling"}


def test_a_deleted_section_costs_nothing_and_leaves_no_pair(project: Project, undisturbed: Project) -> None:
    project.page("radio.md").write_text(RADIO.partition("## Alarm")[0], encoding="utf-8")
    assert project.asked(STAGES) == []
    gone = {name for name, pair in pairs_of(undisturbed).items() if pair.heading_path[-1] == "Alarm"}
    assert gone
    lines = [line for line in undisturbed.candidates.open("rb") if b"alarm" not in line]
    assert project.candidates.read_bytes() == b"".join(lines)
    kept = [line for line in undisturbed.pairs.open("rb") if b"radio.md" not in line]
    assert [line for line in project.pairs.open("rb") if b"radio.md" not in line] == kept
    before, after = pairs_of(undisturbed), pairs_of(project)
    assert before.keys() - after.keys() == gone
    assert without(after, "document_id") == {
        name: row for name, row in without(before, "document_id").items() if name not in gone
    }
    for name in ("chunks.jsonl", "candidates.jsonl", "pairs.jsonl", "rejected.jsonl", "generate_failures.jsonl"):
        assert b"alarm" not in (project.folder / "data" / name).read_bytes()


def test_changed_white_space_costs_nothing_and_keeps_pair_ids(project: Project, undisturbed: Project) -> None:
    for name, text in PAGES.items():
        wrapped = "\n".join(textwrap.fill(line, 30) for line in text.split("\n"))
        project.page(name).write_text("\n" + wrapped.replace("\n\n", "  \n \n\n"), encoding="utf-8")
    before = (undisturbed.folder / "data/documents.jsonl").read_bytes()
    assert project.asked(STAGES) == []
    assert (project.folder / "data/documents.jsonl").read_bytes() != before
    assert project.candidates.read_bytes() == undisturbed.candidates.read_bytes()
    assert pairs_of(project).keys() == pairs_of(undisturbed).keys()


def test_an_inserted_page_costs_the_calls_for_its_own_facts(project: Project, undisturbed: Project) -> None:
    project.page("a-bicycle.md").write_text(BIKE, encoding="utf-8")
    asked = project.asked()
    assert len(asked) == 2
    assert all("The Dura bicycle > Chain" in prompt for prompt in asked)
    before, after = (by_id(read_records(each.candidates, Candidate)) for each in (undisturbed, project))
    assert before.keys() < after.keys()
    assert {name: after[name] for name in before} == before


def test_another_seed_asks_everything_again(project: Project) -> None:
    assert len(project.asked(("generate",), seed=9)) == CALLS


def test_a_changed_prompt_asks_again_what_it_was_used_for(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = yaml.safe_load(asks.PROMPTS.read_text(encoding="utf-8"))
    prompts["quote-first"]["system"] += " Be brief."
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(prompts), encoding="utf-8")
    monkeypatch.setattr(asks, "PROMPTS", tmp_path / "prompts.yaml")
    asks.prompts.cache_clear()
    try:
        assert len(project.asked(("generate",))) == CALLS - 1  # the prompt `open` is as it was
    finally:
        asks.prompts.cache_clear()


@pytest.mark.parametrize("replies", [0, 1, CALLS * 25 // 100, CALLS * 60 // 100, CALLS - 1])
def test_a_killed_run_is_resumed_with_the_missing_calls_and_ends_as_if_nothing_had_been(
    replies: int, project: Project, undisturbed: Project
) -> None:
    shutil.rmtree(project.folder / "data/store")
    for name in ("candidates.jsonl", "generate_failures.jsonl"):
        (project.folder / "data" / name).unlink()
    with FakeEndpoint(text=killing_at(replies, lambda: running.pid)) as fake:
        project.set(fake.url)
        running = project.start_generate()
        running.communicate(timeout=30)
    assert running.returncode == -signal.SIGKILL
    assert not project.candidates.exists()
    assert len(project.asked(("generate",))) == CALLS - replies
    assert project.outputs() == undisturbed.outputs()


def killing_at(replies: int, pid: Callable[[], int]) -> Callable[[dict[str, Any]], str]:
    """Kills a process when it has had that many replies and asks for another."""
    given = 0

    def text(body: dict[str, Any]) -> str:
        nonlocal given
        if given == replies:
            os.kill(pid(), signal.SIGKILL)
        given += 1
        return chosen(body)

    return text


def test_of_two_runs_at_once_one_stops_with_code_75_and_the_other_loses_nothing(project: Project, undisturbed: Project) -> None:
    shutil.rmtree(project.folder / "data/store")
    (project.folder / ".dvc").mkdir()
    is_asked, may_answer = threading.Event(), threading.Event()

    def waiting(body: dict[str, Any]) -> str:
        is_asked.set()
        assert may_answer.wait(30)
        return chosen(body)

    with FakeEndpoint(text=waiting) as fake:
        project.set(fake.url)
        first = project.start_generate()
        assert is_asked.wait(30)
        second = project.start_generate()
        _, said = second.communicate(timeout=30)
        may_answer.set()
        first.communicate(timeout=60)
    assert second.returncode == 75
    assert said == f"generate: another run of it (pid {first.pid}) is at work here; wait or stop it\n"
    assert first.returncode == 0
    assert len(fake.bodies) == CALLS
    assert project.outputs() == undisturbed.outputs()


def test_prune_drops_what_no_current_chunk_uses_and_nothing_else(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.page("radio.md").write_text(RADIO.partition("## Alarm")[0], encoding="utf-8")
    assert project.asked(prune=True) == []
    assert "2 of earlier texts removed" in capsys.readouterr().out
    store = Store(project.folder / "data/store", "generate")
    assert store.size() == CALLS - 2
    store.close()
    project.page("radio.md").write_text(RADIO, encoding="utf-8")
    asked = project.asked()
    assert len(asked) == 2
    assert all("The Corso radio > Alarm" in prompt for prompt in asked)


def test_every_pair_leads_back_to_its_quote_in_the_document_and_in_the_collected_file(undisturbed: Project) -> None:
    documents = by_id(read_records(undisturbed.folder / "data/documents.jsonl", Document))
    pairs = pairs_of(undisturbed).values()
    assert {pair.path for pair in pairs} >= {"kettle.md", "lamp.md", "radio.md"}
    for pair in pairs:
        document = documents[pair.document_id]
        assert fold(document.text[pair.quote_start : pair.quote_end]) == pair.quote
        raw = undisturbed.folder / "data/raw" / document.source / "files" / document.path
        assert pair.quote in fold(raw.read_text(encoding="utf-8"))
