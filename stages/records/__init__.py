"""The records that stages hand to each other: one JSON object a line, sorted by id, joined by id."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from stages.files import new_file
from stages.program.errors import BadRecord

Text = Annotated[str, msgspec.Meta(min_length=1)]
Offset = Annotated[int, msgspec.Meta(ge=0)]
QuestionType = Literal["factual", "conceptual", "procedural"]
Role = Literal["system", "user", "assistant"]
Dimension = Literal["faithfulness", "answerability", "usefulness"]  # what a judge rates
Rating = Literal[1, 2, 3, 4, 5]
SetName = Literal["recall", "held_out", "gold", "out_of_scope", "general"]  # of questions


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Frozen and strict: a file with a missing, extra or wrongly typed field is refused."""

    id: Text


class Source(Record, frozen=True):
    """One collected file: where it came from and the hash of the bytes that were read."""

    source: Text  # the source's name in params.yaml
    path: Text  # inside the source, with forward slashes
    sha256: Text
    revision: str  # git commit or URL of origin; empty for a plain file outside git


class Document(Record, frozen=True):
    """A source file's text as Markdown. id = hash(text): a renamed file is the same document."""

    source: Text
    path: Text
    sha256: Text  # of the raw file
    revision: str
    title: str
    text: Text


class Chunk(Record, frozen=True):
    """A piece of a document. id = hash(heading path, text with white space folded): text added elsewhere leaves it unchanged."""

    document_id: Text
    section_id: Text  # hash(path, heading path): what splits keep together
    path: Text
    heading_path: tuple[str, ...]
    start: Offset  # characters into Document.text
    end: Offset
    text: Text
    fence: str = ""  # of the code block that the text begins inside of, as ```

    def topic(self) -> str:
        """What the text is about: its headings, never its path, so that a renamed file costs no call."""
        return " > ".join(self.heading_path) or "the documentation"

    def markdown(self) -> str:
        """The text as Markdown that stands alone."""
        return f"{self.fence}\n{self.text}" if self.fence else self.text


class Failure(Record, frozen=True):
    """An input that gave nothing, and why. id = hash(parent, reason)."""

    parent_id: Text  # a file's path, a chunk id or a request key
    reason: Text
    detail: str


class Finding(Record, frozen=True):
    """Something in a document that its owner should know of. id = hash(parent, kind, rule, start, shown)."""

    parent_id: Text  # the document's id
    source: Text
    path: Text
    kind: Literal["secret", "personal-data", "hidden-text", "instruction", "dominant-document", "near-identical-pages"]
    rule: Text  # what found it
    start: Offset  # characters into Document.text; start = end where it was removed or concerns the whole document
    end: Offset
    shown: str  # what it is, without the secret itself


class Candidate(Record, frozen=True):
    """An unjudged question and answer. id = hash(chunk, question, answer)."""

    chunk_id: Text
    fact_id: Text  # hash(chunk, quote): the wordings of one fact share it
    question: str
    answer: str
    quote: str  # verbatim evidence, claimed and not yet verified
    type: QuestionType
    recipe: Text  # how generate asked: quote-first, free, ...
    model: Text
    similarity: float  # cosine of question and quote
    rank: Offset  # place of the own quote among all quotes by that cosine; 1 is first
    wording: Offset  # place among the samples of one fact, best first; 1 is the best


class Judgement(Record, frozen=True):
    """A judge's ratings of a candidate, from 1 to 5. id = the candidate's. Without a usable reply they are null, never a number."""

    status: Literal["scored", "unparsed", "failed"]  # failed: the call gave no reply at all
    faithfulness: Rating | None  # the chunk says what the answer says
    answerability: Rating | None  # the chunk holds what the question asks for
    usefulness: Rating | None  # a reader would ask this, and the answer helps
    too_low: tuple[Dimension, ...]  # those below judge.min_score
    reason: str  # the judge's own, or why there is no rating


class Measurement(Record, frozen=True):
    """What rules need to know of a candidate and is costly to find out. id = the candidate's."""

    entailment: float  # cosine of answer and quote or the share of words they share, or the probability that an NLI model gives
    language: str  # ISO 639-1, of question and answer, or of the one that differs from the source; "" where it is not certain
    source_language: str
    secrets: tuple[str, ...]  # names of what was found in question, answer and quote
    personal_data: tuple[str, ...]
    cluster: Text  # the least id of the candidates whose question and answer are alike


class Decision(Record, frozen=True):
    """What a reviewer decided about a pair. id = hash(question, answer), so that it outlives a regeneration."""

    verdict: Literal["accept", "edit", "reject"]
    chunk_id: Text
    question: Text  # this and the next three as generated
    answer: Text
    quote: str
    type: QuestionType
    edited_question: str = ""
    edited_answer: str = ""
    note: str = ""


class Curated(Record, frozen=True):
    """A pair brought in from outside, with its evidence. id = hash(question, answer)."""

    question: Text
    answer: Text
    quote: Text  # verbatim from a chunk, white space folded
    type: QuestionType
    origin: Text  # the name of the file that it came in


class Pair(Record, frozen=True):
    """A candidate that passed every rule, with its evidence located. id = the candidate's."""

    chunk_id: Text
    fact_id: Text
    section_id: Text
    document_id: Text
    path: Text
    heading_path: tuple[str, ...]
    question: Text
    answer: Text
    quote: Text
    quote_start: Offset  # characters into Document.text
    quote_end: Offset
    type: QuestionType
    model: Text
    similarity: float
    wording: Offset
    cluster: Text  # of pairs that are alike; see Measurement
    flags: tuple[str, ...]  # rules that report and do not reject
    reviewed: bool  # a person accepted or edited it


class Rejected(Record, frozen=True):
    """A candidate that broke a rule. id = the candidate's; rules in the suite's order. A secret's place in its texts is marked, not shown."""

    chunk_id: Text
    section_id: Text
    question: str
    answer: str
    quote: str
    type: str
    similarity: float
    rules: tuple[str, ...]
    waivable: bool  # a reviewer may accept it all the same


class Coverage(Record, frozen=True):
    """What came of one section. id = its section_id; each count is one of rows, and rules and reasons are counted by name."""

    source: Text
    path: Text
    heading_path: tuple[str, ...]
    start: Offset  # of its first chunk, characters into Document.text
    chunks: Offset
    facts: Offset  # that its candidates ask about
    candidates: Offset
    pairs: Offset
    pairs_by_type: dict[str, int]
    pairs_by_recipe: dict[str, int]
    rejected: Offset
    rejected_by_rule: dict[str, int]  # a candidate may break several rules
    failures_by_reason: dict[str, int]
    retried: bool  # asked again with another recipe, as the first gave nothing
    reason: str  # the main one for having no pair; empty where there is a pair


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Role
    content: Text


class Example(Record, frozen=True):
    """A conversation to train on, without its system message. id = hash(pair ids); a general one has no pair, so id = hash(messages)."""

    pair_ids: tuple[str, ...]
    document_id: Text
    messages: tuple[Message, ...]


class Question(Record, frozen=True):
    """A question to score. `set` says what a right answer shows; a right answer to one that is out of scope says that it is.

    recall: facts that were trained, in new wordings; held_out: sections that were never trained; gold: people wrote it;
    out_of_scope: the documentation does not cover it; general: what any assistant should still know.
    """

    set: SetName
    section_id: Text  # questions of one section stand or fall together: intervals draw whole sections
    type: Text  # a QuestionType, or the kind that a gold question states
    question: Text
    reference: str  # empty where a right answer says that the documentation does not cover it
    pair_id: str = ""  # of a generated question
    key_facts: tuple[str, ...] = ()  # what a right answer must hold, word for word
    quote: str = ""  # the evidence
    chunk_id: str = ""  # the chunk that holds the quote: the passage that the system `oracle` sees


class Trained(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A trained question, and its evidence in the document."""

    question: Text
    quote: Text
    start: Offset  # characters into Document.text
    end: Offset


class Passage(Record, frozen=True):
    """A chunk as a release carries it, with the pairs that were trained from it: what the sources of an answer are found in.

    The id is the chunk's. `text` and the quotes hold no secrets.
    """

    path: Text
    heading_path: tuple[str, ...]
    start: Offset  # characters into Document.text
    end: Offset
    text: Text
    trained: tuple[Trained, ...]


class Complaint(Record, frozen=True):
    """An answer that a user rated down, and the place to look. id = the answer's."""

    said_at: Text  # UTC, as 2026-11-23T17:43:05Z
    model: Text  # the version that answered
    comment: str
    question: str  # this and the answer are empty unless the user agreed to have them kept
    answer: str
    chunk_id: (
        str  # what is nearest to the question, or to the comment where there is no question; this and the quote may be empty
    )
    quote: str
    similarity: float
    covered: bool  # False: nothing in the documentation was as near as serve.min_similarity


class Gold(Record, frozen=True):
    """A question that a person wrote, with its evidence. One of the kind `out_of_scope` needs none: the documentation does not cover it."""

    question: Text
    answer: Text
    quote: str  # verbatim from a page, white space folded
    path: str  # of that page
    kind: Text
    key_facts: tuple[str, ...] = ()


class Answer(Record, frozen=True):
    """One system's answer. id = hash(question id, system). `text` may be empty: a model may say nothing."""

    question_id: Text
    system: Text
    text: str
    chunk_ids: tuple[str, ...] = ()  # the passages that the system saw, best first


class Score(Record, frozen=True):
    """One answer's scores. id = the answer's. None: the question has nothing to score that by, which is not a low score."""

    question_id: Text
    set: SetName
    section_id: Text
    type: Text
    system: Text
    similarity: float | None  # cosine of the embeddings of answer and reference, -1 to 1
    rouge_l: float | None  # F-measure, 0 to 1
    key_facts: float | None  # the share of the question's key facts that the answer holds
    evidence: float | None  # the share of the answer's words that stand in the question's quote
    judge: float | None  # the judge's mean rating, where one is configured and has passed its audit
    abstained: float  # 1 where the answer says that it does not know, else 0
    passed: float  # 1 where the answer is right, else 0


Kind = TypeVar("Kind", bound=Record)
MEND = "Nothing was overwritten; mend that line, or take the file back from git"  # for a file that people write


def content_id(*parts: object) -> str:
    """16 hex digits of the SHA-256 over `parts` as JSON; equal content gives an equal id on every machine."""
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()[:16]


def read_records(path: Path, kind: type[Kind], advice: str = "Rebuild it with: dvc repro --force") -> list[Kind]:
    """The records of a .jsonl file in file order; an empty file gives []. Raises BadRecord with file, line, fault and `advice`."""
    decoder = msgspec.json.Decoder(kind)
    records = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                records.append(decoder.decode(line))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise BadRecord(f"{path}:{number}: not a {kind.__name__}: {error}. {advice}") from None
    return records


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Writes `records` sorted by id, whole or not at all, and returns their number. Raises BadRecord for two with one id."""
    ordered = sorted(records, key=lambda record: record.id)
    for one, other in zip(ordered, ordered[1:], strict=False):
        if one.id == other.id:
            raise BadRecord(f"{path}: two records have the id {one.id}; ids must differ")
    with new_file(path) as draft, open(draft, "wb") as lines:
        for record in ordered:
            lines.write(msgspec.json.encode(record) + b"\n")
    return len(ordered)


def by_id(records: Iterable[Kind]) -> dict[str, Kind]:
    """`records` as id -> record."""
    return {record.id: record for record in records}


def evolve(record: Kind, **changes: Any) -> Kind:
    """A copy of `record` with `changes`."""
    return msgspec.structs.replace(record, **changes)
