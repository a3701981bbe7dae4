"""LoRA training on the CPU at several times the speed of padded batches: TRL's trainer with a model that takes the batches of `pack`.

Three things cost the time that padded batches lose. Padding, and a system prompt computed again for every row: `pack` leaves them out.
The head for tokens that nobody answers with: it sees the others only. PEFT's casts of all hidden states to fp32 and back, at every
adapted layer: the small matrices are cast instead. Loss and gradients are those of the plain path.
"""

import ctypes
import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from transformers import AttentionInterface

from stages.program import BadModelFile
from stages.training.batches import IGNORED
from stages.training.shared import SharedTrainer

NOT_HERE = ("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling")  # what `answer_loss` leaves out
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # mallopt(3)


class Rows(NamedTuple):
    """Where the rows of a batch lie: in each layer the same."""

    shared: int  # tokens at the beginning that belong to every row
    tails: Any  # (rows * width), the place of each token of each rest; 0 where there is none
    filled: Any  # (tokens - shared), which of `tails` are tokens, in the order of the batch
    mask: Any  # (width, shared + width), what a token of a rest attends to
    shape: tuple[int, int]


def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, rows: Rows, **others: Any) -> Any:
    """transformers' interface of an attention function, for (1, heads, tokens, size) laid out as `rows` says.

    In fp32: the processor's bf16 kernels lose more time in so small products than they win.
    """
    window = others.get("sliding_window")
    if window is not None and window < sum(rows.mask.shape):
        raise BadModelFile(
            f"train: attention in a window of {window} tokens is not supported on the CPU; choose another models.base"
        )
    dtype, groups = query.dtype, query.shape[1] // key.shape[1]
    query, key, value = query.float(), key.float().repeat_interleave(groups, 1), value.float().repeat_interleave(groups, 1)

    def rests(states: Any) -> Any:  # (rows, heads, width, size)
        return states[0].index_select(1, rows.tails).unflatten(1, rows.shape).transpose(0, 1)

    def whole(states: Any) -> Any:
        return torch.cat([states[:, :, : rows.shared].expand(rows.shape[0], -1, -1, -1), rests(states)], 2)

    begin = [states[:, :, : rows.shared] for states in (query, key, value)]
    shared = F.scaled_dot_product_attention(begin[0], begin[1], begin[2], is_causal=True, scale=scaling)[0]
    own = F.scaled_dot_product_attention(rests(query), whole(key), whole(value), attn_mask=rows.mask, scale=scaling)
    own = own.transpose(0, 1).flatten(1, 2).index_select(1, rows.filled)
    return torch.cat([shared, own], 1).transpose(0, 1)[None].to(dtype), None


class AddLora(torch.autograd.Function):
    """x W' + bias + scale (x A') B', in the type of x, with gradients for x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float) -> Any:
        a, b = a.to(x.dtype), b.to(x.dtype)
        inner = F.linear(x, a)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scale = scale
        return F.linear(x, weight, bias).addmm_(inner, b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        x, weight, a, b, inner = ctx.saved_tensors
        into = gradient @ b
        to_x = (gradient @ weight).addmm_(into, a, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        return to_x, None, None, (into.T @ x).float() * ctx.scale, (gradient.T @ inner).float() * ctx.scale, None


def pack_model(model: Any) -> None:
    """Makes `model` (of PEFT) take the batches of `pack`, and give the sum of the negative log-likelihoods of the labels.

    Raises BadModelFile for a model whose attention or head is of another kind.
    """
    causal = model.get_base_model()
    if wrong := [name for name in NOT_HERE if getattr(causal.config, name, None)]:
        raise BadModelFile(f"train: a model with {wrong[0]} is not supported on the CPU; choose another models.base")
    AttentionInterface.register("packed", attend)
    causal.set_attn_implementation("packed")

    def answer_loss(input_ids: Any, position_ids: Any, labels: Any, tails: Any, **_: Any) -> Any:
        filled = (tails.flatten() >= 0).nonzero()[:, 0]
        shared, width = input_ids.shape[1] - len(filled), tails.shape[1]
        mask = torch.ones(width, shared + width, dtype=torch.bool).tril(shared)
        rows = Rows(shared, tails.flatten().clamp(min=0), filled, mask, tuple(tails.shape))
        states = causal.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, rows=rows).last_hidden_state
        learned = labels != IGNORED
        logits = causal.get_output_embeddings()(
            states[learned]
        )  # of a 2-D matrix: oneDNN's fast path does not take sliced 3-D ones
        return F.cross_entropy(logits.float(), labels[learned], reduction="sum")

    causal.forward = answer_loss  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(module, Linear) and not any(getattr(drop, "p", 0) for drop in module.lora_dropout.values()):
            module.forward = with_lora(module)  # type: ignore[method-assign]


def with_lora(module: Any) -> Any:
    """The forward pass of one of PEFT's layers, by AddLora."""
    (name,) = module.active_adapters
    base, a, b, scale = module.base_layer, module.lora_A[name], module.lora_B[name], module.scaling[name]

    def forward(x: Any) -> Any:
        return AddLora.apply(x.flatten(0, -2), base.weight, base.bias, a.weight, b.weight, scale).unflatten(0, x.shape[:-1])  # type: ignore[no-untyped-call]

    return forward


class PackedTrainer(SharedTrainer):
    """TRL's trainer for a model of `pack_model`, with `pack` as its data collator."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss = model(**inputs)
        if num_items_in_batch is None:
            loss = loss / (inputs["labels"] != IGNORED).sum()
        else:  # of the whole step: of all processes, and all that is accumulated
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss


def keep_memory() -> None:
    """Lets glibc keep what is freed: giving large blocks back and asking for them again in every step costs a tenth of the time and more."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda name, value: 0)
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            mallopt(name, value)
