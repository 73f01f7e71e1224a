"""Which micro-batches of a step have their keys in one pass of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sftkey.data.labels import PADDING
from sftkey.data.response import Segment
from sftkey.recipe.schema import CONTEXT_OF_KEY


def key_starts(segment_ids: torch.Tensor) -> torch.Tensor:
    """Return the place of the token that predicts a row's first key token: T of Eq. 4.

    Args:
        segment_ids: `(B, T)`, filled up with -1 on the right.

    >>> key_starts(torch.tensor([[0, 0, 1, 1, 2, 3, 4], [0, 1, 3, 4, -1, -1, -1]]))
    tensor([3, 1])
    """
    return (segment_ids >= Segment.ANSWER_TAG).int().argmax(1) - 1


@dataclass(frozen=True)
class KeyBatch:
    """The size of a pass over keys.

    Args:
        rows: How many, with the copies of a grid.
        context: Columns before the keys.
        keys: Columns of the keys.
    """

    rows: int
    context: int
    keys: int

    @classmethod
    def of(cls, segment_ids: torch.Tensor, copies: int) -> KeyBatch:
        """Return the size of a micro-batch.

        Args:
            segment_ids: `(B, T)`, filled up with -1 on the right.
            copies: Of each row: the adapters of a grid.
        """
        starts = key_starts(segment_ids)
        keys = (segment_ids != PADDING).sum(1) - starts
        return cls(len(segment_ids) * copies, int(starts.max()), int(keys.max()))

    def __add__(self, other: KeyBatch) -> KeyBatch:
        """Return the size of both in one pass: each is filled up to the longer one."""
        return KeyBatch(
            self.rows + other.rows, max(self.context, other.context), max(self.keys, other.keys)
        )

    def fits(self, most_tokens: int) -> bool:
        """Tell whether keys, and the contexts that are held for them, are no more tokens."""
        contexts = self.rows * self.context
        return self.rows * self.keys <= most_tokens and contexts <= most_tokens * CONTEXT_OF_KEY


def pass_ends(batches: Sequence[KeyBatch], most_tokens: int) -> list[bool]:
    """Return of each micro-batch whether it is the last one of a pass over keys.

    A pass takes as many as fit, and one that doesn't fit alone.

    Args:
        batches: The micro-batches of a step.
        most_tokens: `key_batch_tokens`.

    >>> short, long = KeyBatch(rows=2, context=30, keys=4), KeyBatch(rows=2, context=30, keys=9)
    >>> pass_ends([short, short, short, long], most_tokens=20)
    [False, True, True, True]
    """
    ends = []
    together = batches[0] if batches else None
    for following in batches[1:]:
        assert together is not None
        joined = together + following
        ends.append(not joined.fits(most_tokens))
        together = following if ends[-1] else joined
    return [*ends, True]
