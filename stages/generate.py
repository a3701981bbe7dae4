"""data/chunks.jsonl -> data/candidates.jsonl + data/generate_failures.jsonl: questions and answers with evidence, by a teacher model.

Two recipes. `quote-first` picks sentences of the chunk as answers and asks the model for the question of each, several times: what a
small model can do, and grounded by construction. `free` asks for question, answer and verbatim quote at once: for larger models.
Costs one call per fact and sample (or per chunk and type); replies are kept in data/store, so a rerun asks only what changed.
"""

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from stages.files import write_json
from stages.llm import Endpoint, Engine, Reply, Request, Store, ask_all, request_key, serve_model
from stages.models import load_embedder, model_sha256
from stages.params import Count, Models, NonNegative, Positive
from stages.program import BadInput, LimitBroken, run, say
from stages.records import Candidate, Chunk, Failure, QuestionType, content_id, read_records, write_records

PROMPTS = Path(__file__).with_name("generate_prompts.yaml")
CONTEXT_TOKENS = 2048
QUESTION_SCHEMA = {
    "type": "object",
    "properties": {"question": {"type": "string", "minLength": 10, "maxLength": 160}},
    "required": ["question"],
    "additionalProperties": False,
}
PAIR_SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string", "minLength": 1} for name in ("question", "answer", "quote")},
    "required": ["question", "answer", "quote"],
    "additionalProperties": False,
}


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    recipe: Literal["quote-first", "free"]
    endpoint: str
    engine: Engine
    types: Annotated[tuple[QuestionType, ...], msgspec.Meta(min_length=1)]
    pairs_per_chunk: Positive
    samples: Positive
    temperature: NonNegative
    max_tokens: Positive
    seed: Count
    max_chunks: Count
    concurrency: Positive
    timeout_s: Positive


class Fact(msgspec.Struct, frozen=True):
    """A sentence (or two) of a chunk that can stand as an answer."""

    quote: str  # verbatim, white space folded
    answer: str  # the quote without link targets and tags
    type: QuestionType


class Ask(msgspec.Struct, frozen=True):
    """A request and what it is about; `fact` is None in the recipe `free`."""

    chunk: Chunk
    fact: Fact | None
    type: QuestionType
    sample: int
    request: Request


class Draft(msgspec.Struct, frozen=True):
    """A question and answer out of a reply, not yet ranked."""

    ask: Ask
    question: str
    answer: str
    quote: str


def spread(chunks: Sequence[Chunk], limit: int) -> list[Chunk]:
    """All of `chunks`, or `limit` of them: one from each document in turn, so that a subset covers every page."""
    if limit == 0 or limit >= len(chunks):
        return list(chunks)
    by_document: dict[str, list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        by_document[chunk.document_id].append(chunk)
    turns = [(turn, key) for key in sorted(by_document) for turn in range(len(by_document[key]))]
    return [by_document[key][turn] for turn, key in sorted(turns)[:limit]]


SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)\s+(?=[A-Z`\[\"*(])")
LEANS_ON_BEFORE = re.compile(
    r"(?i)^\W*(it|its|this|that|these|those|they|them|then|there|he|she|such|here|also|however|note|see|otherwise|but|and|or|so|for example)\b"
)
MIN_FACT_CHARS, MAX_FACT_CHARS = 40, 320


def facts_of(chunk: Chunk, limit: int, types: Sequence[QuestionType]) -> list[Fact]:
    """Up to `limit` facts of `chunk`, spread over it: sentences of its paragraphs, list items and table-free text.

    A sentence that leans on the one before ("It ...", "This ...") is taken together with it. Too short and too long ones are left out.
    """
    facts = []
    for paragraph in paragraphs_of(chunk.text):
        before = ""
        for sentence in SENTENCE_END.split(paragraph):
            sentence = sentence.strip()
            quote = f"{before} {sentence}" if LEANS_ON_BEFORE.match(sentence) and before else sentence
            before = sentence
            answer = readable(quote)
            is_whole = answer.endswith((".", "!")) and not LEANS_ON_BEFORE.match(answer)
            if is_whole and MIN_FACT_CHARS <= len(answer) <= MAX_FACT_CHARS:
                facts.append(Fact(quote=quote, answer=answer, type=type_of(answer, types)))
    step = max(1.0, len(facts) / limit)
    return [facts[int(place * step)] for place in range(min(limit, len(facts)))]


def paragraphs_of(text: str) -> list[str]:
    """The paragraphs and list items of a Markdown text as written, white space folded; those that markers break up are left out."""
    from markdown_it import MarkdownIt

    whole = fold(text)
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    opened = [before.type for before in tokens]
    inlines = [fold(token.content) for kind, token in zip(opened, tokens[1:], strict=False) if kind == "paragraph_open"]
    return [inline for inline in inlines if inline and inline in whole]


def readable(quote: str) -> str:
    """A quote as an answer: its words and code, without link targets, tags and emphasis."""
    from markdown_it import MarkdownIt

    # a reference link's target is defined elsewhere on the page: its brackets are markup all the same
    words = re.sub(r"\[([^\[\]]+)\](\[[^\]]*\])?(?!\()", r"\1", quote) if "`" not in quote else quote
    inline = MarkdownIt("commonmark").parseInline(words)[0]
    parts = [f"`{child.content}`" if child.type == "code_inline" else child.content for child in inline.children or []]
    kinds = [child.type for child in inline.children or []]
    return fold(
        "".join(part if kind != "softbreak" else " " for kind, part in zip(kinds, parts, strict=True) if kind != "html_inline")
    )


def fold(text: str) -> str:
    """`text` with every run of white space as one blank."""
    return " ".join(text.split())


PROCEDURAL = re.compile(
    r"(?i)^(to |use |run |set |add |open |choose |install |start |write |put |call |pass |type |create |first|if you want)|\b(you can|by running|run `|use `)"
)
CONCEPTUAL = re.compile(r"(?i)\b(is an? |are |means |because |so that |allows |instead of |purpose |refers to |without )")


def type_of(answer: str, types: Sequence[QuestionType]) -> QuestionType:
    """The question type that suits `answer` by its wording, of those in `types`."""
    if PROCEDURAL.search(answer) and "procedural" in types:
        return "procedural"
    if CONCEPTUAL.search(answer) and "conceptual" in types:
        return "conceptual"
    return "factual" if "factual" in types else types[0]


def asks_quote_first(chunk: Chunk, generate: Params, prompts: Any, model: str) -> list[Ask]:
    """`samples` requests for each fact of `chunk`."""
    asks = []
    for fact in facts_of(chunk, generate.pairs_per_chunk, generate.types):
        messages = [("system", prompts["system"])]
        for example in prompts["examples"][fact.type]:
            messages.append(("user", prompts["user"].format(type=fact.type, **example)))
            messages.append(("assistant", msgspec.json.encode({"question": example["question"]}).decode()))
        messages.append(("user", prompts["user"].format(topic=topic_of(chunk), quote=fact.answer, type=fact.type)))
        for sample in range(generate.samples):
            request = request_for(tuple(messages), QUESTION_SCHEMA, generate, sample, model)
            asks.append(Ask(chunk, fact, fact.type, sample, request))
    return asks


def asks_free(chunk: Chunk, generate: Params, prompts: Any, model: str) -> list[Ask]:
    """One request for each question type, for `pairs_per_chunk` pairs in all; the types take turns over the chunks."""
    turn = int(chunk.id, 16)
    share = Counter(generate.types[(turn + pair) % len(generate.types)] for pair in range(generate.pairs_per_chunk))
    asks = []
    for kind, pairs in sorted(share.items()):
        schema = {
            "type": "object",
            "properties": {"pairs": {"type": "array", "items": PAIR_SCHEMA, "minItems": pairs, "maxItems": pairs}},
            "required": ["pairs"],
            "additionalProperties": False,
        }
        user = prompts["user"].format(topic=topic_of(chunk), text=chunk.text.strip(), type=kind, pairs=pairs)
        messages = (("system", prompts["system"].strip()), ("user", user))
        asks.append(Ask(chunk, None, kind, 0, request_for(messages, schema, generate, 0, model)))
    return asks


def topic_of(chunk: Chunk) -> str:
    return " > ".join(chunk.heading_path) or Path(chunk.path).stem


def request_for(messages: tuple[tuple[str, str], ...], schema: Any, generate: Params, sample: int, model: str) -> Request:
    return Request(
        model_sha256=model,
        messages=messages,
        temperature=generate.temperature,
        max_tokens=generate.max_tokens,
        seed=generate.seed + sample,
        schema=msgspec.Raw(msgspec.json.encode(schema, order="deterministic")),
    )


class OneQuestion(msgspec.Struct, forbid_unknown_fields=True):
    question: str


class OnePair(msgspec.Struct, forbid_unknown_fields=True):
    question: str
    answer: str
    quote: str


class Pairs(msgspec.Struct, forbid_unknown_fields=True):
    pairs: list[OnePair]


def drafts_of(ask: Ask, reply: Reply) -> list[Draft]:
    """The drafts in `reply`. Raises ValueError, with the reason, when it holds none."""
    if reply.failed:
        raise ValueError(reply.failed)
    if not reply.is_whole:
        raise ValueError("cut at max_tokens")
    try:
        if ask.fact is not None:
            question = msgspec.json.decode(reply.text, type=OneQuestion).question
            return [Draft(ask, fold(question), ask.fact.answer, ask.fact.quote)]
        pairs = msgspec.json.decode(reply.text, type=Pairs).pairs
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ValueError(f"not the JSON asked for: {error}") from None
    if not pairs:
        raise ValueError("no pairs in the reply")
    return [Draft(ask, fold(pair.question), pair.answer.strip(), fold(pair.quote)) for pair in pairs]


def ranked(drafts: Sequence[Draft], embed: Any, model: str, recipe: Literal["quote-first", "free"]) -> list[Candidate]:
    """`drafts` as candidates, with their round trip: how near question and quote are, and how many other quotes are nearer.

    `embed` maps texts to unit vectors, shape (n, d). Equal questions for one fact stay one candidate, the earliest sample.
    """
    import numpy as np

    first: dict[str, Draft] = {}
    for draft in sorted(drafts, key=lambda draft: draft.ask.sample):
        first.setdefault(content_id(draft.ask.chunk.id, draft.question, draft.answer), draft)
    drafts = list(first.values())
    grounds = [f"{topic_of(draft.ask.chunk)}: {draft.answer}" for draft in drafts]
    distinct = sorted(set(grounds))
    place = {ground: index for index, ground in enumerate(distinct)}
    questions, quotes = embed([draft.question for draft in drafts]), embed(distinct)
    rows = []
    for draft, ground, vector in zip(drafts, grounds, questions, strict=True):
        cosines = quotes @ vector
        own = cosines[place[ground]]
        rows.append((draft, float(own), 1 + int(np.count_nonzero(cosines > own))))
    by_fact: dict[tuple[str, str], list[tuple[Draft, float, int]]] = defaultdict(list)
    for row in rows:
        by_fact[row[0].ask.chunk.id, row[0].quote].append(row)
    candidates = []
    for (chunk_id, quote), samples in by_fact.items():
        samples.sort(key=lambda row: (row[2], -round(row[1], 4), row[0].question))
        for wording, (draft, similarity, rank) in enumerate(samples, start=1):
            candidates.append(
                Candidate(
                    id=content_id(chunk_id, draft.question, draft.answer),
                    chunk_id=chunk_id,
                    fact_id=content_id(chunk_id, quote),
                    question=draft.question,
                    answer=draft.answer,
                    quote=quote,
                    type=draft.ask.type,
                    recipe=recipe,
                    model=model,
                    sample=draft.ask.sample,
                    similarity=round(similarity, 4),
                    rank=rank,
                    wording=wording,
                )
            )
    return candidates


def connection(generate: Params, models: Models) -> AbstractContextManager[Endpoint]:
    """The endpoint in params.yaml, or a server started for the length of the stage."""
    if not generate.endpoint:
        return serve_model(models.teacher, generate.engine, CONTEXT_TOKENS, generate.concurrency)

    @contextlib.contextmanager
    def given() -> Iterator[Endpoint]:
        yield Endpoint(url=generate.endpoint.rstrip("/"), model=models.teacher)

    return given()


def main(chunks: Path, store: Path, candidates: Path, failures: Path, metrics: Path, *, generate: Params, models: Models) -> None:
    import yaml

    # a remote model has no file here: its name and address stand for it
    model = f"{generate.endpoint} {models.teacher}" if generate.endpoint else model_sha256(models.teacher)
    prompts = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))[generate.recipe]
    every = read_records(chunks, Chunk)
    chosen = spread(every, generate.max_chunks)
    make_asks = asks_quote_first if generate.recipe == "quote-first" else asks_free
    asks = {chunk.id: make_asks(chunk, generate, prompts, model) for chunk in chosen}
    lost = [failure(chunk.id, "no-fact", "no sentence can stand as an answer") for chunk in chosen if not asks[chunk.id]]
    lost += [failure(chunk.id, "not-chosen", "beyond generate.max_chunks") for chunk in every if chunk.id not in asks]

    flat = [ask for some in asks.values() for ask in some]
    if not flat:
        raise BadInput(f"{chunks}: no chunk holds a sentence to ask about; add prose to the sources")
    keyed = {request_key(ask.request): ask for ask in flat}
    say(f"generate: {len(chosen)} chunks, {len(keyed)} calls for {generate.recipe}")
    kept = Store(store)
    replies, tally = ask_all(
        {key: ask.request for key, ask in keyed.items()},
        kept,
        lambda: connection(generate, models),
        generate.concurrency,
        generate.timeout_s,
        "generate",
    )
    kept.close()

    drafts: list[Draft] = []
    unusable: dict[str, str] = {}  # request key -> reason
    for ask in flat:  # not `keyed`: one sentence under one heading in two chunks is one request, and both chunks' fact
        key = request_key(ask.request)
        try:
            drafts += drafts_of(ask, replies[key])
        except ValueError as error:
            reason = "unusable-reply" if not replies[key].failed else "call-failed"
            unusable[key] = reason
            lost.append(Failure(id=content_id(ask.chunk.id, key), parent_id=ask.chunk.id, reason=reason, detail=str(error)[:300]))
    if not drafts:
        detail = next((loss.detail for loss in lost if loss.reason in unusable.values()), "")
        raise LimitBroken(f"none of {len(keyed)} calls gave a question ({detail}); check models.teacher and generate.max_tokens")
    embedder = load_embedder(models.embedder)
    found = ranked(
        drafts, lambda texts: embedder.encode(texts, batch_size=64, normalize_embeddings=True), model[:16], generate.recipe
    )
    write_records(candidates, found)
    write_records(failures, lost)
    repeated = len(drafts) - len(found)
    answered = len(keyed) - len(unusable)
    write_json(
        metrics,
        {
            "chunks": len(chosen),
            "chunks_asked": sum(1 for some in asks.values() if some),
            "facts": len({candidate.fact_id for candidate in found}),
            "calls": len(keyed),
            "usable": answered,
            "unusable": len(unusable),
            "repeated": repeated,
            "candidates": len(found),
            "by_type": dict(sorted(Counter(candidate.type for candidate in found).items())),
        },
    )
    say(
        f"generate: {len(keyed)} calls ({tally.reused} reused, {tally.answered + tally.failed} asked in {tally.seconds:.0f} s)"
        f" = {answered} usable + {len(unusable)} unusable; {len(drafts)} drafts = {len(found)} candidates + {repeated} repeated"
    )


def failure(chunk_id: str, reason: str, detail: str) -> Failure:
    return Failure(id=content_id(chunk_id, reason), parent_id=chunk_id, reason=reason, detail=detail)


if __name__ == "__main__":
    run(main)
