"""Rows of tokens and segments into the batch that a stage trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sftkey.data.labels import IGNORED, PADDING, labels_for, weights_by_segment
from sftkey.errors import RecipeError


@dataclass
class KeyCollator:
    """Pad rows on the right, by their length, and label the tokens of one stage.

    It works in anybody's `SFTTrainer` over rows with `input_ids` and `segment_ids`; other columns
    are left aside. Rows with `seq_lengths` are packs (`sftkey.data.packing`): positions that begin
    anew keep their rows apart, provided that the model gets neither a mask nor a cache.

    Args:
        pad_token_id: Fills up short rows. It may be the id of the end of turn.
        loss_on: `completion`, `key`, `answer`, or weights by segment or group.
        pad_to_multiple_of: Lengthen the batch to a multiple of so many tokens.
        for_key_trainer: Also give `segment_ids` and `loss_weights`, which sftkey's trainer reads.
        one_line: Join the packs of a batch to one, (1, T): flash attention keeps the rows of
            several apart only so.

    Returns:
        `input_ids`, `attention_mask`, `labels`: (B, T) int64; for the key trainer also
        `segment_ids` (B, T) int64, -1 where padded, and `loss_weights` (B, T) float32. Packs have
        `position_ids` in place of the mask, and their padding is a row of its own.

    Raises:
        RecipeError: Weights other than 0 and 1 without sftkey's trainer.

    >>> rows = [
    ...     {"input_ids": [5, 6, 7, 8, 2], "segment_ids": [0, 1, 2, 3, 4]},
    ...     {"input_ids": [5, 8, 2], "segment_ids": [0, 3, 4]},
    ... ]
    >>> batch = KeyCollator(pad_token_id=2, loss_on="key")(rows)
    >>> batch["input_ids"]
    tensor([[5, 6, 7, 8, 2],
            [5, 8, 2, 2, 2]])
    >>> batch["attention_mask"]
    tensor([[1, 1, 1, 1, 1],
            [1, 1, 1, 0, 0]])
    >>> batch["labels"]
    tensor([[-100, -100,    7,    8,    2],
            [-100,    8,    2, -100, -100]])
    >>> pack = {key: rows[0][key] + rows[1][key] for key in rows[0]} | {"seq_lengths": [5, 3]}
    >>> batch = KeyCollator(pad_token_id=2, loss_on="key")([pack])
    >>> list(batch), batch["position_ids"]
    (['input_ids', 'position_ids', 'labels'], tensor([[0, 1, 2, 3, 4, 0, 1, 2]]))
    """

    pad_token_id: int
    loss_on: str | Mapping[str, float] = "key"
    pad_to_multiple_of: int | None = None
    for_key_trainer: bool = False
    one_line: bool = False

    def __post_init__(self) -> None:
        if not self.for_key_trainer and not {0.0, 1.0}.issuperset(weights_by_segment(self.loss_on)):
            raise RecipeError(
                "KeyCollator",
                f"expected loss_on without weights other than 0 and 1, got {self.loss_on!r}; "
                "a plain SFTTrainer ignores loss_weights without a word",
                hint="train this stage with sftkey's trainer (`sftkey train`), "
                "or choose loss_on: completion, key or answer",
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Give the batch of these rows."""
        packed = "seq_lengths" in rows[0]
        if packed and self.one_line:
            columns = ("input_ids", "segment_ids", "seq_lengths")
            rows = [{name: [each for row in rows for each in row[name]] for name in columns}]
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = _padded([row["input_ids"] for row in rows], length, self.pad_token_id)
        segment_ids = _padded([row["segment_ids"] for row in rows], length, PADDING)
        labels, weights = labels_for(input_ids, segment_ids, self.loss_on)
        if packed:
            positions = _positions([row["seq_lengths"] for row in rows], length)
            # The token before a row's first is another row's last, which can't predict it.
            labels = labels.masked_fill(positions == 0, IGNORED)
            weights = weights.masked_fill(positions == 0, 0.0)
            apart = {"position_ids": positions}
        else:
            apart = {"attention_mask": (segment_ids != PADDING).long()}
        batch = {"input_ids": input_ids, **apart, "labels": labels}
        if self.for_key_trainer:
            batch |= {"segment_ids": segment_ids, "loss_weights": weights}
        return batch


def _positions(packs: Sequence[Sequence[int]], length: int) -> torch.Tensor:
    """Number the tokens of each row of each pack from 0; what fills up counts as one more row."""
    lengths = [[*pack, length - sum(pack)] for pack in packs]
    return torch.tensor([[place for n in pack for place in range(n)] for pack in lengths])


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    """Give rows of unequal lengths as one (B, length) tensor.

    numpy reads lists ten times as fast as torch does.
    """
    padded = np.full((len(rows), length), value, dtype=np.int64)
    for whole, row in zip(padded, rows, strict=True):
        whole[: len(row)] = row
    return torch.from_numpy(padded)
