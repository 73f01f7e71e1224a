"""The order in which a stage reads rows of unequal lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class GroupedByLength(LengthGroupedSampler):
    """Transformers' sampler of rows that are alike in length, in an order of the epoch's own.

    Upstream's draws from the generator that dropout draws from: a resumed stage would meet
    another order, and so would a process whose rows were longer.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of an optimizer step, over all processes and micro-batches.
        seed: Of the run.
        epoch: Tells which epoch begins.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        super().__init__(batch_size, lengths=list(lengths))
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        order: Iterator[int] = super().__iter__()
        return order
