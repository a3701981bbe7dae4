"""Requests about chunks, and the drafts in their replies."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from stages.evidence import Passage, fold, lead_of, locate, passages_of, words
from stages.llm import Reply, Request, request_key
from stages.params import Count, NonNegative, Positive
from stages.recipes import sdk
from stages.recipes.forms import Form, forms_of, heading_forms, thing
from stages.records import Chunk, QuestionType

PROMPTS = Path(__file__).with_name("prompts.yaml")
Recipe = Literal["quote-first", "free", "synthetic-data-kit"]
BEGINNINGS = "How|What|Why|When|Which|Where|Who"
SHY = re.compile(
    r"(?i)\b(as an ai|i can(?:no|')t|i am (?:unable|sorry)|i'm (?:unable|sorry)|i do(?: no|n')t know|the (?:text|page|passage) (?:says|states|does))\b"
)
LEANING = re.compile(
    r"(?i)^(?:what|who|where|when|why|how) (?:is|are|was|were|does|do|did|can|should) (?:it|this|that|they|these|those|he|she)\b"
)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a recipe needs of params.yaml's section generate."""

    recipe: Recipe
    types: Annotated[tuple[QuestionType, ...], msgspec.Meta(min_length=1)]
    pairs_per_chunk: Positive
    wordings: Positive
    temperature: NonNegative
    max_tokens: Positive
    seed: Count


class Ask(msgspec.Struct, frozen=True):
    """A request and what it is about. `choices` maps each key of the reply to the questions offered for it, empty where the teacher writes."""

    chunk: Chunk
    recipe: str
    type: QuestionType
    request: Request
    passage: Passage | None = None  # the answer, where the recipe picks it
    choices: Mapping[str, Sequence[Form]] = {}

    @property
    def key(self) -> str:
        return request_key(self.request)


class Draft(msgspec.Struct, frozen=True):
    """A question and answer out of a reply, not yet ranked."""

    chunk: Chunk
    recipe: str
    type: QuestionType
    question: str
    answer: str
    quote: str  # empty where the recipe keeps no evidence
    key: str = ""  # of its request; empty for a pair that people brought


class Written(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of a reply in the recipe `free`."""

    questions: list[str]
    answer: str
    quote: str


def asks_about(chunk: Chunk, generate: Settings, model: str) -> list[Ask]:
    """The requests of generate.recipe about `chunk`; [] when no passage of it can stand as an answer."""
    if generate.recipe == "free":
        return _free(chunk, generate, model)
    if generate.recipe == "synthetic-data-kit":
        request = _request(sdk.messages_for(chunk.markdown(), generate.pairs_per_chunk), None, generate, model)
        return [Ask(chunk, "synthetic-data-kit", generate.types[int(chunk.id, 16) % len(generate.types)], request)]
    return [_choose(chunk, passage, forms, generate, model) for passage, forms in facts_of(chunk, generate)]


def retries_of(chunk: Chunk, generate: Settings, model: str) -> list[Ask]:
    """The second try for a chunk whose section got no sound draft, where its heading raises no question: one of the teacher's own."""
    lead = lead_of(chunk.markdown())
    is_asked = bool(_of_types(heading_forms(chunk.heading_path), generate.types))
    return [_open(chunk, lead, generate, model)] if lead and not is_asked else []


def heading_drafts(chunk: Chunk, generate: Settings) -> list[Draft]:
    """What the heading of `chunk` asks, answered by what the chunk says first; costs no call."""
    lead = lead_of(chunk.markdown())
    forms = _of_types(heading_forms(chunk.heading_path), generate.types) if lead else []
    return [Draft(chunk, "heading", kind, question, lead.answer, lead.quote) for kind, question in forms if lead]


def facts_of(chunk: Chunk, generate: Settings) -> list[tuple[Passage, list[Form]]]:
    """Up to pairs_per_chunk passages of `chunk` with the questions they answer: rare types first, one long passage in every other chunk.

    A choice depends on the chunk alone, so that an edit elsewhere asks nothing again.
    """
    found = [
        (passage, _of_types(forms_of(passage.answer, chunk.heading_path), generate.types))
        for passage in passages_of(chunk.markdown())
    ]
    found = [(passage, forms) for passage, forms in found if forms]
    long = [fact for fact in found if fact[0].length == "long"]
    short = [fact for fact in found if fact[0].length == "short"]
    chosen = [long[0]] if long and generate.pairs_per_chunk > 1 and int(chunk.id, 16) % 2 else []
    while short and len(chosen) < generate.pairs_per_chunk:
        taken: list[str] = [forms[0][0] for _, forms in chosen]
        rank = {kind: (taken.count(kind), order) for order, kind in enumerate(("procedural", "conceptual", "factual"))}
        best = min(short, key=lambda fact: rank[fact[1][0][0]])
        short.remove(best)
        starts = [(passage.answer, best[0].answer) for passage, _ in chosen]
        if not any(one.startswith(other) or other.startswith(one) for one, other in starts):  # else one question had two answers
            chosen.append(best)
    return chosen


def drafts_in(ask: Ask, reply: Reply) -> list[Draft]:
    """The drafts in `reply`. Raises ValueError, with the reason, when it holds none that can be used."""
    if reply.failed:
        raise ValueError(reply.failed)
    if not reply.is_whole:
        raise ValueError("cut at generate.max_tokens")
    try:
        drafts = _drafts(ask, reply.text)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ValueError(f"not the JSON asked for: {error}") from None
    if not drafts:
        raise ValueError("no pairs in the reply")
    return drafts


def repair_of(ask: Ask, reply: Reply, generate: Settings) -> Ask | None:
    """The request that asks for `reply` again with its faults named, in the recipe `free`; None where nothing is wrong or can be mended."""
    if ask.recipe != "free":
        return None
    try:
        drafts = drafts_in(ask, reply)
        faults = [f"- {draft.question}: {fault}" for draft in drafts for fault in faults_of(draft)]
    except ValueError as error:
        faults = [f"- {error}"]
    if not faults or reply.failed:
        return None
    said = ("assistant", reply.text[: 4 * generate.max_tokens])
    again = ("user", prompts()["free"]["repair"].format(faults="\n".join(faults)))
    return msgspec.structs.replace(
        ask, request=msgspec.structs.replace(ask.request, messages=(*ask.request.messages, said, again))
    )


def faults_of(draft: Draft) -> list[str]:
    """What is wrong with a draft, in words that its writer can act on."""
    faults = []
    if locate(draft.quote, draft.chunk.text) is None:
        faults.append("the quote is not copied word for word from the page")
    if not draft.question.endswith("?") or len(draft.question) < 10:
        faults.append("the question is no question")
    if LEANING.match(draft.question):
        faults.append("the question does not name its subject")
    if SHY.search(draft.answer) or SHY.search(draft.question):
        faults.append("it refuses, or speaks of the text")
    return faults


def with_evidence(drafts: Sequence[Draft], embed: Callable[[list[str]], Any]) -> list[Draft]:
    """`drafts`, those without a quote with the nearest evidence in their chunk, if there is any. `embed` gives unit vectors, shape (n, d)."""
    bare: dict[Chunk, list[Draft]] = {}
    for draft in drafts:
        if draft.recipe == "synthetic-data-kit":
            bare.setdefault(draft.chunk, []).append(draft)
    quotes: dict[Draft, str] = {}
    for chunk, some in bare.items():
        pairs = [(draft.question, draft.answer) for draft in some]
        quotes.update(zip(some, sdk.evidence_for(pairs, sdk.spans_of(chunk.markdown()), embed), strict=True))
    return [msgspec.structs.replace(draft, quote=quotes[draft]) if draft in quotes else draft for draft in drafts]


def naming(draft: Draft) -> Draft:
    """`draft` with the name of its page at the head of the question, unless it is there."""
    page = thing(draft.chunk.heading_path[0]) if draft.chunk.heading_path else ""
    if not page or "?" in page or f" {words(page)} " in f" {words(draft.question)} ":
        return draft
    return msgspec.structs.replace(draft, question=f"In {page}, {draft.question[0].lower()}{draft.question[1:]}")


@cache
def prompts() -> Any:
    import yaml

    return yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))


def _choose(chunk: Chunk, passage: Passage, forms: Sequence[Form], generate: Settings, model: str) -> Ask:
    slots = min(generate.wordings, len(forms))
    choices = {f"question_{slot + 1}": forms[slot::slots] for slot in range(slots)}
    prompt = prompts()["quote-first"]
    messages = [("system", prompt["system"])]
    for example in prompt["examples"]:
        questions = {f"question_{place}": question for place, question in enumerate(example["questions"], start=1)}
        messages.append(("user", prompt["user"].format(topic=example["topic"], answer=example["answer"])))
        messages.append(("assistant", msgspec.json.encode(questions).decode()))
    messages.append(("user", prompt["user"].format(topic=chunk.topic(), answer=passage.answer)))
    schema = _object({key: {"enum": [question for _, question in offered]} for key, offered in choices.items()})
    return Ask(chunk, "quote-first", forms[0][0], _request(messages, schema, generate, model), passage, choices)


def _open(chunk: Chunk, passage: Passage, generate: Settings, model: str) -> Ask:
    kind = generate.types[int(chunk.id, 16) % len(generate.types)]
    prompt = prompts()["open"]
    messages = [("system", prompt["system"])]
    for example in prompt["examples"]:
        messages.append(("user", prompt["user"].format(**example)))
        messages.append(("assistant", msgspec.json.encode({"question": example["question"]}).decode()))
    messages.append(("user", prompt["user"].format(topic=chunk.topic(), answer=passage.answer, type=kind)))
    schema = _object({"question": {"type": "string", "pattern": rf'^({BEGINNINGS}) [^?"\\\n]{{8,110}}[\w`)]\?$'}})
    return Ask(chunk, "open", kind, _request(messages, schema, generate, model), passage)


def _free(chunk: Chunk, generate: Settings, model: str) -> list[Ask]:
    """One request for each question type, for pairs_per_chunk facts in all; the types take turns over the chunks."""
    turn = int(chunk.id, 16)
    kinds = [generate.types[(turn + pair) % len(generate.types)] for pair in range(generate.pairs_per_chunk)]
    prompt = prompts()["free"]
    asks = []
    for kind in sorted(set(kinds)):
        text = {"type": "string", "minLength": 1}
        questions = {"type": "array", "items": text, "minItems": generate.wordings, "maxItems": generate.wordings}
        pair = _object({"quote": text, "answer": text, "questions": questions})  # in this order: evidence first
        pairs = kinds.count(kind)
        schema = _object({"pairs": {"type": "array", "items": pair, "minItems": pairs, "maxItems": pairs}})
        user = prompt["user"].format(
            topic=chunk.topic(),
            text=chunk.markdown().strip(),
            type=kind,
            pairs=pairs,
            wordings=generate.wordings,
            advice=prompt["advice"][kind],
        )
        asks.append(Ask(chunk, "free", kind, _request((("system", prompt["system"]), ("user", user)), schema, generate, model)))
    return asks


def _drafts(ask: Ask, text: str) -> list[Draft]:
    key = ask.key

    def draft(question: str, answer: str, quote: str, kind: QuestionType = ask.type) -> Draft:
        return Draft(ask.chunk, ask.recipe, kind, fold(question), answer.strip(), fold(quote), key)

    if ask.recipe == "free":
        pairs = msgspec.json.decode(text, type=dict[str, list[Written]]).get("pairs", [])
        return [draft(question, pair.answer, pair.quote) for pair in pairs for question in pair.questions]
    if ask.passage is None:
        return [draft(question, answer, "") for question, answer in sdk.pairs_in(text)]
    said = msgspec.json.decode(text, type=dict[str, str])
    if not ask.choices:
        return [draft(said["question"], ask.passage.answer, ask.passage.quote)] if said.keys() == {"question"} else []
    offered = {key: {question: kind for kind, question in forms} for key, forms in ask.choices.items()}
    if said.keys() != offered.keys() or any(said[key] not in offered[key] for key in said):
        raise ValueError("the reply holds a question that was not offered")  # a server that does not keep to the schema
    return [draft(said[key], ask.passage.answer, ask.passage.quote, offered[key][said[key]]) for key in said]


def _of_types(forms: Sequence[Form], types: Sequence[QuestionType]) -> list[Form]:
    return [form for form in dict.fromkeys(forms) if form[0] in types]


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _request(messages: Sequence[tuple[str, str]], schema: Any, generate: Settings, model: str) -> Request:
    return Request(
        model_sha256=model,
        messages=tuple(messages),
        temperature=generate.temperature,
        max_tokens=generate.max_tokens,
        seed=generate.seed,
        schema=None if schema is None else msgspec.Raw(msgspec.json.encode(schema)),
    )
