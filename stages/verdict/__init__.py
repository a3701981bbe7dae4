"""The gates that decide whether a model may become champion: `report` prints what they say, `promote` does it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from stages.params import NonNegative, Positive, Share
from stages.program.errors import BadInput
from stages.records import Score
from stages.scoreboard import Interval, Scoreboard, figure, show
from stages.scoring import Sampling, compare

Outcome = Literal["promote", "reject", "not enough evidence"]
MIN_SECTIONS = (
    12  # of equal systems, 4 % look better from 12 sections and 8 % from 5: from few, a percentile interval is too narrow
)


class Gates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The section `promote` of params.yaml; differences are in cosine similarity where nothing else is said."""

    min_recall_gain: NonNegative  # the interval of tuned - base on recall must lie above it
    max_gguf_loss: Share  # how far the interval of shipped file - tuned on recall may reach below 0
    max_general_loss: Share  # how far the interval of tuned - base on general may reach below 0
    max_abstention_loss: Share  # the same for the share of out-of-scope questions that are answered by saying so
    max_champion_loss: Share  # the same for this model - champion, shipped files, on recall
    min_questions: Positive  # of the set recall


class Gate(msgspec.Struct, frozen=True):
    """What one gate found."""

    name: str
    outcome: Literal[
        "passed", "failed", "not enough evidence", "not measured"
    ]  # not measured: there is nothing to hold it against
    reason: str  # with the figure, its interval and the limit
    found: Interval | None = None
    limit: float | None = None


class Verdict(msgspec.Struct, frozen=True):
    """What the gates support together. One that failed rejects; else one without enough evidence leaves it open."""

    outcome: Outcome
    gates: tuple[Gate, ...]

    @property
    def reason(self) -> str:
        """Of the first gate that is against it, or of the recall gate, which passed."""
        against = [gate for gate in self.gates if gate.outcome in ("failed", "not enough evidence")]
        order = sorted(against, key=lambda gate: gate.outcome != "failed") or [
            gate for gate in self.gates if gate.name == "recall"
        ]
        return order[0].reason


def judge(scores: Scoreboard, served: str, gates: Gates, figures: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """Whether a release that ships the quant `served` (as q8_0) may become champion.

    `figures`: reports/metrics by stage. Gates, in order: data (validate and split found no critical fault), leaks, secrets, files (the
    models that answered are those of the export, tuned is not base, one chat for all), questions, recall, general, abstention, gguf.
    All of them must hold, so several gates make no wrong promotion likelier than the gate that is easiest to pass by chance.
    Raises BadInput for a scoreboard that lacks what a gate needs.
    """
    found = (
        _data_gate(figures),
        _leaks_gate(scores),
        _secrets_gate(scores),
        _files_gate(scores, served, figures.get("export", {})),
        _questions_gate(scores, gates),
        _recall_gate(scores, gates),
        _loss_gate(scores, "general", "general", "tuned-base", "similarity", gates.max_general_loss),
        _abstention_gate(scores, gates.max_abstention_loss),
        _loss_gate(scores, "gguf", "recall", f"{served}-tuned", "similarity", gates.max_gguf_loss),
    )
    return Verdict(outcome_of(found), found)


def outcome_of(gates: Sequence[Gate]) -> Outcome:
    """What `gates` support together."""
    outcomes = {gate.outcome for gate in gates}
    if "failed" in outcomes:
        return "reject"
    return "not enough evidence" if "not enough evidence" in outcomes else "promote"


def champion_gate(
    mine: Sequence[Score], theirs: Sequence[Score], gates: Gates, *, confidence: float, resamples: int, seed: int
) -> Gate:
    """Whether this model may take the champion's place: the gate `champion`, in similarity on the recall questions both answered.

    `mine` and `theirs` are the scores of the two shipped files, paired by question id, in any order. Not measured where they
    share no recall question. The outcome is "failed", "passed", "not enough evidence" or "not measured", as of every gate.
    """
    own, champions = ([score for score in scores if score.set == "recall"] for scores in (mine, theirs))
    found = compare(own, champions, Sampling(confidence, resamples, seed))
    if not found:
        return Gate("champion", "not measured", "the champion answered none of these recall questions")
    if "similarity" not in found.gains:
        raise BadInput(
            "the scores of this model or of the champion have no similarity on recall. Run: dvc repro --force evaluate"
        )
    said = f"this model - champion on {found.n} recall questions"
    return _not_below("champion", said, found.gains["similarity"], found.sections, gates.max_champion_loss, confidence)


def _data_gate(figures: Mapping[str, Mapping[str, Any]]) -> Gate:
    """A critical fault stops its stage before it writes metrics, so metrics that are there and agree are a proof that none was found."""
    for stage in ("validate", "split"):
        if not isinstance(figures.get(stage, {}).get("pairs"), int):
            return Gate(
                "data", "failed", f"the metrics of {stage} are missing, so nothing says that the data is sound; run dvc repro"
            )
    checked, parted = figures["validate"]["pairs"], figures["split"]["pairs"]
    if checked != parted:
        return Gate("data", "failed", f"validate passed {checked} pairs and split parted {parted}, so these are not one run's")
    return Gate("data", "passed", f"validate and split found no critical fault in {checked} pairs")


def _leaks_gate(scores: Scoreboard) -> Gate:
    if scores.leaks:
        return Gate(
            "leaks", "failed", f"questions in the training data: {len(scores.leaks)}, such as {', '.join(scores.leaks[:3])}"
        )
    return Gate("leaks", "passed", "no question stands in the training data")


def _secrets_gate(scores: Scoreboard) -> Gate:
    if scores.secrets:
        said = f"answers of the tuned model that hold a secret: {len(scores.secrets)}, such as {', '.join(scores.secrets[:3])}"
        return Gate("secrets", "failed", f"{said}; set ingest.redact to [secret] and run dvc repro")
    return Gate("secrets", "passed", "no answer of the tuned model holds a secret")


def _files_gate(scores: Scoreboard, served: str, export: Mapping[str, Any]) -> Gate:
    """The models that answered are the exported ones, byte by byte."""
    missing = [key for key in ("files", "merged_sha256", "chat_sha256") if key not in export]
    if missing:
        return Gate("files", "failed", f"the metrics of export do not say {missing[0]}; run dvc repro --force export")
    exported = {file["quant"]: file.get("sha256") for file in export["files"].values()} | {"tuned": export["merged_sha256"]}
    if served not in exported:
        return Gate(
            "files", "failed", f"{served} is not among the exported files ({', '.join(sorted(exported.keys() - {'tuned'}))})"
        )
    for system, expected in exported.items():
        found = scores.models.get(system)
        if found is None or found != expected:
            said = f"the {system} that answered has SHA-256 {_short(found)} and the exported one {_short(expected)}"
            return Gate("files", "failed", f"{said}; run dvc repro")
    if scores.models.get("base") in exported.values():
        same = next(system for system, digest in exported.items() if digest == scores.models["base"])
        return Gate("files", "failed", f"{same} is the base model itself (SHA-256 {_short(scores.models['base'])})")
    if scores.chat_sha256 != export["chat_sha256"]:
        asked, shipped = _short(scores.chat_sha256), _short(export["chat_sha256"])
        return Gate(
            "files", "failed", f"questions were asked in the chat {asked} and files are shipped with {shipped}; run dvc repro"
        )
    return Gate(
        "files", "passed", f"{', '.join(sorted(exported))} are the files that were exported, and all were asked in one chat"
    )


def _questions_gate(scores: Scoreboard, gates: Gates) -> Gate:
    if "recall" not in scores.sets:
        raise BadInput("the scoreboard has no recall questions, so there is nothing to judge by. Run: dvc repro")
    recall = scores.sets["recall"]
    said = f"recall has {recall.questions} questions of {recall.sections} sections"
    if recall.questions < gates.min_questions:
        return Gate("questions", "not enough evidence", f"{said}, fewer than {gates.min_questions}", limit=gates.min_questions)
    return Gate("questions", "passed", said, limit=gates.min_questions)


def _recall_gate(scores: Scoreboard, gates: Gates) -> Gate:
    gain, n, sections = _gain_of(scores, "recall", "tuned-base", "similarity")
    limit = gates.min_recall_gain
    said = f"tuned - base on {n} recall questions is {show(gain, scores.confidence)}"
    if thin := _too_thin(gain, sections):
        return Gate("recall", "not enough evidence", f"{said} {thin}", gain, limit)
    if gain.high is not None and gain.high <= limit:
        return Gate("recall", "failed", f"{said}, not above {figure(limit)}", gain, limit)
    if gain.low is not None and gain.low <= limit:
        return Gate("recall", "not enough evidence", f"{said}, not all above {figure(limit)}", gain, limit)
    return Gate("recall", "passed", f"{said}, all above {figure(limit)}", gain, limit)


def _loss_gate(scores: Scoreboard, name: str, questions: str, pair: str, measure: str, allowed: float) -> Gate:
    """Whether `pair` loses no more than `allowed` in `measure` on a question set."""
    if questions not in scores.sets:
        return Gate(name, "not measured", f"there are no {questions} questions", limit=-allowed)
    gain, n, sections = _gain_of(scores, questions, pair, measure)
    said = f"{pair.replace('-', ' - ')} in {measure} on {n} {questions} questions"
    return _not_below(name, said, gain, sections, allowed, scores.confidence)


def _abstention_gate(scores: Scoreboard, allowed: float) -> Gate:
    """As `_loss_gate`, and by exact chances as well: where few answers changed, draws of them repeat each other and the interval is too narrow.

    With the interval alone, a model that loses just what is allowed passes in up to 12 % of simulated cases, with both in up to 5 %.
    """
    from scipy.stats import binom

    gate = _loss_gate(scores, "abstention", "out_of_scope", "tuned-base", "abstained", allowed)
    if gate.outcome != "passed":
        return gate
    found = scores.sets["out_of_scope"].comparisons["tuned-base"]
    chance = float(binom.cdf(max(found.lost - found.won, 0), found.n, allowed))
    if chance > (1 - scores.confidence) / 2:
        reason = f"{gate.reason}, but with so few questions a loss of {figure(allowed)} would look like this in {100 * chance:.0f} % of cases"
        return msgspec.structs.replace(gate, outcome="not enough evidence", reason=reason)
    return gate


def _not_below(name: str, what: str, gain: Interval, sections: int, allowed: float, confidence: float) -> Gate:
    """Passed where the whole interval lies above -`allowed`: a mean there would let one model in two pass that loses just that much."""
    said = f"{what} is {show(gain, confidence)}"
    if thin := _too_thin(gain, sections):
        return Gate(name, "not enough evidence", f"{said} {thin}", gain, -allowed)
    if gain.high is not None and gain.high < -allowed:
        return Gate(name, "failed", f"{said}, below the allowed {figure(-allowed)}", gain, -allowed)
    if gain.low is not None and gain.low < -allowed:
        return Gate(name, "not enough evidence", f"{said}, not all above the allowed {figure(-allowed)}", gain, -allowed)
    return Gate(name, "passed", f"{said}, not below {figure(-allowed)}", gain, -allowed)


def _too_thin(gain: Interval, sections: int) -> str:
    """Why an interval from so few sections decides nothing; "" where it does."""
    if gain.low is None or gain.high is None:
        return "from one section, which gives no interval"
    return f"from {sections} sections, and an interval needs {MIN_SECTIONS}" if sections < MIN_SECTIONS else ""


def _gain_of(scores: Scoreboard, questions: str, pair: str, measure: str) -> tuple[Interval, int, int]:
    """The gain with the numbers of its questions and sections. Raises BadInput where it is absent or not a number."""
    found = scores.sets[questions].comparisons
    if pair not in found or measure not in found[pair].gains:
        raise BadInput(
            f"the scoreboard has no {measure} of {pair} on {questions}, only of {', '.join(sorted(found)) or 'nothing'}; "
            "what export ships must be among what answer asked. Run: dvc repro"
        )
    gain = found[pair].gains[measure]
    if not all(value is None or math.isfinite(value) for value in (gain.mean, gain.low, gain.high)):
        raise BadInput(f"the scoreboard's {measure} of {pair} on {questions} is not a number. Run: dvc repro --force evaluate")
    return gain, found[pair].n, found[pair].sections


def _short(digest: object) -> str:
    return f"{digest[:12]}…" if isinstance(digest, str) else "none"
