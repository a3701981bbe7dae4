"""TRL's trainer for one process or several: which examples each step learns from depends on seed and epoch alone, not on who computes what."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from trl import SFTTrainer  # type: ignore[attr-defined]


def deal(batch: Sequence[int], size: int, ranks: int) -> list[list[list[int]]]:
    """What each of `ranks` processes computes of one step's `batch`: as many lists for each, of `size` at most, none of them empty.

    Neighbours go to different processes: a batch sorted by length gives all of them alike work. Where there is too little to deal out,
    the last one of the batch is computed more than once.
    """
    rounds = -(-len(batch) // (size * ranks))
    dealt = [np.array_split(np.asarray(batch[rank::ranks], dtype=int), rounds) for rank in range(ranks)]
    return [[part.tolist() or [batch[-1]] for part in parts] for parts in dealt]


class Dealt(BatchRebalanceSampler):  # type: ignore[misc]
    """For one process its parts of the trainer's batches of conversations of like length.

    A subclass of the one sampler whose batches accelerate does not deal out a second time. `seed` is asked when an epoch begins.
    """

    def __init__(self, lengths: list[int], size: int, rounds: int, ranks: int, rank: int, seed: Callable[[], int]) -> None:
        super().__init__(lengths, size * rounds * ranks, ranks, rounds, rank=rank, drop_last=False)
        self.sampler = LengthGroupedSampler(self.effective_batch_size, lengths=lengths)
        self.size, self.seed_now = size, seed

    def __iter__(self) -> Iterator[list[int]]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed_now())
        order = list(self.sampler)
        for start in range(0, len(order), self.effective_batch_size):
            yield from deal(order[start : start + self.effective_batch_size], self.size, self.dp_size)[self.rank]

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.size * self.dp_size))


class SharedTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with the same steps for any number of processes that have the same batch together, also after it resumes."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Dealt:
        args: Any = self.args
        rows: Any = train_dataset or self.train_dataset
        lengths = [len(row["input_ids"]) for row in rows]
        # accelerate forgets the epoch of a run that resumes within one; the trainer knows it
        return Dealt(
            lengths,
            args.train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
            args.process_index,
            lambda: args.seed + int(self.state.epoch or 0),
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Dealt:
        # every process computes the whole dev loss: there is little of it, and unequal shares could not be averaged
        lengths = [len(row["input_ids"]) for row in eval_dataset]
        return Dealt(lengths, self.args.eval_batch_size, 1, 1, 0, lambda: self.args.seed)
