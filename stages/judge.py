"""data/candidates.jsonl + data/chunks.jsonl -> data/judgements.jsonl: a model's ratings of candidates, each against its source chunk.

Off in the CPU profile. The judge is audited first, on the probes of judge_probes.yaml: one that refuses right answers or lets wrong ones
pass is not used, and the stage says so and goes on. A judge gives ratings and reasons by id; `validate` turns low ones into rejected rows.
Costs one call per candidate and 32 for the audit; replies are kept in data/store, so a rerun asks only what changed.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec

from stages.files import write_json
from stages.llm import Endpoint, Engine, Reply, Request, Store, Tally, ask_all, endpoints_for, request_key, served_model
from stages.params import Models, Positive
from stages.program import BadInput, run, say
from stages.records import Candidate, Chunk, Dimension, Judgement, Rating, by_id, read_records, write_records

PROMPTS = Path(__file__).with_name("judge_prompts.yaml")
PROBES = Path(__file__).with_name("judge_probes.yaml")
CONTEXT_TOKENS = 2048
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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
    """What a judge is shown: a question, its answer and the passage they were written from."""

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


def exhibit_of(candidate: Candidate, chunk: Chunk) -> Exhibit:
    return Exhibit(topic=chunk.topic(), text=chunk.markdown().strip(), question=candidate.question, answer=candidate.answer)


def request_for(exhibit: Exhibit, judge: Params, prompts: Mapping[str, str], model: str) -> Request:
    schema = msgspec.json.schema_components([Ratings])[1]["Ratings"]
    return Request(
        model_sha256=model,
        messages=(("system", prompts["system"]), ("user", prompts["user"].format(**msgspec.structs.asdict(exhibit)))),
        temperature=0.0,
        max_tokens=judge.max_tokens,
        seed=0,
        schema=msgspec.Raw(msgspec.json.encode(schema)),  # in the fields' order: a server has the reply written in it
    )


def judgement_of(candidate_id: str, reply: Reply, min_score: int) -> Judgement:
    """The ratings in `reply`, or the reason why there are none: every id gets a judgement, and no failure a number."""
    if reply.failed:
        return unrated(candidate_id, "failed", reply.failed)
    try:
        found = msgspec.json.decode(reply.text, type=Ratings)
    except (msgspec.DecodeError, UnicodeError) as error:
        return unrated(
            candidate_id, "unparsed", f"not the JSON asked for: {error}" if reply.is_whole else "cut at judge.max_tokens"
        )
    too_low = tuple(name for name in DIMENSIONS if getattr(found, name) < min_score)
    return Judgement(id=candidate_id, status="scored", too_low=too_low, **msgspec.structs.asdict(found))


def unrated(candidate_id: str, status: Literal["unparsed", "failed"], reason: str) -> Judgement:
    return Judgement(id=candidate_id, status=status, too_low=(), reason=reason, **dict.fromkeys(DIMENSIONS))


def read_probes(path: Path) -> list[tuple[Exhibit, Exhibit]]:
    """The twins of judge_probes.yaml."""
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


class Audit(msgspec.Struct, frozen=True):
    """How a judge did on the probes. A reply without ratings counts neither as passed nor as caught."""

    probes: int  # of each kind
    passed: int  # right answers with no rating below judge.min_score
    caught: int  # swapped answers found unfaithful
    unscored: int  # replies without ratings, of both kinds


def audit_of(right: Sequence[Judgement], swapped: Sequence[Judgement]) -> Audit:
    return Audit(
        probes=len(right),
        passed=sum(1 for one in right if one.status == "scored" and not one.too_low),
        caught=sum(1 for one in swapped if "faithfulness" in one.too_low),
        unscored=sum(1 for one in (*right, *swapped) if one.status != "scored"),
    )


def judged(
    exhibits: Mapping[str, Exhibit], judge: Params, model: str, ask: Callable[..., tuple[dict[str, Reply], Tally]]
) -> tuple[list[Judgement], Tally]:
    """A judgement for each exhibit, in their order, with the exhibit's name as id. `ask` is ask_all with its store and endpoints."""
    import yaml

    prompts = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
    requests = {name: request_for(exhibit, judge, prompts, model) for name, exhibit in exhibits.items()}
    keys = {name: request_key(request) for name, request in requests.items()}
    replies, tally = ask(
        {keys[name]: request for name, request in requests.items()},
        concurrency=judge.concurrency,
        timeout_s=judge.timeout_s,
        label="judge",
        groups={keys[name]: exhibit.text for name, exhibit in exhibits.items()},
    )
    return [judgement_of(name, replies[key], judge.min_score) for name, key in keys.items()], tally


def main(candidates: Path, chunks: Path, store: Path, judgements: Path, metrics: Path, *, judge: Params, models: Models) -> None:
    if not judge.enabled:
        write_records(judgements, [])
        write_json(metrics, {"used": False, "why": "judge.enabled is false"})
        say("judge: not used, as judge.enabled is false; no candidate was judged")
        return
    chunk_by_id = by_id(read_records(chunks, Chunk))
    claims = [claim for claim in read_records(candidates, Candidate) if claim.wording <= judge.wordings]
    if lost := [claim for claim in claims if claim.chunk_id not in chunk_by_id]:
        raise BadInput(
            f"{candidates}: {lost[0].id} names chunk {lost[0].chunk_id}, which {chunks} does not hold. Re-run: dvc repro generate"
        )
    right, swapped = probes_of(read_probes(PROBES))
    model = served_model(judge.endpoints, models.teacher)
    with contextlib.closing(Store(store, "judge")) as kept, contextlib.ExitStack() as stack:
        connect = functools.cache(
            lambda: endpoints_for(stack, judge.endpoints, models.teacher, judge.engine, CONTEXT_TOKENS, judge.concurrency)
        )
        ask = functools.partial(ask_all, store=kept, endpoints=connect)
        probed, _ = judged(right | swapped, judge, model, ask)
        audit = audit_of(probed[: len(right)], probed[len(right) :])
        is_used = min(audit.passed, audit.caught) >= judge.audit_pass_share * audit.probes
        exhibits = {claim.id: exhibit_of(claim, chunk_by_id[claim.chunk_id]) for claim in claims} if is_used else {}
        found, tally = judged(exhibits, judge, model, ask)
    figures = f"{audit.passed} of {audit.probes} right answers passed, {audit.caught} of {audit.probes} swapped ones were caught"
    if audit.unscored:
        reason = next(one.reason for one in probed if one.status != "scored")
        figures += f", {audit.unscored} of {2 * audit.probes} replies had no ratings ({reason})"
    write_records(judgements, found)
    if not is_used:
        why = f"the audit failed: {figures}; judge.audit_pass_share asks for {judge.audit_pass_share:.0%} of each"
        write_json(metrics, {"used": False, "why": why, "audit": audit})
        say(f"judge: not used, as {why}; no candidate was judged")
        return
    by_status = Counter(one.status for one in found)
    counts = {"asked": len(found)} | {status: by_status[status] for status in ("scored", "unparsed", "failed")}
    too_low = {name: sum(name in one.too_low for one in found) for name in DIMENSIONS}
    write_json(metrics, {"used": True, "why": f"the audit passed: {figures}", "audit": audit, "too_low": too_low} | counts)
    say(
        f"judge: the audit passed: {figures}; {len(found)} candidates ({tally.reused} reused, {tally.answered + tally.failed} asked in"
        f" {tally.seconds:.0f} s) = {by_status['scored']} scored + {by_status['unparsed']} unparsed + {by_status['failed']} failed;"
        f" {sum(1 for one in found if one.too_low)} rated below {judge.min_score}"
    )


if __name__ == "__main__":
    run(main)
