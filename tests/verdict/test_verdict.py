"""verdict: what each gate lets pass and what it refuses, on inputs that are known to be good or bad."""

from typing import Any

import msgspec
import numpy
import pytest

from stages.evaluate import score_set
from stages.program import BadInput, BadRecord
from stages.records import Score, evolve
from stages.scoreboard import Interval, Scoreboard
from stages.scoring import Sampling
from stages.verdict import Gates, Verdict, champion_gate, judge

GATES = Gates(
    min_recall_gain=0.0,
    max_gguf_loss=0.03,
    max_general_loss=0.2,
    max_abstention_loss=0.2,
    max_champion_loss=0.05,
    min_questions=30,
)
SAMPLING = Sampling(confidence=0.95, resamples=200, seed=1)
MODELS = {"base": "b" * 64, "tuned": "7" * 64, "q4_k_m": "4" * 64, "q8_0": "8" * 64}
QUANTS = {f"docsmith-{quant}.gguf": {"quant": quant, "sha256": MODELS[quant]} for quant in ("q4_k_m", "q8_0")}
FIGURES: dict[str, dict[str, Any]] = {
    "validate": {"pairs": 700},
    "split": {"pairs": 700},
    "export": {"files": QUANTS, "merged_sha256": MODELS["tuned"], "chat_sha256": "c" * 64},
}


def spread(mean: float, count: int = 40, by: float = 0.1) -> list[float]:
    """`count` values around `mean`, every second one `by` above it and the others as far below."""
    return [mean + (by if number % 2 else -by) for number in range(count)]


def scores_of(system: str, similarities: list[float], questions: str = "recall") -> list[Score]:
    """A score for each similarity, each question of a section of its own; out of scope, a similarity of 1 says that it abstained."""
    is_out = questions == "out_of_scope"
    return [
        Score(
            id=f"{system}{number}", question_id=f"{number}", set=questions, section_id=f"s{number}", type="factual", system=system,
            similarity=None if is_out else value, rouge_l=None, key_facts=None, evidence=None, judge=None,
            abstained=value if is_out else 0.0, passed=value if is_out else float(value > 0.8),
        )
        for number, value in enumerate(similarities)
    ]  # fmt: skip


def board(
    recall: dict[str, list[float]] | None = None,
    general: dict[str, list[float]] | None = None,
    silent: dict[str, list[float]] | None = None,
    **changes: Any,
) -> Scoreboard:
    """A scoreboard that is promoted unless told otherwise: tuned is 0.2 above base, and the quants are as good as tuned."""
    told = {
        "recall": {"base": spread(0.5), "tuned": spread(0.7, by=0.12), "q8_0": spread(0.7), "q4_k_m": spread(0.6)}
        | (recall or {}),
        "general": general or {"base": spread(0.6), "tuned": spread(0.6, by=0.12)},
        "out_of_scope": silent or {"base": [1.0] * 20, "tuned": [1.0] * 20},
    }
    sets = {
        name: score_set(
            [score for system, values in told[name].items() for score in scores_of(system, values, name)], set(), SAMPLING
        )
        for name in told
    }
    fields = {"sets": sets, "models": MODELS, "questions_sha256": "d" * 64, "chat_sha256": "c" * 64, "leaks": ()}
    return Scoreboard(confidence=0.95, seed=1, **(fields | changes))


def outcomes(verdict: Verdict) -> dict[str, str]:
    return {gate.name: gate.outcome for gate in verdict.gates}


def only(verdict: Verdict, name: str) -> str:
    """The reason of the gate `name`, the only one that is against it."""
    assert [gate.name for gate in verdict.gates if gate.outcome != "passed"] == [name]
    return verdict.reason


def without(name: str) -> Scoreboard:
    good = board()
    return msgspec.structs.replace(good, sets={key: value for key, value in good.sets.items() if key != name})


def test_a_better_model_of_sound_data_passes_every_gate() -> None:
    verdict = judge(board(), "q8_0", GATES, FIGURES)
    names = ["data", "leaks", "secrets", "files", "questions", "recall", "general", "abstention", "gguf"]
    assert outcomes(verdict) == dict.fromkeys(names, "passed") and verdict.outcome == "promote"
    recall = verdict.gates[5]
    assert recall.found is not None and recall.found.mean == 0.2 and recall.limit == 0.0
    assert verdict.reason == recall.reason
    assert verdict.reason.startswith("tuned - base on 40 recall questions is 0.200 (95 % 0.19")
    assert verdict.gates[8].limit == -0.03 and "q8_0 - tuned" in verdict.gates[8].reason


# known-bad inputs


def test_a_leaked_question_set_is_refused() -> None:
    verdict = judge(board(leaks=("q1", "q2")), "q8_0", GATES, FIGURES)
    assert only(verdict, "leaks") == "questions in the training data: 2, such as q1, q2" and verdict.outcome == "reject"


def test_a_model_that_says_a_secret_is_refused_without_repeating_it() -> None:
    verdict = judge(board(secrets=("a1", "a2")), "q8_0", GATES, FIGURES)
    assert only(verdict, "secrets") == (
        "answers of the tuned model that hold a secret: 2, such as a1, a2; set ingest.redact to [secret] and run dvc repro"
    )
    assert verdict.outcome == "reject"


@pytest.mark.parametrize("system", ["q8_0", "q4_k_m", "tuned"])
def test_a_swapped_model_file_is_refused(system: str) -> None:
    verdict = judge(board(models=MODELS | {system: "e" * 64}), "q8_0", GATES, FIGURES)
    assert f"the {system} that answered has SHA-256 eeeeeeeeeeee…" in only(verdict, "files") and verdict.outcome == "reject"
    missing = judge(board(models={name: MODELS[name] for name in MODELS if name != system}), "q8_0", GATES, FIGURES)
    assert "has SHA-256 none" in only(missing, "files") and missing.outcome == "reject"


def test_base_served_as_tuned_is_refused_by_its_hash_and_by_its_answers() -> None:
    export = FIGURES["export"] | {"merged_sha256": MODELS["base"]}
    same = judge(board(models=MODELS | {"tuned": MODELS["base"]}), "q8_0", GATES, FIGURES | {"export": export})
    assert "tuned is the base model itself" in only(same, "files") and same.outcome == "reject"
    copied = judge(board({name: spread(0.5) for name in ("base", "tuned", "q8_0")}), "q8_0", GATES, FIGURES)
    assert "0.000 (95 % 0.000 to 0.000), not above 0.000" in only(copied, "recall") and copied.outcome == "reject"


def test_a_gguf_file_of_noise_is_refused() -> None:
    verdict = judge(board({"q8_0": spread(0.1)}), "q8_0", GATES, FIGURES)
    assert "below the allowed -0.030" in only(verdict, "gguf") and verdict.outcome == "reject"
    assert judge(board({"q4_k_m": spread(0.1)}), "q8_0", GATES, FIGURES).outcome == "promote"  # it is not the one that is served


def test_a_changed_chat_template_is_refused() -> None:
    verdict = judge(board(chat_sha256="e" * 64), "q8_0", GATES, FIGURES)
    assert "asked in the chat eeeeeeeeeeee…" in only(verdict, "files") and verdict.outcome == "reject"


def test_an_empty_question_set_is_refused() -> None:
    with pytest.raises(BadInput, match="no recall questions, so there is nothing to judge by"):
        judge(without("recall"), "q8_0", GATES, FIGURES)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_numbers_are_refused(bad: float) -> None:
    good = board()
    recall = good.sets["recall"]
    compared = recall.comparisons["tuned-base"]
    for gain in (Interval(bad, 0.1, 0.3), Interval(0.2, bad, 0.3), Interval(0.2, 0.1, bad)):
        changed = recall.comparisons | {"tuned-base": msgspec.structs.replace(compared, gains={"similarity": gain})}
        sets = good.sets | {"recall": msgspec.structs.replace(recall, comparisons=changed)}
        with pytest.raises(BadInput, match="similarity of tuned-base on recall is not a number"):
            judge(msgspec.structs.replace(good, sets=sets), "q8_0", GATES, FIGURES)
    with pytest.raises(BadRecord, match="not a number"):
        champion_gate(scores_of("q8_0", [bad, 0.5]), scores_of("q8_0", [0.5, 0.5]), GATES, confidence=0.95, resamples=9, seed=1)


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({"validate": {}}, "the metrics of validate are missing"),
        ({"split": {}}, "the metrics of split are missing"),
        ({"split": {"pairs": 699}}, "validate passed 700 pairs and split parted 699"),
    ],
)
def test_data_that_nothing_says_is_sound_is_refused(figures: dict[str, Any], reason: str) -> None:
    verdict = judge(board(), "q8_0", GATES, FIGURES | figures)
    assert reason in only(verdict, "data") and verdict.outcome == "reject"


def test_an_export_that_does_not_name_its_files_is_refused() -> None:
    for export in ({}, {"files": QUANTS, "chat_sha256": "c" * 64}):
        assert "the metrics of export do not say" in only(judge(board(), "q8_0", GATES, FIGURES | {"export": export}), "files")
    few = FIGURES["export"] | {"files": {"docsmith-q8_0.gguf": QUANTS["docsmith-q8_0.gguf"]}}
    verdict = judge(board(), "q4_k_m", msgspec.structs.replace(GATES, max_gguf_loss=1.0), FIGURES | {"export": few})
    assert only(verdict, "files") == "q4_k_m is not among the exported files (q8_0)"


# each gate and its limit


def test_too_few_questions_or_sections_are_not_enough_evidence() -> None:
    verdict = judge(board(), "q8_0", msgspec.structs.replace(GATES, min_questions=41), FIGURES)
    assert only(verdict, "questions") == "recall has 40 questions of 40 sections, fewer than 41"
    assert verdict.outcome == "not enough evidence"
    few = {"base": spread(0.5, 11), "tuned": spread(0.7, 11), "q8_0": spread(0.7, 11), "q4_k_m": spread(0.7, 11)}
    thin = judge(board(few), "q8_0", msgspec.structs.replace(GATES, min_questions=1), FIGURES)
    assert outcomes(thin)["recall"] == outcomes(thin)["gguf"] == "not enough evidence"
    assert "from 11 sections, and an interval needs 12" in thin.reason


def test_the_gain_on_recall_must_lie_above_its_limit_whole() -> None:
    found = judge(board(), "q8_0", GATES, FIGURES).gates[5].found
    assert found is not None and found.low is not None and found.high is not None
    for limit, outcome in ((found.low - 1e-6, "passed"), (found.low, "not enough evidence"), (found.high, "failed")):
        verdict = judge(board(), "q8_0", msgspec.structs.replace(GATES, min_recall_gain=limit), FIGURES)
        assert outcomes(verdict)["recall"] == outcome


@pytest.mark.parametrize(
    ("setting", "gate", "changes"),
    [
        ("max_gguf_loss", "gguf", {"recall": {"q8_0": spread(0.6)}}),
        ("max_general_loss", "general", {"general": {"base": spread(0.6), "tuned": spread(0.5, by=0.05)}}),
        ("max_abstention_loss", "abstention", {"silent": {"base": [1.0] * 20, "tuned": [1.0, 0.0] * 10}}),
    ],
)
def test_a_loss_must_lie_within_its_limit_whole(setting: str, gate: str, changes: dict[str, Any]) -> None:
    scores = board(**changes)

    def outcome(limit: float) -> str:
        return outcomes(judge(scores, "q8_0", msgspec.structs.replace(GATES, **{setting: limit}), FIGURES))[gate]

    found = next(one for one in judge(scores, "q8_0", GATES, FIGURES).gates if one.name == gate).found
    assert found is not None and found.low is not None and found.high is not None and found.low < found.high < 0
    assert outcome(-found.high - 1e-6) == "failed"
    assert outcome(-found.mean) == "not enough evidence"
    assert outcome(-found.low + (0.1 if gate == "abstention" else 0)) == "passed"


def test_few_answers_that_did_not_change_are_no_proof_that_abstention_is_kept() -> None:
    for count, outcome in ((16, "not enough evidence"), (17, "passed")):  # 0.8 ^ 16 = 0.028 and 0.8 ^ 17 = 0.023
        verdict = judge(board(silent={"base": [1.0] * count, "tuned": [1.0] * count}), "q8_0", GATES, FIGURES)
        assert outcomes(verdict)["abstention"] == outcome
    one_lost = judge(board(silent={"base": [1.0] * 20, "tuned": [0.0] + [1.0] * 19}), "q8_0", GATES, FIGURES)
    assert "a loss of 0.200 would look like this in 7 % of cases" in only(one_lost, "abstention")


def test_a_set_that_nobody_was_asked_is_not_measured_and_does_not_stop_a_promotion() -> None:
    for name, gate in (("general", "general"), ("out_of_scope", "abstention")):
        verdict = judge(without(name), "q8_0", GATES, FIGURES)
        assert outcomes(verdict)[gate] == "not measured" and verdict.outcome == "promote"


def test_a_quant_that_was_not_asked_is_an_error_with_what_to_do() -> None:
    with pytest.raises(
        BadInput, match="no similarity of q6_k-tuned on recall, only of .*; what export ships must be among what answer asked"
    ):
        judge(board(), "q6_k", GATES, FIGURES)


def test_one_failed_gate_rejects_whatever_the_others_lack() -> None:
    verdict = judge(board(leaks=("q1",)), "q8_0", msgspec.structs.replace(GATES, min_questions=99), FIGURES)
    assert (verdict.outcome, verdict.reason) == ("reject", "questions in the training data: 1, such as q1")


# the champion


def champion(mine: list[float], theirs: list[float], limit: float = 0.05) -> Any:
    gates = msgspec.structs.replace(GATES, max_champion_loss=limit)
    one, other = scores_of("q8_0", mine), scores_of("q8_0", theirs)
    return champion_gate(one[::-1], other, gates, confidence=0.95, resamples=200, seed=1)


def test_a_model_may_take_the_champions_place_unless_it_may_be_worse() -> None:
    theirs = spread(0.7)
    worse = spread(0.68, by=0.05)
    assert (champion(theirs, theirs).outcome, champion(worse, theirs).outcome) == ("passed", "passed")
    assert champion(worse, theirs, 0.02).outcome == "not enough evidence"
    assert champion(spread(0.5, by=0.05), theirs).outcome == "failed"
    found = champion(spread(0.75), theirs)
    assert (found.name, found.limit, found.found.mean) == ("champion", -0.05, 0.05)
    assert found.reason.startswith("this model - champion on 40 recall questions is 0.050")


def test_a_champion_is_compared_on_recall_questions_that_both_answered() -> None:
    mine = scores_of("q8_0", spread(0.7))
    strangers = [evolve(score, question_id=f"other {score.question_id}") for score in mine]
    how = {"confidence": 0.95, "resamples": 200, "seed": 1}
    assert champion_gate(mine, strangers, GATES, **how).outcome == "not measured"
    assert champion_gate(scores_of("q8_0", spread(0.7), "general"), mine, GATES, **how).outcome == "not measured"
    assert champion_gate(mine, mine[:11], GATES, **how).outcome == "not enough evidence"
    blank = [evolve(score, similarity=None) for score in mine]
    with pytest.raises(BadInput, match="no similarity on recall"):
        champion_gate(mine, blank, GATES, **how)


def test_confidence_resamples_and_seed_each_change_what_the_champion_is_held_against() -> None:
    rng = numpy.random.default_rng(0)
    mine, theirs = (scores_of("q8_0", list(rng.normal(0.7, 0.1, 40))) for _ in range(2))
    how = {"confidence": 0.95, "resamples": 200, "seed": 1}
    found = {
        champion_gate(mine, theirs, GATES, **(how | turned)).found
        for turned in ({}, {"confidence": 0.8}, {"resamples": 50}, {"seed": 2})
    }
    assert len(found) == 4
