"""The gates that decide whether a model may become champion: `report` prints what they say, `promote` does it."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from stages.params import NonNegative, Positive, Share
from stages.records import Score
from stages.scoreboard import Interval, Scoreboard

Outcome = Literal["promote", "reject", "not enough evidence"]


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


def judge(scores: Scoreboard, served: str, gates: Gates, figures: dict[str, dict[str, Any]]) -> Verdict:
    """Whether a release that ships the quant `served` (as q8_0) may become champion.

    `figures`: reports/metrics by stage. Gates, in order: data (validate and split found no critical fault), leaks, files (the
    models that answered are those of the export, tuned is not base, one chat for all), questions, recall, general, abstention, gguf.
    Raises BadInput for a scoreboard that lacks what a gate needs.
    """
    raise NotImplementedError


def champion_gate(
    mine: Sequence[Score], theirs: Sequence[Score], gates: Gates, *, confidence: float, resamples: int, seed: int
) -> Gate:
    """Whether this model may take the champion's place: the gate `champion`, in similarity on the recall questions both answered.

    `mine` and `theirs` are the scores of the two shipped files, paired by question id, in any order. Not measured where they
    share no recall question. The outcome is "failed", "passed", "not enough evidence" or "not measured", as of every gate.
    """
    raise NotImplementedError
