"""The rule that decides whether a model may become champion: `report` prints what it says, `promote` does it."""

from typing import Literal

import msgspec

from stages.params import NonNegative, Share
from stages.program.errors import BadInput
from stages.scoreboard import Interval, Scoreboard, figure, show


class Gates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The section `promote` of params.yaml, in units of cosine similarity."""

    min_recall_gain: NonNegative  # the interval of tuned - base on recall must lie above it
    max_gguf_loss: Share  # how far the shipped file's mean may lie below tuned's


class Verdict(msgspec.Struct, frozen=True):
    """What the numbers support, and the clause that says why."""

    outcome: Literal["promote", "do not promote", "not enough evidence"]
    reason: str


def judge(scores: Scoreboard, served: str, gates: Gates) -> Verdict:
    """Whether a release that ships the quant `served` (as q8_0) may become champion.

    Tuned must beat base on recall with the whole interval above `min_recall_gain`, and the shipped file's mean may lie at most
    `max_gguf_loss` below tuned's on the same questions. Raises BadInput when the scoreboard lacks one of these gains.
    """
    gain, loss = _gain_of(scores, "tuned-base"), _gain_of(scores, f"{served}-tuned")
    found = f"tuned - base on recall is {show(gain, scores.confidence)}"
    if gain.low is None or gain.high is None:
        return Verdict("not enough evidence", f"{found} from one section, which gives no interval")
    if gain.high <= gates.min_recall_gain:
        return Verdict("do not promote", f"{found}, which is not above {gates.min_recall_gain:.3f}")
    if gain.low <= gates.min_recall_gain:
        return Verdict("not enough evidence", f"{found}, which is not all above {gates.min_recall_gain:.3f}")
    shipped = f"{served} - tuned is {show(loss, scores.confidence)}"
    if loss.mean < -gates.max_gguf_loss:
        return Verdict("do not promote", f"{shipped}, below the allowed {figure(-gates.max_gguf_loss)}")
    return Verdict(
        "promote",
        f"{found}, all above {gates.min_recall_gain:.3f}, and {shipped}, not below {figure(-gates.max_gguf_loss)}",
    )


def _gain_of(scores: Scoreboard, pair: str) -> Interval:
    if pair not in scores.recall.gains:
        raise BadInput(
            f"the scoreboard has no {pair} on recall, only {', '.join(sorted(scores.recall.gains)) or 'nothing'}; "
            "export.serve must be one of export.quants. Then: dvc repro"
        )
    return scores.recall.gains[pair]
