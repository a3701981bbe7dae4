"""data/exam.jsonl + data/chunks.jsonl -> data/answers/<system>.jsonl: every system answers the same questions.

base and tuned answer alone, with the nearest chunks as passages (base_rag, tuned_rag), and base with the chunk that holds the evidence
(oracle). One rendering of the conversation, greedy decoding, the same token limit for all. They run in transformers, GGUF files in
llama.cpp: the file that is scored is the file that ships. Answers are kept in data/store, so a rerun asks only what changed.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import msgspec

from stages.chats import chat_sha256
from stages.executor import Done, Executor, done_on_ray
from stages.files import new_folder, sha256_of, write_json
from stages.llm import Keep, Reply, Request, Store, ask_missing, request_key
from stages.models import as_hf_folder, load_tokenizer
from stages.params import Chat, Models, Retrieval
from stages.program import BadInput, BadModelFile, LimitBroken, progress, run, say
from stages.records import Answer, Chunk, Question, by_id, content_id, read_records, write_records
from stages.release import ADAPTER_FILE, plain_text
from stages.retrieval import searcher, with_passages
from stages.systems import Asking, System, ask_llama, request_for, requests_for
from stages.systems.greedy import greedy_writer, prompt_of

SYSTEMS: tuple[str, ...] = get_args(System)


def passages_for(
    system: str, questions: Sequence[Question], found: Mapping[str, list[Chunk]], chunks: Mapping[str, Chunk]
) -> dict[str, list[Chunk]]:
    """Question id -> the passages that `system` sees beside it, best first. `oracle` answers only questions whose evidence is in a chunk.

    `found`: question id -> its nearest chunks.
    """
    if system == "oracle":
        return {question.id: [chunks[question.chunk_id]] for question in questions if question.chunk_id}
    return {question.id: found[question.id] if system.endswith("_rag") else [] for question in questions}


def messages_for(
    questions: Sequence[Question], passages: Mapping[str, list[Chunk]], chat: Chat, tokenizer: Any
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Question id -> what the user says, and question id -> the ids of the passages in it, best first.

    A prompt leaves room for the answer in `chat.context_tokens`. Control tokens are broken up, as the server does.
    """
    control_tokens = tuple(sorted(tokenizer.get_added_vocab()))

    def fits(text: str) -> bool:
        prompt = prompt_of(tokenizer, request_for(plain_text(text, control_tokens), chat, ""))
        return len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) + chat.max_new_tokens <= chat.context_tokens

    messages, seen = {}, {}
    for question in questions:
        if question.id in passages:
            given = passages[question.id]
            text, shown = with_passages(question.question, given, fits)
            messages[question.id] = plain_text(text, control_tokens)
            seen[question.id] = tuple(chunk.id for chunk in given[:shown])
    return messages, seen


def batches(lengths: Mapping[str, int], batch_tokens: int) -> list[list[str]]:
    """The keys of `lengths` from the shortest to the longest, parted so that keys times the longest length are `batch_tokens` at most."""
    parts: list[list[str]] = []
    for key in sorted(lengths, key=lambda key: (lengths[key], key)):
        if parts and (len(parts[-1]) + 1) * lengths[key] <= batch_tokens:
            parts[-1].append(key)
        else:
            parts.append([key])
    return parts


def write_with_transformers(
    folder: Path,
    sha256: str,
    tokenizer: Any,
    batch_tokens: int,
    executor: Executor,
    system: str,
    requests: Mapping[str, Request],
    keep: Keep,
) -> float:
    """Keeps a greedy reply to each request by the model in `folder`, in batches of similar length, `batch_tokens` at most or one prompt.

    The batches are made here, wherever `executor` has them answered. Gives the seconds that it took, without the start of a model here.
    """
    lengths = {
        key: len(tokenizer(prompt_of(tokenizer, request), add_special_tokens=False)["input_ids"]) + request.max_tokens
        for key, request in requests.items()
    }
    parts = batches(lengths, batch_tokens)
    units = {str(place): msgspec.json.encode([requests[key] for key in keys]) for place, keys in enumerate(parts)}
    if executor.engine == "ray":
        started = time.monotonic()
        arriving = done_on_ray(executor, units, greedy_writer, (str(folder), sha256), at_once=1, has_model=True)
    else:
        write = greedy_writer(str(folder))
        started = time.monotonic()
        arriving = (Done(name, write(unit)) for name, unit in units.items())
    for done in progress(arriving, f"answer {system}", total=len(units), unit="batch"):
        keys = parts[int(done.name)]
        replies = (
            [Reply(text="", failed=done.failed)] * len(keys)
            if done.failed
            else msgspec.json.decode(done.result, type=list[Reply])
        )
        for key, reply in zip(keys, replies, strict=True):
            keep(key, reply)
    return time.monotonic() - started


def main(
    exam: Path,
    chunks: Path,
    merged: Path,
    gguf: Path,
    store: Path,
    answers: Path,
    metrics: Path,
    *,
    answer: Asking,
    retrieval: Retrieval,
    chat: Chat,
    models: Models,
    executor: Executor,
) -> None:
    asked = read_records(exam, Question)
    if not asked:
        raise BadInput(f"{exam} holds no question; see reports/metrics/split.json")
    files = [path for path in sorted(gguf.glob("*.gguf")) if path.name != ADAPTER_FILE]
    quants = {path.stem.removeprefix("docsmith-"): path for path in files}
    if not quants:
        raise BadInput(f"{gguf} holds no .gguf file. Build it with: dvc repro export")
    base = as_hf_folder(models.base)
    tokenizer = load_tokenizer(merged)
    if load_tokenizer(base).chat_template != tokenizer.chat_template:
        raise BadModelFile(f"{merged} has another chat template than models.base; rebuild it with: dvc repro --force export")
    wanted = [system for system in SYSTEMS if system in ("base", "tuned", *answer.systems)]
    paths = {system: merged if system.startswith("tuned") else base for system in wanted} | quants
    every = by_id(read_records(chunks, Chunk))
    found = (
        nearest(asked, every, retrieval.top_k, models.embedder, store, executor)
        if any(one.endswith("_rag") for one in wanted)
        else {}
    )
    kept = Store(store, "answer")
    rows: dict[str, list[Answer]] = {}
    systems: dict[str, dict[str, Any]] = {}
    for system, path in paths.items():
        model_sha256 = sha256_of(path)
        messages, seen = messages_for(asked, passages_for(system, asked, found, every), chat, tokenizer)
        requests = requests_for(messages, chat, model_sha256)
        keyed = {request_key(request): request for request in requests.values()}
        if system in quants:
            replies, tally = ask_llama(path, keyed, kept, chat, answer, executor)
        else:
            write = partial(write_with_transformers, path, model_sha256, tokenizer, answer.batch_tokens, executor, system)
            replies, tally = ask_missing(keyed, kept, write)
        if tally.failed:
            reason = next(reply.failed for reply in replies.values() if reply.failed)
            raise LimitBroken(
                f"{system}: {tally.failed} of {tally.requests} questions got no answer ({reason}); the others are kept. Resume with: dvc repro"
            )
        rows[system] = [
            Answer(
                id=content_id(question_id, system),
                question_id=question_id,
                system=system,
                text=replies[request_key(request)].text.strip(),
                chunk_ids=seen[question_id],
            )
            for question_id, request in requests.items()
        ]
        systems[system] = speed(len(requests), tally.answered, tally.new_tokens, tally.seconds) | {"sha256": model_sha256}
    kept.close()
    with new_folder(answers) as draft:
        for system, found_answers in rows.items():
            write_records(draft / f"{system}.jsonl", found_answers)
    sums = {
        "chat_sha256": chat_sha256(tokenizer.chat_template, chat.system_prompt),
        "questions_sha256": sha256_of(exam),
    }
    write_json(metrics, {"systems": systems} | sums)
    say(f"answer: {len(asked)} questions to {', '.join(rows)}")


def nearest(
    questions: Sequence[Question], chunks: Mapping[str, Chunk], top_k: int, embedder: str, store: Path, executor: Executor
) -> dict[str, list[Chunk]]:
    """Question id -> the `top_k` of `chunks` nearest to the question, best first."""
    found = searcher(list(chunks.values()), embedder, store, executor)([question.question for question in questions], top_k)
    return {question.id: [chunks[hit.chunk_id] for hit in hits] for question, hits in zip(questions, found, strict=True)}


def speed(questions: int, new: int, tokens: int, seconds: float) -> dict[str, float | int | None]:
    """What the metrics say of one system; the rate is null when every answer was kept from an earlier run."""
    return {
        "questions": questions,
        "new": new,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_s": round(tokens / seconds, 1) if new else None,
    }


if __name__ == "__main__":
    run(main)
