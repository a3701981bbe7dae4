"""Greedy answers by a model in transformers, a batch at a time."""

from pathlib import Path
from typing import Any

import msgspec

from stages.executor import Work
from stages.files import sha256_of
from stages.llm import Reply, Request
from stages.models import free_cores, load_tokenizer
from stages.program.errors import BadModelFile


def greedy_writer(folder: str, expected_sha256: str = "") -> Work:
    """Work that turns a JSON list of requests, one batch, into a JSON list of the replies by the model in `folder`.

    Raises BadModelFile where the folder is not there, or holds another model than the one with the hash `expected_sha256`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if expected_sha256 and (not Path(folder).is_dir() or sha256_of(Path(folder)) != expected_sha256):
        raise BadModelFile(
            f"{folder} is missing here, or another model than where the run started; give all machines the same files"
        )
    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(free_cores())
    tokenizer = load_tokenizer(Path(folder))
    tokenizer.padding_side = "left"  # the answer follows the prompt directly
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=False, use_safetensors=True, device_map="cuda" if on_gpu else "cpu"
    ).eval()  # type: ignore[no-untyped-call]
    if not on_gpu and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(attention_on_cpu())

    def write(unit: bytes) -> bytes:
        requests = msgspec.json.decode(unit, type=list[Request])
        prompts = [prompt_of(tokenizer, request) for request in requests]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        limit = requests[0].max_tokens
        with torch.inference_mode():
            tokens = model.generate(**batch, max_new_tokens=limit, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        replies = []
        for row in tokens[:, batch["input_ids"].shape[1] :].tolist():
            length = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            text = tokenizer.decode(row[:length], skip_special_tokens=True)
            replies.append(Reply(text=text.strip(), tokens=length, is_whole=length < limit))
        return msgspec.json.encode(replies)

    return write


def prompt_of(tokenizer: Any, request: Request) -> str:
    """The text that the model continues."""
    conversation = [{"role": role, "content": content} for role, content in request.messages]
    return str(tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False))


def attention_on_cpu() -> str:
    """The name, in transformers, of torch's attention for prompts and plain products for a single new token.

    There torch's kernel (2.13, bf16, CPU) takes 4 to 5 times as long, and more than all else beside a prompt of passages.
    """
    import torch
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **options: Any) -> Any:
        if query.shape[2] > 1 or scaling is None:
            return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
        rows, heads, _, width = query.shape
        scores = (query.reshape(rows, key.shape[1], -1, width) * scaling) @ key.transpose(
            2, 3
        )  # heads that share a key, together
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        out = scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
        return out.reshape(rows, 1, heads, width), None

    AttentionInterface.register("docsmith", attention)
    AttentionMaskInterface.register("docsmith", sdpa_mask)
    return "docsmith"
