"""coverage: every section is on the map, every row is counted once, and a section without a pair has a reason."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.coverage import CELLS, FROM, LEVELS, MAX_ROWS, by_document, draw, level, main, main_reason
from stages.program import BadInput
from stages.records import Candidate, Chunk, Coverage, Document, Failure, Pair, Rejected, read_records, write_records

FILES = ("documents", "chunks", "candidates", "failures", "pairs", "rejected")
Run = Callable[..., list[Coverage]]


def chunk(name: str, section: str, start: int, document: str = "a") -> Chunk:
    return Chunk(
        id=name,
        document_id=document,
        section_id=section,
        path=f"{document}.md",
        heading_path=("Guide", section),
        start=start,
        end=start + 10,
        text="Text.",
    )


def candidate(name: str, chunk_id: str, fact: str, kind: Any = "factual", recipe: str = "quote-first") -> Candidate:
    rest: dict[str, Any] = {"question": "Port?", "answer": "5000.", "quote": "5000.", "model": "m", "similarity": 0.9}
    return Candidate(id=name, chunk_id=chunk_id, fact_id=fact, type=kind, recipe=recipe, rank=1, wording=1, **rest)


def pair(name: str, chunk_id: str) -> Pair:
    place: dict[str, Any] = {"section_id": "any", "document_id": "a", "path": "a.md", "heading_path": (), "wording": 1}
    said: dict[str, Any] = {"question": "Port?", "answer": "5000.", "quote": "5000.", "quote_start": 0, "quote_end": 5}
    return Pair(
        id=name,
        chunk_id=chunk_id,
        fact_id="f",
        type="factual",
        model="m",
        similarity=0.9,
        cluster=name,
        flags=(),
        reviewed=False,
        **place,
        **said,
    )


def rejected(name: str, chunk_id: str, *rules: str) -> Rejected:
    return Rejected(
        id=name,
        chunk_id=chunk_id,
        section_id="s",
        question="Port?",
        answer="5000.",
        quote="",
        type="factual",
        similarity=0.9,
        rules=rules,
        waivable=True,
    )


def failure(name: str, parent: str, reason: str) -> Failure:
    return Failure(id=name, parent_id=parent, reason=reason, detail="")


ROWS: dict[str, list[Any]] = {
    "documents": [
        Document(id=name, source=source, path=f"{name}.md", sha256="0", revision="", title="T", text="Text.")
        for name, source in (("a", "guide"), ("b", "wiki"))
    ],
    # setup is two chunks; in the file, sorted by id, its second one comes first
    "chunks": [
        chunk("c2", "setup", 0),
        chunk("c1", "setup", 10),
        chunk("c3", "usage", 20),
        chunk("c4", "links", 30),
        chunk("c5", "later", 0, "b"),
        chunk("c6", "again", 10, "b"),
        chunk("c7", "mixed", 20, "b"),
    ],
    "candidates": [
        candidate("k1", "c1", "port"),
        candidate("k2", "c1", "port", "conceptual"),
        candidate("k3", "c1", "host"),
        candidate("k4", "c3", "use"),
        candidate("k5", "c3", "use"),
        candidate("k6", "c6", "retry", "procedural", "heading"),
    ],
    "failures": [
        failure("x1", "c2", "unusable-reply"),
        failure("x2", "c2", "call-failed"),
        failure("x3", "c4", "no-fact"),
        failure("x4", "c5", "not-chosen"),
        failure("x5", "c7", "no-fact"),
        failure("x6", "c7", "not-chosen"),
        failure("x7", "curated.json", "not-in-docs"),
    ],
    "pairs": [pair("k1", "c1"), pair("k2", "c1"), pair("k6", "c6")],
    "rejected": [
        rejected("k3", "c1", "too-far", "too-short"),
        rejected("k4", "c3", "too-far"),
        rejected("k5", "c3", "copy", "too-far"),
    ],
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """coverage's main on ROWS, some of them replaced; tmp_path has coverage.jsonl, metrics.json and map.png."""

    def mapped(**changes: list[Any]) -> list[Coverage]:
        for name in FILES:
            write_records(tmp_path / f"{name}.jsonl", (ROWS | changes)[name])
        written = [tmp_path / name for name in ("coverage.jsonl", "metrics.json", "map.png")]
        main(*(tmp_path / f"{name}.jsonl" for name in FILES), *written)
        return read_records(written[0], Coverage)

    return mapped


def section(name: str, pairs: int = 0, path: str = "a.md", start: int = 0, reason: str = "no-fact") -> Coverage:
    nothing: dict[str, Any] = {"pairs_by_type": {}, "pairs_by_recipe": {}, "rejected_by_rule": {}, "failures_by_reason": {}}
    place: dict[str, Any] = {"source": "guide", "path": path, "heading_path": (), "start": start, "retried": False}
    counts = {"chunks": 1, "facts": 0, "candidates": 0, "pairs": pairs, "rejected": 0}
    return Coverage(id=name, reason="" if pairs else reason, **place, **counts, **nothing)


def test_a_section_shows_what_came_of_all_its_chunks(run: Run) -> None:
    found = {record.id: record for record in run()}
    assert found["setup"] == Coverage(
        id="setup",
        source="guide",
        path="a.md",
        heading_path=("Guide", "setup"),
        start=0,
        chunks=2,
        facts=2,
        candidates=3,
        pairs=2,
        pairs_by_type={"conceptual": 1, "factual": 1},
        pairs_by_recipe={"quote-first": 2},
        rejected=1,
        rejected_by_rule={"too-far": 1, "too-short": 1},
        failures_by_reason={"call-failed": 1, "unusable-reply": 1},
        retried=False,
        reason="",
    )
    assert (found["usage"].candidates, found["usage"].rejected, found["usage"].facts) == (2, 2, 1)
    assert found["usage"].rejected_by_rule == {"copy": 1, "too-far": 2}
    assert [name for name, record in found.items() if record.retried] == ["again"]
    assert found["again"].pairs_by_recipe == {"heading": 1} and found["again"].source == "wiki"


def test_every_section_is_there_and_every_row_is_counted_once(run: Run, tmp_path: Path) -> None:
    found = run()
    metrics = json.loads((tmp_path / "metrics.json").read_bytes())
    assert {record.id for record in found} == {one.section_id for one in ROWS["chunks"]}
    for name in ("chunks", "candidates", "pairs", "rejected"):
        assert sum(getattr(record, name) for record in found) == len(ROWS[name]), name
    lost = sum(sum(record.failures_by_reason.values()) for record in found)
    assert lost == 6 and lost + sum(metrics["failures_elsewhere"].values()) == len(ROWS["failures"])
    for record in found:
        assert record.candidates == record.pairs + record.rejected
        assert record.pairs == sum(record.pairs_by_type.values()) == sum(record.pairs_by_recipe.values())
        assert bool(record.reason) == (record.pairs == 0)


def test_the_metrics_count_sections_by_reason_source_type_and_recipe(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    assert json.loads((tmp_path / "metrics.json").read_bytes()) == {
        "sections": 6,
        "covered": 2,
        "share": 0.3333,
        "uncovered": {"no-fact": 2, "not-chosen": 1, "too-far": 1},
        "retried": 1,
        "retried_covered": 1,
        "pairs_by_type": {"conceptual": 1, "factual": 1, "procedural": 1},
        "pairs_by_recipe": {"heading": 1, "quote-first": 2},
        "failures_elsewhere": {"not-in-docs": 1},
        "sources": {
            "guide": {"sections": 3, "covered": 1, "share": 0.3333},
            "wiki": {"sections": 3, "covered": 1, "share": 0.3333},
        },
    }
    said = capsys.readouterr().out
    assert said == "coverage: 2 of 6 sections have a pair (33.3%); without one: no-fact 2, too-far 1, not-chosen 1\n"


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({"too-far": 2, "copy": 3, "no-fact": 1}, "copy"),
        ({"too-far": 2, "copy": 2}, "copy"),
        ({"not-chosen": 5, "no-fact": 1}, "no-fact"),
        ({"not-chosen": 5}, "not-chosen"),
        ({}, "nothing-recorded"),
    ],
)
def test_the_main_reason_is_the_commonest_and_not_chosen_only_alone(counts: dict[str, int], reason: str) -> None:
    assert main_reason(counts) == reason


def test_a_section_of_which_nothing_is_known_is_listed_and_not_forgotten(run: Run) -> None:
    found = run(failures=[one for one in ROWS["failures"] if one.parent_id != "c4"])
    assert {record.id: record.reason for record in found}["links"] == "nothing-recorded"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": ROWS["rejected"][1:]}, r"candidates\.jsonl: k3 must be in .*pairs\.jsonl or in .*rejected\.jsonl"),
        ({"pairs": [*ROWS["pairs"], pair("k9", "c1")]}, r"candidates\.jsonl: k9 must be in .* Re-run: dvc repro validate"),
        ({"pairs": [*ROWS["pairs"], pair("k3", "c1")]}, r"candidates\.jsonl: k3 must be in .* and in one of them alone"),
        ({"chunks": ROWS["chunks"][:-2]}, r"candidates\.jsonl: k6 names a chunk that .*chunks\.jsonl does not hold"),
    ],
)
def test_files_of_different_runs_are_refused_and_nothing_is_written(
    run: Run, tmp_path: Path, changes: dict[str, list[Any]], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        run(**changes)
    assert not [name for name in ("coverage.jsonl", "metrics.json", "map.png") if (tmp_path / name).exists()]


def test_rows_go_from_the_worst_covered_document_to_the_best_and_cells_in_reading_order() -> None:
    records = [
        section("full", 3, "full.md"),
        section("later", 0, "half.md", 90),
        section("first", 1, "half.md", 5),
        section("bare", 0, "bare.md"),
        section("b2", 0, "zero.md", 9),
        section("b1", 0, "zero.md", 0),
    ]
    assert [(name, [record.id for record in sections]) for name, sections in by_document(records)] == [
        ("guide/zero.md", ["b1", "b2"]),
        ("guide/bare.md", ["bare"]),
        ("guide/half.md", ["first", "later"]),
        ("guide/full.md", ["full"]),
    ]


def test_a_cell_tells_not_asked_from_no_pair_and_few_pairs_from_many() -> None:
    assert [level(section("s", pairs)) for pairs in (0, 1, 2, 3, 5, 6, 99)] == [1, 2, 2, 3, 3, 4, 4]
    assert level(section("s", reason="not-chosen")) == 0
    assert len(LEVELS) == 2 + len(FROM)


def test_the_picture_is_the_same_for_the_same_sections_and_another_for_others(tmp_path: Path) -> None:
    def picture(*records: Coverage) -> bytes:
        draw(records, tmp_path / "map.png")
        return (tmp_path / "map.png").read_bytes()

    first = picture(section("s1", 2), section("s2", 0, start=5))
    assert first == picture(section("s2", 0, start=5), section("s1", 2)) and b"matplotlib" not in first
    assert first != picture(section("s1", 2), section("s2", 3, start=5))
    assert first != picture(section("s1", 2), section("s2", 0, start=5, reason="not-chosen"))


def test_a_path_is_shown_as_it_is_and_not_read_as_a_formula(tmp_path: Path) -> None:
    draw([section("s1", path="$\\no$ such {formula}.md")], tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000


def test_a_picture_of_many_documents_and_long_ones_stays_one_screen(tmp_path: Path) -> None:
    def height(records: list[Coverage]) -> int:
        draw(records, tmp_path / "map.png")
        width, rows = struct.unpack(">II", (tmp_path / "map.png").read_bytes()[16:24])
        assert width == 1296
        return int(rows)

    documents = [section(f"s{number}", path=f"page{number}.md") for number in range(2 * MAX_ROWS)]
    one_long = [section(f"s{number}", start=number) for number in range(CELLS * MAX_ROWS + 1)]
    assert height(documents) == height(one_long) < 1500
    assert height(one_long[: CELLS + 1]) - height(one_long[:CELLS]) == height(documents[:2]) - height(documents[:1]) > 20


def test_two_runs_give_the_same_bytes(run: Run, tmp_path: Path) -> None:
    names = ("coverage.jsonl", "metrics.json", "map.png")
    run()
    first = [(tmp_path / name).read_bytes() for name in names]
    run()
    assert [(tmp_path / name).read_bytes() for name in names] == first
