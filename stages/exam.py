"""data/questions.jsonl + data/chunks.jsonl + exam.gold -> data/exam.jsonl + reports/metrics/exam.json: every question that is scored.

The recall and held-out questions of `split`, the gold questions that people wrote, general conversations that were never trained, and
questions of out_of_scope.yaml that the documentation does not cover, as far as embeddings tell. Costs seconds.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import msgspec

from stages.evidence import fold
from stages.executor import Executor
from stages.files import write_json
from stages.general import read_general
from stages.params import Count, Models, Share
from stages.program import BadRecord, run, say
from stages.records import MEND, Chunk, Gold, Question, SetName, Text, content_id, read_records, write_records
from stages.retrieval import searcher

OUT_OF_SCOPE = Path(__file__).with_name("out_of_scope.yaml")
SHOWN = 5  # ids in one line


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    gold: Text  # a .jsonl file, which may be empty
    max_general: Count
    max_out_of_scope: Count
    max_similarity: Share  # of an out-of-scope question and the chunk nearest to it


def read_gold(path: Path) -> list[Gold]:
    """The gold questions in file order. Raises BadRecord, with the line, for one that is none or that has the id of an earlier one."""
    found = read_records(path, Gold, MEND)
    lines: dict[str, int] = {}
    for number, one in enumerate(found, start=1):
        if (first := lines.setdefault(one.id, number)) != number:
            raise BadRecord(f"{path}:{number}: the id {one.id} is that of line {first}; ids must differ. {MEND}")
    return found


def gold_questions(gold: Sequence[Gold], chunks: Sequence[Chunk]) -> tuple[list[Question], list[str]]:
    """A question for each one of `gold`, and the ids of those whose quote no chunk holds.

    Those of the kind `out_of_scope` are of that set. The chunk is the first by id that holds the quote, of the gold question's page
    where one does. Without a chunk, the page takes the section's place.
    """
    texts = [(chunk, fold(chunk.text)) for chunk in sorted(chunks, key=lambda chunk: chunk.id)]
    questions, lost = [], []
    for one in gold:
        id = content_id("gold", one.id, one.question)
        if one.kind == "out_of_scope":
            questions.append(_unanswerable(id, "gold", one.question))
            continue
        quote = fold(one.quote)
        holders = [chunk for chunk, text in texts if quote and quote in text]
        chunk = min(holders, key=lambda chunk: chunk.path != one.path, default=None)
        lost += [] if chunk else [one.id]
        questions.append(
            Question(
                id=id,
                set="gold",
                section_id=chunk.section_id if chunk else content_id(one.path) if one.path else id,
                type=one.kind,
                question=one.question,
                reference=one.answer,
                key_facts=one.key_facts,
                quote=one.quote,
                chunk_id=chunk.id if chunk else "",
            )
        )
    return questions, lost


def general_questions(wanted: int) -> list[Question]:
    """`wanted` of the general conversations that are never trained, or all; more add to what fewer chose."""
    known = [(content_id("general", one.question), one) for one in read_general() if one.set == "test"]
    return [
        Question(id=id, set="general", section_id=id, type="general", question=one.question, reference=one.answer)
        for id, one in sorted(known, key=lambda pair: pair[0])[:wanted]
    ]


def read_out_of_scope() -> list[Question]:
    """The questions of out_of_scope.yaml, each with its group there as type, in the order of their ids."""
    import yaml

    groups = msgspec.convert(yaml.safe_load(OUT_OF_SCOPE.read_text(encoding="utf-8")), dict[Text, list[Text]])
    found = [_unanswerable(content_id("out_of_scope", text), group, text) for group, texts in groups.items() for text in texts]
    return sorted(found, key=lambda question: question.id)


def _unanswerable(id: str, type: str, question: str) -> Question:
    return Question(id=id, set="out_of_scope", section_id=id, type=type, question=question, reference="")


def main(
    questions: Path,
    chunks: Path,
    store: Path,
    exam_file: Path,
    metrics: Path,
    *,
    exam: Params,
    models: Models,
    executor: Executor,
) -> None:
    every = read_records(chunks, Chunk)
    gold, lost = gold_questions(read_gold(Path(exam.gold)), every)
    strange = read_out_of_scope()
    hits = searcher(every, models.embedder, store, executor)([question.question for question in strange], 1)
    covered = {one.id for one, found in zip(strange, hits, strict=True) if found and found[0].cosine >= exam.max_similarity}
    asked = read_records(questions, Question) + gold + general_questions(exam.max_general)
    asked += [question for question in strange if question.id not in covered][: exam.max_out_of_scope]
    write_records(exam_file, asked)
    counted = Counter(question.set for question in asked)
    sets = {name: counted[name] for name in get_args(SetName)}
    write_json(
        metrics,
        {
            "questions": len(asked),
            "sets": sets,
            "with_evidence": sum(bool(question.chunk_id) for question in asked),
            "with_key_facts": sum(bool(question.key_facts) for question in asked),
            "gold_quotes_not_found": len(lost),
            "out_of_scope_covered": len(covered),
        },
    )
    parts = " + ".join(f"{count} {name.replace('_', ' ')}" for name, count in sets.items() if count)
    missing = f"; no chunk holds the quotes of {len(lost)} gold questions: {', '.join(lost[:SHOWN])}" if lost else ""
    more = ", …" if len(lost) > SHOWN else ""
    say(
        f"exam: {len(asked)} questions = {parts}; {len(covered)} out of scope left out, as the documents may cover them{missing}{more}"
    )


if __name__ == "__main__":
    run(main)
