"""Batches that fit into memory: what they need, and smaller ones when it runs out."""

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from stages.models.memory import is_out_of_memory, memory, short_of_memory
from stages.program import OutOfMemory, say
from stages.training.batches import Tokens

AUTO_BATCH_SIZE = 8  # what `auto` starts with
STATES = 3  # of each trained weight: its gradient, and AdamW's two moments
Train = TypeVar("Train", bound=Any)  # the section train of params.yaml
Outcome = TypeVar("Outcome")


def fitting(train: Train, build: Callable[[Train], Any], work: Callable[[Any], Outcome], rows: Sequence[Tokens]) -> Outcome:
    """work(build(train)): what is done with a trainer.

    Where per_device_train_batch_size is `auto` and memory runs out, all is done again with half the batch and twice as many of them
    in a step. Raises OutOfMemory, with what is needed and the setting to change, for a batch size that is given, and for one of 1.
    """
    is_auto = train.per_device_train_batch_size == "auto"
    if is_auto:
        train = msgspec.structs.replace(train, per_device_train_batch_size=AUTO_BATCH_SIZE)
    while True:
        with short_of_memory("the model alone does not fit; choose a smaller models.base, or free memory"):
            trainer = build(train)
        empty = memory().used
        try:
            return work(trainer)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # here, and not above: the error held the batch
        line = f"out of memory: {memory().line()}, {needs(trainer, rows, empty)}"
        del trainer
        free_memory()
        size, summed = train.per_device_train_batch_size, train.gradient_accumulation_steps
        if size == 1:
            raise OutOfMemory(f"{line}; lower split.turns or train.r, or choose a smaller models.base, or free memory")
        smaller = size // 2 if size % 2 == 0 else 1
        halved = {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": summed * size // smaller}
        change = " and ".join(f"train.{name} to {value}" for name, value in halved.items())
        if not is_auto or int(os.environ.get("WORLD_SIZE", "1")) > 1:  # the other processes would wait for this one's batch
            raise OutOfMemory(f"{line}; set {change}, which learns the same" + ("" if is_auto else ", or the first to auto"))
        say(f"train: {line}; goes on with {change.replace(' to ', ' = ')}, which learns the same")
        train = msgspec.structs.replace(train, **halved)


def free_memory() -> None:
    """Gives back what nobody holds any more: the GPU's, and the heap that `keep_memory` would keep."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)  # musl has none


def needs(trainer: Any, rows: Sequence[Tokens], empty: int) -> str:
    """What a step on the longest of `rows` needs, in words: from what one on the shortest takes. `empty`: bytes before the first."""
    by_length = sorted(rows, key=lambda row: len(row.input_ids))
    size = trainer.args.per_device_train_batch_size
    try:
        needed, short = step_bytes(trainer, by_length[:1])
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return "and one short conversation needs more"
    long = trainer.data_collator([msgspec.to_builtins(row) for row in by_length[-size:]])["input_ids"].numel()
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    whole = empty + STATES * sum(weight.nbytes for weight in weights) + needed * long / short
    return f"and a batch of {size} needs about {whole / 1e9:.1f} GB"


def step_bytes(trainer: Any, rows: Sequence[Tokens]) -> tuple[int, int]:
    """The bytes that a step on `rows` needs beyond the weights, and its tokens.

    They are what the forward pass keeps for the backward pass, and thrice the largest of it: the scores of all tokens before and after
    their softmax, and their gradient.
    """
    import torch

    batch = trainer._prepare_inputs(trainer.data_collator([msgspec.to_builtins(row) for row in rows]))
    weights = {weight.untyped_storage().data_ptr() for weight in trainer.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself, where it is an output, would keep its own graph alive for ever

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model, batch)
    del loss
    return sum(kept.values()) + 3 * max(kept.values()), batch["input_ids"].numel()
