"""adapter -> merged model (safetensors), GGUF files of which the smallest that is good enough ships, and what belongs to them.

Costs, for 135M parameters on two cores: a minute and 2 GB of memory; three to four times the model's fp32 size on disk while it runs.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from stages.chats import chat_sha256, tokens_and_mask, with_system
from stages.chats.template import check_template
from stages.files import new_folder, sha256_of, sha256_of_file, write_json, write_text
from stages.models.gguf import read_gguf
from stages.models.memory import is_out_of_memory, short_of_memory
from stages.pages import template
from stages.params import Chat, Models, NonNegative, Share
from stages.program import BadInput, BadModelFile, BadParams, LimitBroken, OutOfMemory, run, say
from stages.records import Chunk, Example, Message, Pair, Passage, Question, Trained, read_records, write_records
from stages.release import ADAPTER_FILE, CARD_FILE, SOURCES_FILE, Release, ask, embedded_template, gguf_name, write_release
from stages.release.divergence import Divergence, Text
from stages.screening import redacted, secrets_in

Quant = Literal["q8_0", "q4_k_m", "q5_k_m", "q6_k", "f16"]
CLOSEST = ("f16", "q8_0")
MAX_HELD_OUT_TOKENS = 2_000  # some 900 positions: a mean KL of 0.010 is known to 0.001
MAX_IMPORTANCE_TOKENS = 16_000
MAX_LOGIT_DIFFERENCE = 0.05  # of merged and adapter, both in fp32, which rounding moves by less than 0.001


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`max_kl` and `min_same_top` are what a file must keep to be shipped, against the model in bf16."""

    quants: tuple[Quant, ...]
    max_kl: NonNegative  # mean divergence of the next token, in nats
    min_same_top: Share  # share of positions with the same most likely token
    importance_matrix: bool


class Quality(msgspec.Struct, frozen=True):
    """A GGUF file: its size, and how far it is from the model in bf16."""

    quant: str
    bytes: int
    sha256: str
    mean_kl: float
    same_top: float
    passes: bool


def main(data: Path, adapter: Path, merged: Path, gguf: Path, metrics: Path, export: Params, models: Models, chat: Chat) -> None:
    from stages.models import as_hf_folder, free_cores, load_tokenizer, model_sha256

    check_params(export, chat)
    check_adapter(adapter)
    base = as_hf_folder(models.base)
    tokenizer = load_tokenizer(base)
    check_template(tokenizer.chat_template, models.base)
    examples, questions = read_records(data / "train.jsonl", Example), read_records(data / "questions.jsonl", Question)
    sources = passages(read_records(data / "chunks.jsonl", Chunk), read_records(data / "pairs.jsonl", Pair), examples)
    measured_on, texts = held_out_texts(questions, tokenizer, chat)
    seconds = {}

    started = time.monotonic()
    with new_folder(merged) as draft, short_of_memory(merge_advice(base)):
        difference, logits, compare_s = merge(base, adapter, draft, texts[0].ids)
        tokenizer.save_pretrained(draft)
    seconds["merge"] = round(time.monotonic() - started - compare_s, 1)
    seconds["compare"] = round(compare_s, 1)

    with new_folder(gguf) as draft, tempfile.TemporaryDirectory(dir=gguf.parent, prefix=".export-") as folder:
        started = time.monotonic()
        whole = Path(folder) / "bf16.gguf"
        convert(merged, whole, adapter, draft / ADAPTER_FILE)
        seconds["convert"] = round(time.monotonic() - started, 1)

        started = time.monotonic()
        matrix = None
        if export.importance_matrix:
            matrix = Path(folder) / "importance.npz"
            save_importance(merged, whole, matrix, [ids for ids, _ in conversations(examples, tokenizer, chat)])
        for quant in export.quants:
            quantise(whole, draft / gguf_name(quant), quant, free_cores(), matrix)
        seconds["quantise"] = round(time.monotonic() - started, 1)

        started = time.monotonic()
        files: dict[str, Path] = {quant: draft / gguf_name(quant) for quant in export.quants}
        distances = measure(whole, files, texts, logits, free_cores())
        qualities = {quant: quality(quant, file, distances[quant], export) for quant, file in files.items()}
        check_conversion(distances["bf16"], export)
        shipped = smallest_that_passes(qualities, export)
        seconds["measure"] = round(time.monotonic() - started, 1)

        started = time.monotonic()
        for file in files.values():
            read_gguf(file)
            check_answers(file, tokenizer.chat_template, chat)
        seconds["check"] = round(time.monotonic() - started, 1)
        release = Release(
            base=models.base,
            base_sha256=model_sha256(models.base),
            adapter_sha256=sha256_of(adapter),
            chat_sha256=chat_sha256(tokenizer.chat_template, chat.system_prompt),
            system_prompt=chat.system_prompt,
            control_tokens=tuple(sorted(tokenizer.get_added_vocab())),
            quants=export.quants,
            serve=shipped.quant,
            context_tokens=chat.context_tokens,
            max_new_tokens=chat.max_new_tokens,
        )
        write_text(draft / "Modelfile", modelfile(gguf_name(shipped.quant), tokenizer, chat))
        write_records(draft / SOURCES_FILE, sources)
        trained_on = (len(examples), sha256_of_file(data / "train.jsonl"))
        card = {"distance": distances[shipped.quant], "measured_on": measured_on, "trained_on": trained_on}
        write_text(draft / CARD_FILE, model_card(release, qualities, export, stated_licence(models.base), card))
        write_release(draft, release)

    lineage = {"base_sha256": release.base_sha256, "merged_sha256": sha256_of(merged), "chat_sha256": release.chat_sha256}
    distance = {
        "positions": distances[shipped.quant].positions,
        "measured_on": measured_on,
        "merge_max_logit_difference": difference,
        "convert_mean_kl": distances["bf16"].mean_kl,
    }
    figures = {"files": {gguf_name(quant): one for quant, one in qualities.items()}, "serve": shipped.quant, "seconds": seconds}
    write_json(metrics, figures | distance | {"peak_memory_mb": peak_memory_mb()} | lineage)
    sizes = ", ".join(f"{one.quant} {one.bytes / 1e6:.1f} MB (KL {one.mean_kl:.4f})" for one in qualities.values())
    say(f"export: {sizes} -> {gguf}; {shipped.quant} ships")


def check_params(export: Params, chat: Chat) -> None:
    """Raises BadParams for settings that cannot be exported."""
    if not export.quants:
        raise BadParams("params.yaml: export.quants names no format; q8_0 is a sane one")
    if len(set(export.quants)) < len(export.quants):
        raise BadParams(f"params.yaml: export.quants names a format twice: {', '.join(export.quants)}")
    if '"""' in chat.system_prompt:
        raise BadParams('params.yaml: chat.system_prompt holds """, which a Modelfile cannot')


def passages(chunks: Sequence[Chunk], pairs: Sequence[Pair], examples: Sequence[Example]) -> list[Passage]:
    """Every chunk with the pairs that were trained from it, in the order of the document; secrets are marked, not shown."""
    trained_ids = {pair_id for example in examples for pair_id in example.pair_ids}
    of_chunk: dict[str, list[Trained]] = {}
    for pair in sorted(pairs, key=lambda pair: (pair.quote_start, pair.id)):
        if pair.id in trained_ids:
            trained = Trained(without_secrets(pair.question), without_secrets(pair.quote), pair.quote_start, pair.quote_end)
            of_chunk.setdefault(pair.chunk_id, []).append(trained)
    return [
        Passage(
            id=chunk.id,
            path=chunk.path,
            heading_path=tuple(map(without_secrets, chunk.heading_path)),
            start=chunk.start,
            end=chunk.end,
            text=without_secrets(chunk.text),
            trained=tuple(of_chunk.get(chunk.id, ())),
        )
        for chunk in chunks
    ]


def without_secrets(text: str) -> str:
    return redacted(text, secrets_in(text))


def conversations(examples: Sequence[Example], tokenizer: Any, chat: Chat) -> list[tuple[list[int], list[int]]]:
    """Token ids and mask of each of `examples`, in the order of their ids: one that has nothing to do with their subjects."""
    return [
        tokens_and_mask(tokenizer, with_system(chat.system_prompt, one.messages))
        for one in sorted(examples, key=lambda one: one.id)
    ]


def held_out_texts(questions: Sequence[Question], tokenizer: Any, chat: Chat) -> tuple[str, list[Text]]:
    """The set that files are measured on, and its questions with their answers in chat form, up to MAX_HELD_OUT_TOKENS, shortest first.

    Those of sections that were never trained, since a trained answer is known by heart and hides what quantisation loses; of answers
    in chat form, since that is what users get. Where no section was held out, those that word trained facts anew. Raises BadInput.
    """
    for name in ("held_out", "recall"):
        asked = sorted((one for one in questions if one.set == name), key=lambda one: one.id)
        texts: list[Text] = []
        for one in asked:
            turns = [Message(role="user", content=one.question), Message(role="assistant", content=one.reference)]
            ids, mask = tokens_and_mask(tokenizer, with_system(chat.system_prompt, turns))
            end = len(mask) - mask[::-1].index(1)
            if sum(len(text.ids) for text in texts) + end <= MAX_HELD_OUT_TOKENS:
                texts.append(Text(tuple(ids[:end]), mask.index(1)))
        if texts:
            return name, sorted(texts, key=lambda text: len(text.ids))
    raise BadInput("data/questions.jsonl holds no questions, on which the files could be measured; raise split.held_out_share")


def check_adapter(adapter: Path) -> None:
    """Raises BadModelFile unless `adapter` is a PEFT folder whose LoRA weights are finite and were trained."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    retrain = "train it again with: dvc repro --force train"
    weights_file = adapter / "adapter_model.safetensors"
    for path in (adapter / "adapter_config.json", weights_file):
        if not path.is_file():
            raise BadModelFile(f"{path} is missing (pickled weights are refused); {retrain}")
    try:
        weights = load_file(weights_file)
    except SafetensorError as error:
        raise BadModelFile(f"{weights_file} is damaged: {error}; {retrain}") from None
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise BadModelFile(f"{weights_file}: {name} has NaN or infinite weights; lower train.learning_rate and {retrain}")
    if not any(weight.any() for name, weight in weights.items() if "lora_B" in name):
        raise BadModelFile(f"{weights_file}: every lora_B weight is zero, so it changes nothing; {retrain}")


def merge(base: Path, adapter: Path, folder: Path, ids: Sequence[int]) -> tuple[float, Any, float]:
    """Writes the base model with the adapter added to its weights: added in fp32, saved as bf16 safetensors.

    Gives the largest difference between the logits of the adapted and of the merged model on the tokens `ids`, those of the merged
    one, of the shape (tokens, words), and the seconds that both took. Raises BadModelFile when the adapter's weights do not fit the base, one by one, or when
    merging changes what the model says.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    if getattr(model, "is_quantized", False):
        model = model.dequantize()  # adding to 4-bit weights would round the adapter away
    try:
        tuned: Any = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        raise BadModelFile(f"{adapter} does not fit models.base: {' '.join(str(error).split())[:300]}") from None
    with safe_open(adapter / "adapter_model.safetensors", "pt") as saved:
        left_over = set(saved.keys()) ^ set(get_peft_model_state_dict(tuned))
    if left_over:  # PEFT only warns
        raise BadModelFile(
            f"{adapter} does not fit models.base: {len(left_over)} weights have no counterpart, as {min(left_over)}"
        )
    given = torch.tensor([list(ids)])
    with torch.no_grad():
        times = [time.monotonic()]
        of_adapter = tuned(given).logits[0]
        times.append(time.monotonic())
        whole = tuned.merge_and_unload()
        times.append(time.monotonic())
        of_merged = whole(given).logits[0]
    difference = check_merge(of_adapter, of_merged)
    compare_s = time.monotonic() - times[2] + times[1] - times[0]
    whole = whole.to(torch.bfloat16)
    whole.config.dtype = torch.bfloat16
    whole.save_pretrained(folder)
    return difference, of_merged.numpy(), compare_s


def check_merge(of_adapter: Any, of_merged: Any) -> float:
    """The largest difference between two arrays of logits. Raises BadModelFile when it is more than rounding."""
    difference = float((of_adapter - of_merged).abs().max())
    if not difference <= MAX_LOGIT_DIFFERENCE:  # NaN is not
        raise BadModelFile(
            f"the merged model's logits differ from the adapter's by {difference:.3g}, and rounding explains {MAX_LOGIT_DIFFERENCE}; "
            "nothing was exported. Train it again with: dvc repro --force train"
        )
    return round(difference, 6)


def merge_advice(base: Path) -> str:
    """What to do when memory does not hold the merge: the weights in fp32, and a copy of them in bf16."""
    with_copy = 3 * sum(path.stat().st_size for path in base.glob("*.safetensors"))  # which are in 16 bits
    return f"export needs about {with_copy / 1e9:.1f} GB; free memory, or choose a smaller models.base. Then: dvc repro"


def convert(merged: Path, target: Path, adapter: Path, adapter_target: Path) -> None:
    """Writes the model in `merged` as one bf16 GGUF file, and the adapter alone as another."""
    _run_module("stages.release.convert", str(merged), str(target), str(adapter), str(adapter_target))


def save_importance(merged: Path, whole: Path, target: Path, texts: Sequence[Sequence[int]]) -> None:
    """Writes the importance matrix of the model over `texts`, as far as MAX_IMPORTANCE_TOKENS, to the .npz file `target`."""
    import numpy as np

    from stages.release.importance import importance

    used: list[Sequence[int]] = []
    for ids in texts:
        if sum(map(len, used)) + len(ids) <= MAX_IMPORTANCE_TOKENS:
            used.append(ids)
    np.savez(target, **importance(merged, used, read_gguf(whole).values["general.architecture"]))


def quantise(source: Path, target: Path, quant: str, threads: int, matrix: Path | None = None) -> None:
    """Writes `source`, a bf16 GGUF file, in the format `quant`; more precisely where `matrix`, if any, says that it matters."""
    options = [str(matrix)] if matrix else []
    _run_module("stages.release.quantise", str(source), str(target), quant, str(threads), *options)


def measure(whole: Path, files: Mapping[str, Path], texts: Sequence[Text], logits: Any, threads: int) -> dict[str, Divergence]:
    """How far each of `files` is from `whole`, by quant, and as "bf16" how far `whole` is from `logits`, of the first text."""
    import numpy as np

    given, figures = whole.with_name("texts.json"), whole.with_name("figures.json")
    write_json(given, texts)
    np.save(given.with_suffix(".npy"), logits)
    paths = [str(path) for path in (given, figures)]
    _run_module("stages.release.divergence", *paths, str(threads), str(whole), *map(str, files.values()))
    found = json.loads(figures.read_text(encoding="utf-8"))
    return {quant: Divergence(*found[path.stem]) for quant, path in {"bf16": whole, **files}.items()}


def quality(quant: str, file: Path, distance: Divergence, export: Params) -> Quality:
    """What is known of a GGUF file. It passes when it keeps both limits of `export`; NaN keeps none."""
    return Quality(
        quant=quant,
        bytes=file.stat().st_size,
        sha256=sha256_of_file(file),
        mean_kl=round(distance.mean_kl, 6),
        same_top=round(distance.same_top, 6),
        passes=distance.mean_kl <= export.max_kl and distance.same_top >= export.min_same_top,
    )


def check_conversion(distance: Divergence, export: Params) -> None:
    """Raises BadModelFile when the bf16 file is not the merged model: then nothing measured against it means anything."""
    if not distance.mean_kl <= export.max_kl:
        raise BadModelFile(
            f"the GGUF file in bf16 is {distance.mean_kl:.3g} (mean KL) from the merged model, and export.max_kl is {export.max_kl}; "
            "nothing was exported. The converter may not know this architecture: choose another models.base"
        )


def smallest_that_passes(qualities: Mapping[str, Quality], export: Params) -> Quality:
    """The smallest file that passes. Raises LimitBroken when none does."""
    passing = [one for one in qualities.values() if one.passes]
    if passing:
        return min(passing, key=lambda one: (one.bytes, one.mean_kl))
    reached = ", ".join(f"{one.quant} {one.mean_kl:.4f} and {one.same_top:.3f}" for one in qualities.values())
    missing = [quant for quant in CLOSEST if quant not in qualities]
    advice = f"Add {' or '.join(missing)} to export.quants" if missing else "Raise export.max_kl or lower export.min_same_top"
    raise LimitBroken(
        f"no file is close enough to bf16 (mean KL at most {export.max_kl}, same top token at least {export.min_same_top}): "
        f"{reached}. {advice} in params.yaml; nothing was exported"
    )


def stated_licence(reference: str) -> str:
    """The licence that the model's own file or page states; "" where it states none."""
    from stages.models import find_model

    path = find_model(reference)
    if path.suffix == ".gguf":
        return str(read_gguf(path).values.get("general.license", ""))
    page = path / "README.md"
    found = (
        re.match(r"---\n.*?^license: *([\w.-]+)", page.read_text(encoding="utf-8", errors="replace"), re.S | re.M)
        if page.is_file()
        else None
    )
    return found[1] if found else ""


def model_card(release: Release, qualities: Mapping[str, Quality], export: Params, licence: str, more: Mapping[str, Any]) -> str:
    """README.md of the release: what it is made of, how good each file is, how to run it."""
    rows = [
        (
            gguf_name(one.quant),
            f"{one.bytes / 1e6:,.1f} MB",
            f"{one.mean_kl:.4f}",
            f"{one.same_top:.1%}",
            "ships" if one.quant == release.serve else "passes" if one.passes else "fails",
        )
        for one in qualities.values()
    ]
    shipped = gguf_name(release.serve)
    return str(
        template("model_card.md.jinja").render(
            release=release, rows=rows, export=export, licence=licence, shipped=shipped, **more
        )
    )


def _run_module(name: str, *arguments: str) -> None:
    """Runs `python -m name` quietly, to its end. Raises BadModelFile with its last line, or the signal that crashed it, and OutOfMemory."""
    from stages.program import end_with_parent

    done = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=end_with_parent,
    )
    if done.returncode == 0:
        return
    lines = done.stdout.decode(errors="replace").split("\n")
    end = f"crashed ({signal.Signals(-done.returncode).name})" if done.returncode < 0 else f"failed ({done.returncode})"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    if is_out_of_memory(last):
        raise OutOfMemory(
            f"{name}: out of memory on {arguments[0]}; free memory, or choose a smaller models.base. Then: dvc repro"
        )
    raise BadModelFile(f"{name} {end} on {arguments[0]}: {last[-300:]}")


def check_answers(gguf: Path, chat_template: str, chat: Chat) -> None:
    """Raises BadModelFile unless llama.cpp loads `gguf`, uses `chat_template`, and says something."""
    from stages.llm.llama_cpp import llama_server

    messages = [{"role": "system", "content": chat.system_prompt}, {"role": "user", "content": "What is this about?"}]
    with llama_server(gguf, chat.context_tokens, parallel=1) as endpoint:
        if embedded_template(endpoint) != chat_template:
            raise BadModelFile(f"{gguf.name}: its chat template is not the base model's; nothing was exported")
        reply = ask(endpoint, "/v1/chat/completions", {"messages": messages, "max_tokens": 8, "temperature": 0})
    if not reply["choices"][0]["message"]["content"].strip():
        raise BadModelFile(f"{gguf.name}: it has nothing to say to {messages[1]['content']!r}; nothing was exported")


def modelfile(gguf: str, tokenizer: Any, chat: Chat) -> str:
    """Ollama's Modelfile for the file `gguf` beside it.

    Without a TEMPLATE, Ollama guesses: it takes the nearest of the templates that it knows, and none when none is near. So the
    chat template is written out in Go, unless it does more than frame each message.
    """
    template = go_template(tokenizer, chat.system_prompt)
    lines = [
        f"FROM ./{gguf}",
        f'TEMPLATE """{template}"""' if template else "# no TEMPLATE: the chat template is not one that Go templates can copy",
        f'SYSTEM """{chat.system_prompt}"""',
        f"PARAMETER num_ctx {chat.context_tokens}",
        f"PARAMETER num_predict {chat.max_new_tokens}",
        "PARAMETER temperature 0",
        f"PARAMETER stop {json.dumps(tokenizer.eos_token)}",
    ]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: Any, system_prompt: str) -> str:
    """The chat template as a Go template over .Messages; "" when framing each message by its role does not give the same text."""
    marks = {"system": system_prompt, "user": "\x01", "assistant": "\x02"}
    turns = ("system", "user", "assistant", "user", "assistant", "user")
    rendered = _render(tokenizer, [{"role": role, "content": marks[role]} for role in turns])
    ends = _frames(tokenizer, marks)
    copied = "".join(ends[role][0] + marks[role] + ends[role][1] for role in turns) + ends["reply"][0]
    if copied != rendered:
        return ""
    start = ends["system"][0]
    if tokenizer("")["input_ids"] == [tokenizer.bos_token_id]:  # Ollama adds this token itself
        start = start.removeprefix(tokenizer.bos_token)
    system, user, assistant = (
        f"{before}{{{{ .Content }}}}{after}" for before, after in ((start, ends["system"][1]), ends["user"], ends["assistant"])
    )
    return (
        f'{{{{ range .Messages }}}}{{{{ if eq .Role "system" }}}}{system}{{{{ else if eq .Role "user" }}}}{user}'
        f"{{{{ else }}}}{assistant}{{{{ end }}}}{{{{ end }}}}{ends['reply'][0]}"
    )


def _frames(tokenizer: Any, marks: dict[str, str]) -> dict[str, tuple[str, str]]:
    """What the chat template puts before and after a message of each role, and before a `reply`."""
    frames, seen = {}, ""
    conversation: list[dict[str, str]] = []
    for role in ("system", "user", "assistant"):
        conversation.append({"role": role, "content": marks[role]})
        text = _render(tokenizer, conversation, is_prompt=False)
        before, _, after = text.removeprefix(seen).partition(marks[role])
        frames[role] = (before, after)
        seen = text
    frames["reply"] = (_render(tokenizer, conversation).removeprefix(seen), "")
    return frames


def _render(tokenizer: Any, conversation: list[dict[str, str]], is_prompt: bool = True) -> str:
    return str(tokenizer.apply_chat_template(conversation, add_generation_prompt=is_prompt, tokenize=False))


def peak_memory_mb() -> int:
    """The most memory that this process or one of its children held, in MB (10^6 bytes)."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024 // 10**6


if __name__ == "__main__":
    run(main)
