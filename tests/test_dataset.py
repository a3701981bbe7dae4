"""dataset: rows that lead back to their paragraphs, and a card that `datasets` reads and that says only what was measured."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from stages.dataset import LICENCE_FILE, Evidence, Row, Sources, Stated, hub_licences, main, main_languages
from stages.program import BadInput
from stages.records import Document, Example, Finding, Message, Pair, Question, Source, write_records

SOURCES = Sources(sources={"manual": Stated("MIT")}, remotes={"site": Stated()})
PARAMS = """
models: {base: b, teacher: pkg:teacher/file.gguf, embedder: pkg:embedder}
generate: {recipe: quote-first, seed: 3407, endpoints: [], engine: auto, concurrency: 64, timeout_s: 9}
measure: {min_cosine: 0.95, nli: ""}
split: {seed: 11}
train: {seed: 12}
"""
METRICS: dict[str, dict[str, Any]] = {
    "ingest": {"files": 30, "documents": 28},
    "generate": {"chunks": 7, "calls": 21, "candidates": 1234, "facts": 20},
    "judge": {"used": False, "why": "judge.enabled is false"},
    "measure": {
        "candidates": 1234,
        "clusters": 1100,
        "largest_cluster": 9,
        "with_secrets": 6,
        "with_personal_data": 8,
        "languages": {"de": 200, "en": 1000, "fr": 4, "not certain": 30},
        "entailed_by": "pkg:embedder",
    },
    "validate": {
        "pairs": 5,
        "rejected": 1229,
        "by_rule": {"answer-too-short": 90, "duplicate-question": 17, "id-repeats": 0, "judge-useless": 0, "near-duplicate": 13},
        "flagged": {"holds-personal-data": 8},
        "review": {"accepted": 31, "edited": 12, "rejected": 5, "stale": 2},
    },
    "coverage": {"sections": 40, "covered": 33, "share": 0.825, "pairs_by_recipe": {"quote-first": 5}},
    "split": {"train": 3, "dev": 0, "recall": 1, "held_out": 1, "unused": 4, "unused_by_reason": {"leak-margin": 4}},
}


def pair(name: str, document: str, kind: Any = "factual", **rest: Any) -> Pair:
    return Pair(
        id=name,
        chunk_id="c",
        fact_id=name,
        section_id=f"s-{name}",
        document_id=document,
        path=f"{document}.md",
        heading_path=() if document == "d2" else ("Ports", "Change"),
        question=f"What about {name}?",
        answer=f"It is {name}.",
        quote=f"the quote of {name}",
        quote_start=10,
        quote_end=30,
        type=kind,
        model="m",
        similarity=0.9,
        wording=1,
        cluster=name,
        **({"flags": (), "reviewed": False} | rest),
    )


def example(*names: str) -> Example:
    turns = [
        Message(role, text) for name in names for role, text in (("user", f"What about {name}?"), ("assistant", f"It is {name}."))
    ]  # type: ignore[arg-type]
    return Example(id="-".join(names), pair_ids=names, document_id="d1", messages=tuple(turns))


def question(name: str, of_set: Any) -> Question:
    rest: dict[str, Any] = {"type": "factual", "question": f"What about {name}?", "reference": f"It is {name}."}
    return Question(id=f"q-{name}", set=of_set, pair_id=name, section_id=f"s-{name}", **rest)


def write_inputs(folder: Path) -> list[Path]:
    """What the stages before `dataset` wrote, and the paths that it is given."""
    data, metrics = folder / "data", folder / "reports/metrics"
    pairs = [
        pair("p1", "d1", "procedural", reviewed=True),
        pair("p2", "d1", flags=("holds-personal-data",)),
        pair("p3", "d2"),
        pair("p4", "d2"),
        pair("p5", "d1", "conceptual"),
    ]
    page = {"title": "Page", "text": "Text"}
    write_records(data / "pairs.jsonl", pairs)
    documents = [
        Document(id="d1", source="manual", path="d1.md", sha256="aa11", revision="", **page),
        Document(id="d2", source="site", path="d2.md", sha256="bb22", revision="https://example.org/d2", **page),
    ]
    write_records(data / "documents.jsonl", documents)
    write_records(data / "train.jsonl", [example("p1"), example("p2"), example("p1", "p2")])
    write_records(data / "dev.jsonl", [])
    write_records(data / "questions.jsonl", [question("p3", "recall"), question("p4", "held_out")])
    where = {"rule": "zero-width", "path": "d1.md", "source": "manual", "shown": "what-was-found"}
    found = [Finding(id=f"f{n}", parent_id="d1", kind="hidden-text", start=n, end=n, **where) for n in range(3)]
    write_records(data / "findings.jsonl", found)
    files = {"manual": ("LICENSE", "d1.md", "sub/NOTICE"), "site": ("d2.md",)}
    for source, paths in files.items():
        records = [Source(id=path, source=source, path=path, sha256="00", revision="") for path in paths]
        write_records(data / "raw" / source / "manifest.jsonl", records)
    metrics.mkdir(parents=True)
    for name, figures in METRICS.items():
        (metrics / f"{name}.json").write_text(json.dumps(figures))
    (folder / "params.yaml").write_text(PARAMS)
    return [data, metrics, folder / "params.yaml", folder / "data/dataset"]


def write_card(paths: list[Path], sources: Sources = SOURCES) -> str:
    main(*paths, collect=sources)
    return (paths[3] / "README.md").read_text(encoding="utf-8")


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_datasets_loads_the_folder_and_every_row_leads_back_to_its_paragraphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_inputs(tmp_path)
    write_card(paths)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    loaded = datasets.load_dataset(str(paths[3]), cache_dir=str(tmp_path / "cache"))
    assert {name: rows.num_rows for name, rows in loaded.items()} == {"train": 3, "recall": 1, "held_out": 1}
    rows = {row["id"]: row for row in loaded["train"]}
    assert [message["content"] for message in rows["p1-p2"]["messages"]] == [
        "What about p1?",
        "It is p1.",
        "What about p2?",
        "It is p2.",
    ]
    assert [message["role"] for message in rows["p1"]["messages"]] == ["user", "assistant"]
    first, second = rows["p1-p2"]["evidence"]
    assert first == {
        "pair_id": "p1",
        "type": "procedural",
        "source": "manual",
        "path": "d1.md",
        "heading_path": ["Ports", "Change"],
        "quote": "the quote of p1",
        "quote_start": 10,
        "quote_end": 30,
        "sha256": "aa11",
        "revision": "",
        "reviewed": True,
        "flags": [],
    }
    assert (second["pair_id"], second["flags"], second["reviewed"]) == ("p2", ["holds-personal-data"], False)
    (asked,) = loaded["recall"]
    assert [message["content"] for message in asked["messages"]] == ["What about p3?", "It is p3."]
    assert (asked["evidence"][0]["revision"], asked["evidence"][0]["heading_path"]) == ("https://example.org/d2", [])
    assert loaded["held_out"][0]["evidence"][0]["pair_id"] == "p4"
    features = loaded["held_out"].features
    assert list(features) == list(Row.__struct_fields__) and list(features["evidence"].feature) == list(
        Evidence.__struct_fields__
    )
    assert features["evidence"].feature["heading_path"].feature.dtype == "string"  # though no row of this split has a heading


def test_the_card_gives_the_figures_of_the_run(tmp_path: Path) -> None:
    card = write_card(write_inputs(tmp_path))
    assert (
        "# Questions and answers about manual, site\n\n5 conversations about documentation, made by Docsmith from 2 documents"
        in card
    )
    assert "\n| train | 3 | 4 | 2 | 0 | 2 | " in card and "\n| validation | 0 | 0 | 0 | 0 | 0 | " in card
    assert "\n| held\\_out | 1 | 1 | 1 | 0 | 0 | " in card
    assert "30 files, 28 documents, 7 chunks." in card
    assert (
        "`quote-first` asked the teacher model `pkg:teacher/file.gguf`" in card
        and "21 calls, 1,234 candidates for 20 facts" in card
    )
    assert "4 unused. Reasons for not using a pair: leak-margin 4." in card
    assert "| answer-too-short | warning | 90 | fewer than 20 characters explain nothing |" in card
    assert "| holds-personal-data | info | 8 |" in card and "in `flags`: holds-personal-data 1." in card
    assert "words of a better question 17, near-duplicates of a better pair of another fact 13." in card
    assert "form 1,100 clusters of like question and answer, the largest of 9" in card
    assert "People accepted 31, edited 12 and rejected 5 candidates." in card and "Of 5 pairs 1 was read and accepted" in card
    assert "Of 40 sections 33 have a pair (82.5 %)" in card


def test_general_rows_have_no_evidence_and_the_card_tells_them_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_inputs(tmp_path)
    without = write_card(paths)
    turns = Message("user", "Hello!"), Message("assistant", "Hello! What can I do for you?")
    general = [Example(id=f"g{number}", pair_ids=(), document_id="general", messages=turns) for number in (1, 2)]
    write_records(paths[0] / "train.jsonl", [*general, example("p1"), example("p2"), example("p1", "p2")])
    card = write_card(paths, Sources(sources={"manual": Stated("MIT")}, remotes={"site": Stated("MIT")}))
    assert "\n5 conversations about documentation" in card and "Of the rows of `train`, 2 are general conversations" in card
    assert "\n| train | 5 | 4 | 2 | 0 | 2 | " in card and front_matter(card)["license"] == ["apache-2.0", "mit"]
    assert "general conversation" not in without and "or of its messages" in card and "or of its messages" not in without
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    rows = datasets.load_dataset(str(paths[3]), cache_dir=str(tmp_path / "cache"))["train"]
    assert sorted(row["id"] for row in rows if not row["evidence"]) == ["g1", "g2"] and rows.num_rows == 5


def test_a_finding_is_counted_and_its_text_and_place_are_not_told(tmp_path: Path) -> None:
    card = write_card(write_inputs(tmp_path))
    assert "| hidden-text | 3 | 1 |" in card
    assert "what-was-found" not in card and "d1.md" not in card
    paths = write_inputs(tmp_path / "clean")
    (paths[0] / "findings.jsonl").write_text("")
    assert "Nothing was found." in write_card(paths)


def test_a_judge_that_was_not_used_is_not_said_to_have_found_nothing(tmp_path: Path) -> None:
    paths = write_inputs(tmp_path)
    card = write_card(paths)
    assert "No candidate broke id-repeats.\n" in card and "faithful and useful: judge.enabled is false." in card
    (paths[1] / "judge.json").write_text(json.dumps({"used": True, "why": "the audit passed"}))
    card = write_card(paths)
    assert "No candidate broke id-repeats, judge-useless.\n" in card and "A model judged candidates: the audit passed." in card


def test_how_entailment_was_measured_is_said(tmp_path: Path) -> None:
    paths = write_inputs(tmp_path)
    assert "was measured by the cosine of embeddings" in write_card(paths)
    paths[2].write_text(PARAMS.replace('nli: ""', "nli: pkg:nli"))
    (paths[1] / "measure.json").write_text(json.dumps({"entailed_by": "pkg:nli"}))
    assert "was estimated by the model `pkg:nli`." in write_card(paths)


def test_without_metrics_the_card_says_not_measured_and_no_zero(tmp_path: Path) -> None:
    paths = write_inputs(tmp_path)
    for name in METRICS:
        (paths[1] / f"{name}.json").unlink()
    card = write_card(paths)
    made = card.split("## How it was made")[1].split("## Settings")[0]
    assert (
        "not measured calls" in made
        and "People accepted not measured" in made
        and "What each rule rejected was not measured." in made
    )
    assert "(not measured)" in made and "Whether an answer follows from its quote was not measured." in made
    assert not re.search(r"\b0\b", made) and "language" not in front_matter(card)


def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    paths = write_inputs(tmp_path)
    matter = front_matter(write_card(paths))
    assert matter["language"] == ["de", "en"] and matter["size_categories"] == ["n<1K"]
    assert matter["configs"][0]["data_files"] == [
        {"split": name, "path": f"{name}.jsonl"} for name in ("train", "recall", "held_out")
    ]
    assert "license" not in matter  # the site states none
    both = Sources(sources={"manual": Stated("MIT")}, remotes={"site": Stated("Apache-2.0")})
    assert front_matter(write_card(paths, both))["license"] == ["apache-2.0", "mit"]
    assert hub_licences(["MIT", "for our customers only"]) == ["mit", "other"] and hub_licences(["MIT", ""]) == []


def test_a_licence_is_named_as_stated_and_files_at_the_top_of_a_source_are_named_unread(tmp_path: Path) -> None:
    card = write_card(write_inputs(tmp_path))
    assert "\n| manual | 1 | files without a revision | MIT | LICENSE |\n" in card
    assert "\n| site | 1 | https://example.org/d2 | not stated | none found |\n" in card
    names = ["LICENSE", "LICENCE.md", "License.txt", "COPYING", "NOTICE", "LICENSE-MIT", "LICENSE-APACHE-2.0.txt"]
    assert [name for name in names if not LICENCE_FILE.fullmatch(name)] == []
    others = ["license-server.md", "licensing.md", "a/LICENSE", "notices.md"]
    assert [name for name in others if LICENCE_FILE.fullmatch(name)] == []


def test_only_settings_that_decide_the_data_are_in_the_card_and_servers_are_not(tmp_path: Path) -> None:
    paths = write_inputs(tmp_path)
    served = '[{url: "http://10.0.0.7/v1", model: big-teacher, api_key_env: KEY}]'
    paths[2].write_text(PARAMS.replace("endpoints: []", f"endpoints: {served}"))
    card = write_card(paths)
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings == {
        "generate": {"recipe": "quote-first", "seed": 3407},
        "measure": {"min_cosine": 0.95, "nli": ""},
        "split": {"seed": 11},
    }
    assert "10.0.0.7" not in card and "the teacher model `big-teacher`" in card and "pkg:teacher" not in card


def test_a_language_is_named_when_a_twentieth_of_candidates_has_it() -> None:
    assert main_languages({"en": 94, "de": 5, "la": 1}) == ["de", "en"]
    assert main_languages({"en": 95, "la": 4, "not certain": 1}) == ["en"] and main_languages(None) == main_languages({}) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pairs", r"the pair p\d is used, but pairs\.jsonl does not hold it\. Re-run: dvc repro split"),
        ("documents", r"the pair p\d names document d\d, which documents\.jsonl does not hold\. Re-run: dvc repro generate"),
    ],
)
def test_a_row_without_its_source_is_an_error_and_the_old_folder_stays(name: str, message: str, tmp_path: Path) -> None:
    paths = write_inputs(tmp_path)
    first = write_card(paths)
    (paths[0] / f"{name}.jsonl").write_text("")
    with pytest.raises(BadInput, match=message):
        write_card(paths)
    assert (paths[3] / "README.md").read_text(encoding="utf-8") == first


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    paths = write_inputs(tmp_path)
    write_card(paths)
    first = {path.name: path.read_bytes() for path in paths[3].iterdir()}
    write_card(paths)
    assert {path.name: path.read_bytes() for path in paths[3].iterdir()} == first
    assert sorted(first) == ["README.md", "held_out.jsonl", "recall.jsonl", "train.jsonl"]


def test_other_rows_give_another_size(tmp_path: Path) -> None:
    paths = write_inputs(tmp_path)
    many = [msgspec.structs.replace(example("p1"), id=f"e{number:04}") for number in range(999)]
    write_records(paths[0] / "train.jsonl", many)  # with the two questions 1001
    assert front_matter(write_card(paths))["size_categories"] == ["1K<n<10K"]
