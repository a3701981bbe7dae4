"""Ratings of answers by a model, each against its source chunk, from a judge that passed an audit; one that failed is not used.

The audit asks for the probes of probes.yaml: a judge that refuses right answers or lets wrong ones pass has failed. A judge gives
ratings and a reason by id, and never a text. Costs one call per exhibit and 32 for the audit; replies are kept in the store, where the
next stage that needs the same judge finds its audit.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec

from stages.executor import LOCAL, Executor
from stages.llm import Ask, Endpoint, Engine, Reply, Request, Source, Store, Tally, asking, request_key
from stages.params import Positive
from stages.records import Chunk, Dimension, Judgement, Rating

__all__ = [
    "DIMENSIONS",
    "PROBES",
    "Exhibit",
    "Judged",
    "Judging",
    "exhibit_of",
    "judged",
    "judgement_of",
    "probes_of",
    "read_probes",
]

PROMPTS = Path(__file__).with_name("prompts.yaml")
PROBES = Path(__file__).with_name("probes.yaml")
CONTEXT_TOKENS = 2048
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)


class Judging(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The section `judge` of params.yaml: who judges, which candidates, and what the audit asks."""

    enabled: bool
    endpoints: tuple[Endpoint, ...]
    engine: Engine
    wordings: Positive
    min_score: Rating
    audit_pass_share: Annotated[float, msgspec.Meta(gt=0.5, le=1.0)]  # a judge that says one thing to all gets half of them right
    max_tokens: Positive
    concurrency: Positive
    timeout_s: Positive


class Exhibit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a judge is shown: a question, an answer and the passage that should hold it."""

    topic: str
    text: str
    question: str
    answer: str


class Ratings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    # no docstring: it would be part of the schema and so of each request's key. The reason comes first, so that the ratings follow from it
    reason: Annotated[str, msgspec.Meta(max_length=500)]
    faithfulness: Rating
    answerability: Rating
    usefulness: Rating


class Audit(msgspec.Struct, frozen=True):
    """How a judge did on the probes. A reply without ratings counts neither as passed nor as caught."""

    probes: int  # of each kind
    passed: int  # right answers with no rating below judge.min_score
    caught: int  # swapped answers found unfaithful
    unscored: int  # replies without ratings, of both kinds


class Judged(msgspec.Struct, frozen=True):
    """A judgement for each exhibit, in their order; none where the judge was not used, and `why` says why."""

    used: bool
    why: str
    judgements: Sequence[Judgement] = ()
    audit: Audit | None = None
    tally: Tally | None = None  # of the judgements' calls

    def counts(self) -> dict[str, int]:
        """How many were asked for, and how they ended: asked = scored + unparsed + failed."""
        by_status = Counter(one.status for one in self.judgements)
        return {"asked": len(self.judgements)} | {status: by_status[status] for status in ("scored", "unparsed", "failed")}

    def said(self, noun: str) -> str:
        """For the terminal: what became of each `noun`, such as `candidate`."""
        if not self.used or self.tally is None:
            return f"not used, as {self.why}; no {noun} was judged"
        asked, scored, unparsed, failed = self.counts().values()
        fresh = f"{self.tally.reused} reused, {self.tally.answered + self.tally.failed} asked in {self.tally.seconds:.0f} s"
        return f"{self.why}; {asked} {noun}s ({fresh}) = {scored} scored + {unparsed} unparsed + {failed} failed"


def exhibit_of(question: str, answer: str, chunk: Chunk) -> Exhibit:
    """`answer` to `question` beside the whole chunk that it is held against."""
    return Exhibit(topic=chunk.topic(), text=chunk.markdown().strip(), question=question, answer=answer)


def judged(exhibits: Mapping[str, Exhibit], judge: Judging, teacher: str, store: Path, executor: Executor = LOCAL) -> Judged:
    """What the judge says of `exhibits` (by id), if it is enabled and passes its audit.

    The judge is the model `teacher`, which is started when a reply is not yet in `store`, unless judge.endpoints names servers.
    Raises ServerFailed and BadModelFile.
    """
    if not judge.enabled:
        return Judged(used=False, why="judge.enabled is false")
    right, swapped = probes_of(read_probes(PROBES))
    source = Source(judge.endpoints, teacher, judge.engine, CONTEXT_TOKENS, judge.concurrency, judge.timeout_s)
    model = source.model()
    with contextlib.closing(Store(store, "judge")) as kept, contextlib.ExitStack() as servers:
        ask = asking(source, executor, kept, servers)
        probed, _ = _judgements(right | swapped, judge, model, ask)
        audit = audit_of(probed[: len(right)], probed[len(right) :])
        is_used = min(audit.passed, audit.caught) >= judge.audit_pass_share * audit.probes
        found, tally = _judgements(exhibits if is_used else {}, judge, model, ask)
    figures = f"{audit.passed} of {audit.probes} right answers passed, {audit.caught} of {audit.probes} swapped ones were caught"
    if audit.unscored:
        reason = next(one.reason for one in probed if one.status != "scored")
        figures += f", {audit.unscored} of {2 * audit.probes} replies had no ratings ({reason})"
    if not is_used:
        limit = f"judge.audit_pass_share asks for {judge.audit_pass_share:.0%} of each"
        return Judged(used=False, why=f"the audit failed: {figures}; {limit}", audit=audit)
    return Judged(used=True, why=f"the audit passed: {figures}", judgements=found, audit=audit, tally=tally)


def read_probes(path: Path) -> list[tuple[Exhibit, Exhibit]]:
    """The twins of probes.yaml."""
    import yaml

    return msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), list[tuple[Exhibit, Exhibit]])


def probes_of(twins: Sequence[tuple[Exhibit, Exhibit]]) -> tuple[dict[str, Exhibit], dict[str, Exhibit]]:
    """The probes by name: each twin with its own answer, and each with the other's."""
    right: dict[str, Exhibit] = {}
    swapped: dict[str, Exhibit] = {}
    for one, other in twins:
        for probe, wrong in ((one, other.answer), (other, one.answer)):
            right[f"right {probe.topic}"] = probe
            swapped[f"swapped {probe.topic}"] = msgspec.structs.replace(probe, answer=wrong)
    return right, swapped


def audit_of(right: Sequence[Judgement], swapped: Sequence[Judgement]) -> Audit:
    """The audit by the judgements of right and of swapped answers."""
    return Audit(
        probes=len(right),
        passed=sum(1 for one in right if one.status == "scored" and not one.too_low),
        caught=sum(1 for one in swapped if "faithfulness" in one.too_low),
        unscored=sum(1 for one in (*right, *swapped) if one.status != "scored"),
    )


def request_for(exhibit: Exhibit, judge: Judging, prompts: Mapping[str, str], model: str) -> Request:
    """What the judge is asked about `exhibit`."""
    schema = msgspec.json.schema_components([Ratings])[1]["Ratings"]
    return Request(
        model_sha256=model,
        messages=(("system", prompts["system"]), ("user", prompts["user"].format(**msgspec.structs.asdict(exhibit)))),
        temperature=0.0,
        max_tokens=judge.max_tokens,
        seed=0,
        schema=msgspec.Raw(msgspec.json.encode(schema)),  # in the fields' order: a server has the reply written in it
    )


def judgement_of(id: str, reply: Reply, min_score: int) -> Judgement:
    """The ratings in `reply`, or the reason why there are none: every id gets a judgement, and no failure a number."""
    if reply.failed:
        return _unrated(id, "failed", reply.failed)
    try:
        found = msgspec.json.decode(reply.text, type=Ratings)
    except (msgspec.DecodeError, UnicodeError) as error:
        return _unrated(id, "unparsed", f"not the JSON asked for: {error}" if reply.is_whole else "cut at judge.max_tokens")
    too_low = tuple(name for name in DIMENSIONS if getattr(found, name) < min_score)
    return Judgement(id=id, status="scored", too_low=too_low, **msgspec.structs.asdict(found))


def _unrated(id: str, status: Literal["unparsed", "failed"], reason: str) -> Judgement:
    return Judgement(id=id, status=status, too_low=(), reason=reason, **dict.fromkeys(DIMENSIONS))


def _judgements(exhibits: Mapping[str, Exhibit], judge: Judging, model: str, ask: Ask) -> tuple[list[Judgement], Tally]:
    """A judgement for each exhibit, in their order, with the exhibit's name as id."""
    import yaml

    prompts = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
    requests = {name: request_for(exhibit, judge, prompts, model) for name, exhibit in exhibits.items()}
    keys = {name: request_key(request) for name, request in requests.items()}
    replies, tally = ask(
        {keys[name]: request for name, request in requests.items()},
        label="judge",
        groups={keys[name]: exhibit.text for name, exhibit in exhibits.items()},
    )
    return [judgement_of(name, replies[key], judge.min_score) for name, key in keys.items()], tally
