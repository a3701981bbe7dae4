"""data/chunks.jsonl + data/curated.jsonl -> data/candidates.jsonl + data/generate_failures.jsonl: questions and answers with evidence.

`quote-first` picks passages of a chunk as answers, offers questions made from their words, and lets the teacher choose how to ask: what
a small model can do, and grounded by construction. `free` asks for question, answer and verbatim quote at once: for larger models.
`synthetic-data-kit` asks with that tool's prompts and reads with its parser. A section that got nothing sound is tried again in another way.
Costs one call per fact (or per chunk and type); replies are kept in data/store, so a rerun asks only what changed.
"""

import contextlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from stages.embedding import Embed, embedding
from stages.evidence import locate, passages_of
from stages.executor import Executor
from stages.files import write_json
from stages.llm import Endpoint, Engine, Reply, Source, Store, Tally, asking
from stages.models import as_hf_folder, load_tokenizer
from stages.params import Count, Models, Positive, Share
from stages.program import BadInput, LimitBroken, run, say
from stages.recipes import (
    Ask,
    Draft,
    Settings,
    asks_about,
    drafts_in,
    faults_of,
    heading_drafts,
    naming,
    repair_of,
    retries_of,
    with_evidence,
)
from stages.records import MEND, Candidate, Chunk, Curated, Failure, content_id, read_records, write_records

CONTEXT_TOKENS = 2048
CODE = re.compile("`[^`]+`")
MAX_RANK = 10  # it stands for any higher one
TIE = 0.03  # cosine; of 43 questions that another passage beat, those beaten by less were right by hand


class Params(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    endpoints: tuple[Endpoint, ...]
    engine: Engine
    min_similarity: Share
    max_chunks: Count
    concurrency: Positive
    timeout_s: Positive


class Asked(msgspec.Struct, frozen=True):
    """A request and what came of it: `drafts`, or else the reason why there are none."""

    ask: Ask
    reply: Reply
    drafts: tuple[Draft, ...] = ()
    detail: str = ""


class Ranked(msgspec.Struct, frozen=True):
    """A draft and its round trip."""

    draft: Draft
    similarity: float  # cosine of question and own evidence
    rank: int  # 1 + how many other passages are nearer to the question, up to MAX_RANK


def spread(chunks: Sequence[Chunk], limit: int) -> list[Chunk]:
    """All of `chunks`, or `limit` of them: one from each document in turn, so that a subset covers every page."""
    if limit == 0 or limit >= len(chunks):
        return list(chunks)
    by_document: dict[str, list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        by_document[chunk.document_id].append(chunk)
    turns = [(turn, key) for key in sorted(by_document) for turn in range(len(by_document[key]))]
    return [by_document[key][turn] for turn, key in sorted(turns)[:limit]]


def read_reply(ask: Ask, reply: Reply) -> Asked:
    """What came of `ask`."""
    try:
        return Asked(ask, reply, tuple(drafts_in(ask, reply)))
    except ValueError as error:
        return Asked(ask, reply, detail=" ".join(str(error).split())[:300])


def without(sections: set[str], chunks: Sequence[Chunk]) -> dict[str, list[Chunk]]:
    """The chunks of each section that is not in `sections`, in reading order."""
    found: dict[str, list[Chunk]] = defaultdict(list)
    for chunk in sorted(chunks, key=lambda chunk: (chunk.path, chunk.start)):
        if chunk.section_id not in sections:
            found[chunk.section_id].append(chunk)
    return found


def sound_sections(drafts: Iterable[Draft], embed: Embed, min_similarity: float) -> set[str]:
    """Ids of the sections with a draft that has no fault and is near enough to its evidence.

    It depends on the section alone, so that an edit elsewhere asks nothing again.
    """
    checked = [draft for draft in drafts if not faults_of(draft)]
    if not checked:
        return set()
    grounds = embed([ground(draft.chunk, draft.answer) for draft in checked])
    near = (embed([draft.question for draft in checked]) * grounds).sum(1)
    return {draft.chunk.section_id for draft, cosine in zip(checked, near, strict=True) if cosine >= min_similarity}


def found_sections(trips: Iterable[Ranked], min_similarity: float) -> set[str]:
    """Ids of the sections with a draft whose round trip leads back to it."""
    return {
        trip.draft.chunk.section_id
        for trip in trips
        if trip.rank == 1 and trip.similarity >= min_similarity and not faults_of(trip.draft)
    }


def ground(chunk: Chunk, answer: str) -> str:
    """What a question should lead to: its answer under the headings of its chunk."""
    return f"{chunk.topic()}: {answer}"


class Places(NamedTuple):
    """Where a question can lead: every passage of the chunks."""

    quotes: list[str]
    codes: list[set[str]]  # the names that its text sets as code
    vectors: Any  # unit vectors, shape (n, d)


def places_in(chunks: Iterable[Chunk], embed: Embed) -> Places:
    found = sorted(
        {(ground(chunk, passage.answer), passage.quote) for chunk in chunks for passage in passages_of(chunk.markdown())}
    )
    texts = [text for text, _ in found]
    return Places([quote for _, quote in found], [set(CODE.findall(text)) for text in texts], embed(texts))


def round_trips(drafts: Sequence[Draft], places: Places, embed: Embed) -> list[Ranked]:
    """Each draft with its round trip through `places`. A question that leads elsewhere is put again with its page's name.

    Not elsewhere are passages that overlap the draft's own, lack a name that the question sets as code, or are nearer by less than TIE.
    A question made from a heading names its own section: for it none is elsewhere.
    """
    import numpy as np

    def trip(draft: Draft) -> Ranked:
        vector, evidence = embed([draft.question, ground(draft.chunk, draft.answer)])
        similarity = float(vector @ evidence)
        codes = set(CODE.findall(draft.question))
        near = np.flatnonzero(places.vectors @ vector > similarity + TIE) if places.quotes else ()
        nearer = (places.quotes[place] for place in near if codes <= places.codes[place])
        elsewhere = (1 for quote in nearer if quote not in draft.quote and draft.quote not in quote)
        rank = 1 if draft.recipe == "heading" else 1 + sum(itertools.islice(elsewhere, MAX_RANK - 1))
        return Ranked(draft, round(similarity, 4), rank)

    embed([text for draft in drafts for text in (draft.question, ground(draft.chunk, draft.answer))])  # faster than one by one
    trips = [trip(draft) for draft in drafts]
    named = {place: naming(one.draft) for place, one in enumerate(trips) if one.rank > 1}
    embed([draft.question for draft in named.values()])
    better = {place: trip(draft) for place, draft in named.items()}
    return [better[place] if place in better and better[place].rank == 1 else one for place, one in enumerate(trips)]


def distinct(trips: Sequence[Ranked]) -> dict[str, Ranked]:
    """Candidate id -> the first of `trips` that has it."""
    found: dict[str, Ranked] = {}
    for trip in trips:
        found.setdefault(content_id(trip.draft.chunk.id, trip.draft.question, trip.draft.answer), trip)
    return found


def candidates_of(trips: Mapping[str, Ranked], model: str) -> list[Candidate]:
    """`trips` by id as candidates, the wordings of a fact numbered from the best round trip on."""
    by_fact: dict[str, list[tuple[int, float, str, str]]] = defaultdict(list)
    for name, trip in trips.items():
        fact = content_id(trip.draft.chunk.id, trip.draft.quote)
        by_fact[fact].append((trip.rank, -trip.similarity, trip.draft.question, name))
    return [
        Candidate(
            id=name,
            chunk_id=trips[name].draft.chunk.id,
            fact_id=fact,
            question=question,
            answer=trips[name].draft.answer,
            quote=trips[name].draft.quote,
            type=trips[name].draft.type,
            recipe=trips[name].draft.recipe,
            model=model,
            similarity=-similarity,
            rank=rank,
            wording=wording,
        )
        for fact, wordings in by_fact.items()
        for wording, (rank, similarity, question, name) in enumerate(sorted(wordings), start=1)
    ]


def curated_drafts(pairs: Sequence[Curated], chunks: Sequence[Chunk]) -> tuple[list[Draft], list[Failure]]:
    """Pairs that people wrote or brought along, each under the first chunk that holds its quote; a failure for one whose quote is gone."""
    drafts, lost = [], []
    for pair in pairs:
        chunk = next((chunk for chunk in chunks if locate(pair.quote, chunk.text)), None)
        if chunk is None:
            lost.append(failure(pair.id, "no-evidence", f"{pair.origin}: no chunk holds its quote"))
        else:
            drafts.append(Draft(chunk, "curated", pair.type, pair.question, pair.answer, pair.quote))
    return drafts, lost


def failure(parent_id: str, reason: str, detail: str) -> Failure:
    return Failure(id=content_id(parent_id, reason, detail), parent_id=parent_id, reason=reason, detail=detail)


def endings_of(asked: Sequence[Asked], useful: set[str]) -> tuple[Counter[str], list[Failure]]:
    """How many requests were accepted, rejected and failed, and a failure for each that gave no candidate. `useful`: keys of those that did."""
    endings: dict[str, str] = {}
    lost = []
    for one in asked:  # one sentence under one heading in two chunks is one request and two facts
        key = one.ask.key
        endings[key] = "failed" if one.reply.failed else "accepted" if key in useful else "rejected"
        if endings[key] != "accepted":
            reason = "call-failed" if one.reply.failed else "repeats-another" if one.drafts else "unusable-reply"
            detail = one.detail or "each of its questions was there already"
            lost.append(failure(one.ask.chunk.id, reason, f"{detail} (request {key[:12]})"))
    return Counter(endings.values()), lost


def estimate_of(
    asks: Sequence[Ask], kept: Store, model: str, models: Models, prices: tuple[float, float], generate: Params
) -> str:
    """What asking would cost, from what the store has and the pace of earlier calls. `prices`: of a million prompt and new tokens."""
    requests = {ask.key: ask.request for ask in asks}
    known = kept.find(requests)
    missing = [request for key, request in requests.items() if key not in known]
    texts = [content for request in missing for _, content in request.messages]
    prompt = sum(map(len, texts)) // 4  # characters in a token of English, about; a remote model's tokenizer is not here
    if texts and not generate.endpoints:
        prompt = sum(len(tokens) for tokens in load_tokenizer(as_hf_folder(models.teacher))(texts).input_ids)
    rate = kept.rate(model)
    new = round(rate.new_tokens * len(missing)) if rate else generate.max_tokens * len(missing)
    line = f"{len(requests)} calls, {len(known)} of them kept: {len(missing)} to ask, {prompt:,} prompt tokens and "
    line += f"{new:,} new ones, " if rate else f"at most {new:,} new ones, "
    line += (
        f"about {len(missing) / rate.calls_per_s / 60:.1f} min at the pace of earlier calls"
        if rate
        else "time not known before a first run"
    )
    if any(prices):
        line += f", {prompt / 1e6 * prices[0] + new / 1e6 * prices[1]:.2f} at the given prices"
    return line + "; repairs and second tries come on top"


def main(
    chunks: Path,
    curated: Path,
    store: Path,
    candidates: Path,
    failures: Path,
    metrics: Path,
    *,
    generate: Params,
    models: Models,
    executor: Executor,
    estimate: bool = False,
    prune: bool = False,
    prompt_price: float = 0.0,
    new_price: float = 0.0,
) -> None:
    source = Source(generate.endpoints, models.teacher, generate.engine, CONTEXT_TOKENS, generate.concurrency, generate.timeout_s)
    model = source.model()
    every = read_records(chunks, Chunk)
    chosen = spread(every, generate.max_chunks)
    first = [ask for chunk in chosen for ask in asks_about(chunk, generate, model)]
    with contextlib.closing(Store(store, "generate")) as kept, contextlib.ExitStack() as servers:
        if estimate:
            prices = (prompt_price, new_price)
            say(f"generate: {len(chosen)} chunks, {estimate_of(first, kept, model, models, prices, generate)}")
            return
        ask = asking(source, executor, kept, servers)
        tallies: list[Tally] = []

        def put(asks: Sequence[Ask], label: str) -> list[Asked]:
            by_key = {one.key: one for one in asks}
            replies, tally = ask(
                {key: one.request for key, one in by_key.items()},
                label=label,
                groups={key: one.chunk.id for key, one in by_key.items()},
                pairs_in=lambda key, reply: len(read_reply(by_key[key], reply).drafts),
            )
            tallies.append(tally)
            return [read_reply(one, replies[one.key]) for one in asks]

        say(f"generate: {len(chosen)} chunks, {len(first)} requests for {generate.recipe}")
        asked = put(first, "generate")
        asked += put([repair for one in asked if (repair := repair_of(one.ask, one.reply, generate))], "repairs")
        embed = embedding(models.embedder, executor)
        drafts = with_evidence([draft for one in asked for draft in one.drafts], embed)
        bare = without(sound_sections(drafts, embed, generate.min_similarity), chosen)
        tries = [next(filter(None, (retries_of(chunk, generate, model) for chunk in some)), []) for some in bare.values()]
        retries = put([one for some in tries for one in some], "second tries")
        asked += retries
        drafts += [draft for one in retries for draft in one.drafts]
        keys = {one.ask.key for one in asked if not one.reply.failed}
        removed = kept.prune(keys) if prune else kept.size() - len(keys)

    brought, lost = curated_drafts(read_records(curated, Curated, MEND), every)
    if not drafts and not brought:
        if asked:
            raise LimitBroken(
                f"none of {len(asked)} calls gave a question ({asked[0].detail}); check models.teacher and generate.max_tokens"
            )
        raise BadInput(f"{chunks}: no chunk holds a passage to ask about; add prose to the sources")
    drafts.sort(key=lambda draft: bool(faults_of(draft)))  # of a pair and its repair, the one without fault is the first
    places = places_in(chosen, embed)
    trips = distinct(round_trips(drafts + brought, places, embed))
    missed = without(found_sections(trips.values(), generate.min_similarity), chosen)
    by_heading = [
        draft for some in missed.values() for draft in next(filter(None, (heading_drafts(chunk, generate) for chunk in some)), [])
    ]
    trips = distinct([*trips.values(), *round_trips(by_heading, places, embed)])
    left = without(found_sections(trips.values(), generate.min_similarity), chosen)
    endings, fruitless = endings_of(asked, {trip.draft.key for trip in trips.values()})
    heard = {one.ask.chunk.id for one in asked}
    lost += fruitless
    lost += [failure(chunk.id, "no-fact", "no passage can stand as an answer") for chunk in chosen if chunk.id not in heard]
    lost += [failure(chunk.id, "not-chosen", "beyond generate.max_chunks") for chunk in set(every) - set(chosen)]
    lost += [failure(some[0].id, "nothing-sound", "no question of its section leads back to it") for some in left.values()]
    found = candidates_of(trips, model[:16])
    write_records(candidates, found)
    write_records(failures, lost)
    reused = sum(tally.reused for tally in tallies)
    counts: dict[str, Any] = {
        "chunks": len(chosen),
        "facts": len({candidate.fact_id for candidate in found}),
        "calls": endings.total(),
        **{ending: endings[ending] for ending in ("accepted", "rejected", "failed")},
        "repaired": sum(1 for one in asked if len(one.ask.request.messages) > 2 and one.ask.recipe == "free"),
        "sections_tried_again": len(missed),
        "sections_without_sound": len(left),
        "repeated": sum(len(one.drafts) for one in asked) + len(brought) + len(by_heading) - len(found),
        "candidates": len(found),
        "by_type": dict(sorted(Counter(candidate.type for candidate in found).items())),
        "by_recipe": dict(sorted(Counter(candidate.recipe for candidate in found).items())),
    }
    write_json(metrics, counts)
    say(
        f"generate: {counts['calls']} calls ({reused} reused, {counts['calls'] - reused} generated, {removed} of earlier texts "
        f"{'removed' if prune else 'no longer used'}) = {counts['accepted']} accepted + {counts['rejected']} rejected + {counts['failed']} failed; "
        f"{len(found)} candidates for {counts['facts']} facts; {len(missed)} sections tried again, {len(left)} still without a sound question"
    )


if __name__ == "__main__":
    run(main)
