"""bench: what it writes, and that a peer is counted as it should be. The measurements themselves are not repeated here."""

import asyncio
import contextlib
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_endpoint import FakeEndpoint

from bench import serving
from bench.generation import HEADING, of_the_kit
from bench.rows import add_rows, row, with_section
from bench.training import UNSEEN, differences, one_side, settings
from bench.validation import by_projection, checked, corpus
from stages.llm import Endpoint
from stages.models import load_tokenizer
from stages.params import Tracking
from stages.records import Example, Message
from stages.registry import CHAMPION, connected, version_named
from stages.release import Release, write_release
from stages.training import batches

PAIRS = [
    {"question": "How long does green tea steep?", "answer": "3 minutes."},
    {"question": "How hot?", "answer": "80 degrees."},
]


def test_only_the_own_section_is_replaced_and_a_missing_one_is_added_at_the_end() -> None:
    others = "# Measurements\n\n## The demo\n\nTwelve minutes.\n"
    first = with_section(others, f"{HEADING}\n\nOld.\n")
    assert first == f"{others}\n{HEADING}\n\nOld.\n"
    longer = first + "\n## Serving\n\nFast.\n"
    assert with_section(longer, f"{HEADING}\n\nNew.\n") == f"{others}\n{HEADING}\n\nNew.\n\n## Serving\n\nFast.\n"


def test_rows_of_other_benches_stay_and_own_ones_are_replaced(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    add_rows(results, {"P1": {"ratio": 1}, "P4": {"ratio": 4}})
    add_rows(results, {"P1": {"ratio": 9}})
    assert json.loads(results.read_text()) == {"P1": {"ratio": 9}, "P4": {"ratio": 4}}


def test_a_row_has_the_median_and_both_ends_of_its_ratios() -> None:
    found = row([3.0, 9.0, 4.0], 0.25)
    assert (found["ratio"], found["spread"], found["limit_fraction"], found["pairs"]) == (4.0, [3.0, 9.0], 0.25, 3)


def test_every_pair_that_the_kit_parses_counts_and_a_run_without_one_counts_as_one(tmp_path: Path) -> None:
    def text(body: dict[str, Any]) -> str:
        return "no pair" if "kettle" in json.dumps(body) else json.dumps(PAIRS)

    with FakeEndpoint(text=text, models=[{"id": "fake"}]) as fake:
        endpoint = Endpoint(url=fake.url, model="fake")
        some = of_the_kit(tmp_path / "some", "Green tea steeps for three minutes at eighty degrees.", endpoint)
        none = of_the_kit(tmp_path / "none", "A kettle boils a litre in four minutes.", endpoint)
    assert len(fake.bodies) == 4  # a summary and a chunk, twice
    assert (some["pairs"], none["pairs"]) == (2, 0)
    assert round(some["per_min"] * some["seconds"] / 60, 6) == 2
    assert round(none["per_min"] * none["seconds"] / 60, 6) == 1


def test_a_run_of_the_kit_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.generation.KIT_S", 1)
    with FakeEndpoint(text=json.dumps(PAIRS), models=[{"id": "fake"}]) as fake:
        found = of_the_kit(tmp_path / "slow", "A kettle boils a litre.", Endpoint(url=fake.url, model="fake"))
    assert found["pairs"] == 0
    assert round(found["per_min"] * found["seconds"] / 60, 6) == 1


def test_every_near_duplicate_that_the_bench_plants_is_found_and_none_is_left_between_questions_and_training() -> None:
    found = checked(corpus(1600), by_projection)
    assert found["rows"] == 1608 and found["planted"] == found["found"] == found["flagged"] == 8
    assert found["left"] == 0 and 0 < found["comparisons"] < 1608**2 / 4


def conversations(tiny_folder: Path, number: int, said: str) -> list[batches.Tokens]:
    """`number` conversations about machines; each is as long as the others where `said` has no field."""
    examples = [
        Example(
            id=str(place),
            pair_ids=(str(place),),
            document_id="d",
            messages=(
                Message("user", f"What is machine {place}?"),
                Message("assistant", said.format("very " * (place % 5)) + f" It has the number {place}."),
            ),
        )
        for place in range(10, 10 + number)
    ]
    return batches.tokenise(examples, load_tokenizer(tiny_folder), "Be brief and exact.", 200)


def test_both_sides_of_p5_are_counted_alike_and_learn_the_same_while_docsmith_computes_less(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows = conversations(tiny_folder, 24 + UNSEEN, "A loom.")
    (length,) = {len(one.input_ids) for one in rows}
    columns = zip(*(one.input_ids for one in rows), strict=True)
    alike = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    train = msgspec.structs.replace(settings()[0], per_device_train_batch_size=8, gradient_accumulation_steps=1, warmup_steps=0)
    mine, theirs = (one_side(side, tiny_folder, train, rows, tmp_path / side) for side in ("docsmith", "trl"))
    assert mine["examples"] == theirs["examples"] == 24 and mine["steps"] == theirs["steps"] == 3
    assert (
        mine["tokens"] == theirs["tokens"] == theirs["computed_tokens"] == 8 * length
    )  # of the step between the first and the last
    assert 0 < mine["answer_tokens"] == theirs["answer_tokens"] < mine["tokens"]
    assert length <= mine["computed_tokens"] <= 8 * length - 7 * (alike - 1)
    assert mine["loss"] == pytest.approx(theirs["loss"], abs=0.02)
    assert mine["unseen_loss"] == pytest.approx(theirs["unseen_loss"], abs=0.02)
    assert mine["unseen_loss"] < mine["loss"] - 0.05
    for found in (mine, theirs):
        assert sum(found["where"].values()) == pytest.approx(1) and {"matrix products", "optimizer"} <= set(found["where"])
        assert 0 < found["limit_fraction"] < 1


def test_the_losses_and_gradients_of_p7_differ_by_less_than_the_target_and_a_wrong_batch_is_seen(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = conversations(tiny_folder, 20, "A {}old loom.")
    train = settings()[0]
    found = differences(tiny_folder, train, rows, tmp_path)
    assert found and max(max(one.values()) for one in found) < 1e-4

    def wrong(some: Any, right: Any = batches.pack) -> Any:
        batch = right(some)
        return batch | {"position_ids": batch["position_ids"] // 2}

    monkeypatch.setattr(batches, "pack", wrong)
    assert min(one["gradients"] for one in differences(tiny_folder, train, rows, tmp_path)) > 1e-4


PIECES, PIECE_S = 4, 0.1


@contextlib.contextmanager
def answering(parallel: int, most: int, faults: frozenset[str] = frozenset()) -> Iterator[serving.Side]:
    """A server that streams PIECES to `parallel` questions at once and sends the rest of more than `most` away."""
    slots, open_now, counting = threading.Semaphore(parallel), [0], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            with counting:
                open_now[0] += 1
                is_taken = open_now[0] <= most
            try:
                if not is_taken:
                    self.send_response(503)
                    if "no retry" not in faults:
                        self.send_header("Retry-After", "1")
                    self.end_headers()
                    return
                with slots:
                    self.send_response(200)
                    self.end_headers()
                    for _ in range(PIECES):
                        time.sleep(PIECE_S)
                        self.wfile.write(b'event: delta\ndata: {"text": "word "}\n\n')
                        self.wfile.flush()
                    if "no end" not in faults:
                        self.wfile.write(
                            b'event: done\ndata: {"id": "1", "model": "docsmith/3", "sources": [], "covered": true}\n\n'
                        )
            finally:
                with counting:
                    open_now[0] -= 1

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.request_queue_size = 128
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = serving.Server(None, f"http://127.0.0.1:{server.server_address[1]}", None, None, Path())
    try:
        yield serving.through_docsmith(here)
    finally:
        server.shutdown()
        server.server_close()


def one_answer(side: serving.Side) -> serving.Said:
    async def asking() -> serving.Said:
        async with serving.client() as http:
            return await serving.ask(http, side, "Why?")

    return asyncio.run(asking())


def test_an_answer_is_timed_piece_by_piece_and_counts_only_when_it_came_whole() -> None:
    with answering(parallel=1, most=1) as side:
        said = one_answer(side)
    assert (said.status, said.text, len(said.pieces), said.version) == (200, "word " * PIECES, PIECES, "docsmith/3")
    assert said.is_whole() and not said.is_refused()
    assert said.began + PIECE_S <= said.pieces[0] <= said.pieces[-1] - 0.5 * PIECE_S * (PIECES - 1)
    with answering(parallel=1, most=1, faults=frozenset({"no end"})) as side:
        said = one_answer(side)
    assert (said.status, len(said.pieces), said.is_whole()) == (200, PIECES, False)
    assert serving.rate(said.began, said.ended, [said]) == 0
    said = one_answer(side)  # the server is gone
    assert (said.status, said.is_whole(), said.is_refused()) == (0, False, False)


def test_under_overload_a_server_that_sends_questions_away_keeps_its_pace_and_a_reply_without_advice_is_counted_as_wrong() -> (
    None
):
    questions = itertools.repeat("Why?")
    with answering(parallel=2, most=8) as side:
        began, ended, said = asyncio.run(serving.at_once(side, questions, seconds=2))
        capacity = serving.rate(began, ended, said)
        assert 0.5 * 2 / PIECE_S < capacity <= 1.1 * 2 / PIECE_S
        began, ended, said = asyncio.run(serving.overload(side, questions, 4 * capacity / PIECES, 2))
    assert len(said) == int(8 * capacity / PIECES)
    assert {(one.is_whole(), one.is_refused()) for one in said} == {(True, False), (False, True)}
    assert 0.6 < serving.rate(began, ended, said) / capacity < 1.5
    with answering(parallel=1, most=0, faults=frozenset({"no retry"})) as side:
        said = [one_answer(side)]
    assert [(one.status, one.is_whole(), one.is_refused()) for one in said] == [(503, False, False)]


def test_a_number_of_questions_is_asked_each_once_whoever_is_free() -> None:
    with answering(parallel=8, most=8) as side:
        _, _, said = asyncio.run(serving.at_once(side, itertools.repeat("Why?"), number=11))
    assert len(said) == 11 and all(one.is_whole() for one in said)


def test_of_ten_questions_in_a_row_no_two_begin_alike_so_that_no_side_finds_more_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    lines = "".join(json.dumps({"question": text}) + "\n" for text in ("Why?", "When?"))
    (tmp_path / "data/questions.jsonl").write_text(lines, encoding="utf-8")
    found = [serving.fresh(question) for question in itertools.islice(serving.questions_of(tmp_path), 30)]
    assert all(len({question[0] for question in found[first : first + 10]}) == 10 for first in range(21))
    assert [re.sub(r"^\d{5}: ", "", question) for question in found[:3]] == ["Why?", "When?", "Why?"]
    assert len(set(found)) == 30


def test_the_shipped_file_is_held_against_p9() -> None:
    files = {
        "docsmith-q8_0.gguf": {"quant": "q8_0", "mean_kl": 0.0006, "same_top": 0.991},
        "docsmith-q4_k_m.gguf": {"quant": "q4_k_m", "mean_kl": 0.0214, "same_top": 0.934},
    }
    found, said = serving.quality({"files": files, "serve": "q4_k_m", "positions": 912, "measured_on": "held_out"})
    assert (found["ratio"], found["same_top"], found["positions"]) == (0.0214, 0.934, 912)
    assert "q4_k_m 0.0214 and 93.4%; q8_0 0.0006 and 99.1%. q4_k_m ships" in said


def test_a_soak_has_two_versions_and_moves_the_champion_to_the_second_and_back(fresh_store: Path, tmp_path: Path) -> None:
    project, folder = tmp_path / "project", tmp_path / "soak"
    gguf = project / "models/gguf"
    gguf.mkdir(parents=True)
    (folder / "models").mkdir(parents=True)
    (folder / "models/mlflow.db").write_bytes(fresh_store.read_bytes())
    (project / "params.yaml").write_text((serving.REPOSITORY / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    for quant in ("q8_0", "q4_k_m"):
        (gguf / f"docsmith-{quant}.gguf").write_text(f"weights in {quant}", encoding="utf-8")
    release = Release(
        base="b",
        base_sha256="0",
        adapter_sha256="1",
        chat_sha256="2",
        system_prompt="Be brief.",
        control_tokens=(),
        quants=("q8_0", "q4_k_m"),
        serve="q8_0",
        context_tokens=512,
        max_new_tokens=16,
    )
    write_release(gguf, release)
    swap = serving.with_two_versions(project, folder)
    tracking = Tracking(uri=f"sqlite:///{folder}/models/mlflow.db", experiment="docsmith", model_name="docsmith")
    quants = []
    with connected(tracking) as client:
        for is_promotion in (None, True, False, True, False):
            if is_promotion is not None:
                swap(is_promotion)
            champion = version_named(client, "docsmith", CHAMPION)
            assert (folder / champion.tags["gguf_path"] / f"docsmith-{champion.tags['quant']}.gguf").is_file()
            quants.append(champion.tags["quant"])
    assert quants == ["q8_0", "q4_k_m", "q8_0", "q4_k_m", "q8_0"]
