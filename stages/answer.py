"""data/questions.jsonl -> data/answers/<system>.jsonl: base, tuned and each GGUF file answer the same questions.

One rendering of the conversation, greedy decoding, the same token limit for all. base and tuned run in transformers, GGUF files in
llama.cpp: the file that is scored is the file that ships. Answers are kept in data/store, so a rerun asks only what changed.
"""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from stages.files import new_folder, sha256_of, write_json
from stages.llm import Keep, Reply, Request, Store, ask_missing, request_key
from stages.models import as_hf_folder, free_cores, load_tokenizer
from stages.params import Chat, Models
from stages.program import BadInput, LimitBroken, progress, run, say
from stages.records import Answer, Question, content_id, read_records, write_records
from stages.systems import Asking, ask_llama, requests_for


def write_with_transformers(folder: Path, batch_size: int, requests: Mapping[str, Request], keep: Keep) -> float:
    """Keeps a greedy reply to each request by the model in `folder`, in batches of prompts of similar length.

    Gives the seconds that it took, without the model's start.
    """
    import torch
    from transformers import AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(free_cores())
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"  # the answer follows the prompt directly
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=False, use_safetensors=True, device_map="cuda" if on_gpu else "cpu"
    ).eval()
    prompts = {key: _prompt(tokenizer, request) for key, request in requests.items()}
    order = sorted(prompts, key=lambda key: (len(prompts[key]), key))
    started = time.monotonic()
    for start in progress(range(0, len(order), batch_size), f"answer {folder.name}", unit="batch"):
        keys = order[start : start + batch_size]
        batch = tokenizer([prompts[key] for key in keys], return_tensors="pt", padding=True, add_special_tokens=False).to(
            model.device
        )
        limit = requests[keys[0]].max_tokens
        with torch.inference_mode():
            tokens = model.generate(**batch, max_new_tokens=limit, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        for key, row in zip(keys, tokens[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            length = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            text = tokenizer.decode(row[:length], skip_special_tokens=True)
            keep(key, Reply(text=text.strip(), tokens=length, is_whole=length < limit))
    return time.monotonic() - started


def _prompt(tokenizer: Any, request: Request) -> str:
    conversation = [{"role": role, "content": content} for role, content in request.messages]
    return str(tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False))


def main(
    questions: Path,
    merged: Path,
    gguf: Path,
    store: Path,
    answers: Path,
    metrics: Path,
    *,
    answer: Asking,
    chat: Chat,
    models: Models,
) -> None:
    asked = read_records(questions, Question)
    if not asked:
        raise BadInput(f"{questions} holds no question; see reports/metrics/split.json")
    quants = {path.stem.removeprefix("docsmith-"): path for path in sorted(gguf.glob("*.gguf"))}
    if not quants:
        raise BadInput(f"{gguf} holds no .gguf file. Build it with: dvc repro export")
    kept = Store(store, "answer")
    replies: dict[str, dict[str, Reply]] = {}
    speeds: dict[str, dict[str, float | int | None]] = {}
    for system, path in {"base": as_hf_folder(models.base), "tuned": merged, **quants}.items():
        requests = requests_for({question.id: question.question for question in asked}, chat, sha256_of(path))
        keyed = {request_key(request): request for request in requests.values()}
        if system in quants:
            found, tally = ask_llama(path, keyed, kept, chat, answer)
        else:
            found, tally = ask_missing(keyed, kept, partial(write_with_transformers, path, answer.batch_size))
        if tally.failed:
            reason = next(reply.failed for reply in found.values() if reply.failed)
            raise LimitBroken(
                f"{system}: {tally.failed} of {tally.requests} questions got no answer ({reason}); the others are kept. Resume with: dvc repro"
            )
        replies[system] = {question_id: found[request_key(request)] for question_id, request in requests.items()}
        speeds[system] = speed(len(asked), tally.answered, tally.new_tokens, tally.seconds)
    kept.close()
    with new_folder(answers) as draft:
        for system, by_question in replies.items():
            rows = [
                Answer(id=content_id(question_id, system), question_id=question_id, system=system, text=reply.text.strip())
                for question_id, reply in by_question.items()
            ]
            write_records(draft / f"{system}.jsonl", rows)
    write_json(metrics, {"systems": speeds})
    say(f"answer: {len(asked)} questions to {', '.join(replies)}")


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
