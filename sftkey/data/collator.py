"""Batches with labels and weights, padded or packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset

from sftkey.activity import activity
from sftkey.data.labels import IGNORED, PADDING, labels_for, weights_by_segment
from sftkey.errors import DataError, ModelError, RecipeError, shown
from sftkey.recipe.loss_on import checked_loss_on
from sftkey.recipe.schema import Recipe, StageSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_COLUMNS = ["input_ids", "segment_ids"]  # what a pack holds of its rows


def reads_packs(recipe: Recipe, stage: StageSection) -> bool:
    """Tell whether a stage trains on packs.

    A context that is read without gradient needs each row on its own: its key has to begin where
    the others' begin. Rows of the model's own thinking are made when the stage begins.
    """
    return recipe.data.packing and stage.context == "exact" and stage.thinking == "reference"


@activity("packing the rows")
def pack_rows(rows: Dataset, max_length: int) -> Dataset:
    """Pack rows with TRL's packer (best fit decreasing); the same rows always pack alike.

    Returns:
        Packs with `input_ids`, `segment_ids`, and `seq_lengths`: the lengths of a pack's rows.

    Raises:
        DataError: A row is longer than a pack, where TRL would cut it; or the packs don't hold just
            these rows.
    """
    from trl import pack_dataset

    lengths = row_lengths(rows)
    longest = max(lengths)
    if longest > max_length:
        expected = f"expected rows of at most {max_length} tokens, which a pack holds"
        raise DataError("data.packing", f"{expected}; got one of {longest}")
    packs = pack_dataset(rows.select_columns(TOKEN_COLUMNS), max_length, strategy="bfd")
    packed = [length for pack in packs["seq_lengths"] for length in pack]
    if sorted(packed) != sorted(lengths):
        expected = f"expected {len(lengths)} rows with {sum(lengths)} tokens in the packs"
        got = f"got {len(packed)} with {sum(packed)}"
        raise DataError("data.packing", f"{expected}; {got}")
    return packs


def pack_counts(packs: Dataset, max_length: int) -> dict[str, Any]:
    """Count, for data.json, the packed rows and tokens, the packs, and how full these are."""
    num_tokens = sum(row_lengths(packs))
    return {
        "rows": sum(len(lengths) for lengths in packs["seq_lengths"]),
        "packs": len(packs),
        "tokens": num_tokens,
        "max_length": max_length,
        "filled": round(num_tokens / (len(packs) * max_length), 4),
    }


def pack_line(counts: dict[str, Any]) -> str:
    """Say what was packed.

    >>> pack_line({"rows": 24, "packs": 7, "tokens": 850, "max_length": 128, "filled": 0.9487})
    '24 rows in 7 packs of at most 128 tokens, 94.9% filled; no row is cut'
    """
    return (
        f"{counts['rows']} rows in {counts['packs']} packs of at most {counts['max_length']} "
        f"tokens, {counts['filled']:.1%} filled; no row is cut"
    )


def row_lengths(rows: Dataset) -> list[int]:
    """Count the tokens of each row without reading them."""
    table = rows.select_columns("input_ids").with_format("arrow")[:]
    lengths: list[int] = pc.list_value_length(table["input_ids"]).to_pylist()
    return lengths


@dataclass
class KeyCollator:
    """Pad rows on the right, by their length, and label the tokens of one stage.

    It works in anybody's `SFTTrainer` over rows with `input_ids` and `segment_ids`; other columns
    are left aside. Rows with `seq_lengths` are packs (`sftkey.data.collator`): positions that begin
    anew keep their rows apart, provided that the model gets neither a mask nor a cache.

    Args:
        pad_token_id: Fills up short rows: an id, which may be the end of turn's, or the tokenizer
            that has it.
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
        DataError: Rows have no segments, or not one for each token.
        ModelError: The tokenizer has no padding token.
        RecipeError: An unknown `loss_on`, or weights other than 0 and 1 without sftkey's trainer.

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

    pad_token_id: int | PreTrainedTokenizerBase
    loss_on: str | Mapping[str, float] = "key"
    pad_to_multiple_of: int | None = None
    for_key_trainer: bool = False
    one_line: bool = False

    def __post_init__(self) -> None:
        try:
            checked_loss_on(dict(on) if isinstance(on := self.loss_on, Mapping) else on)
        except ValueError as error:
            raise RecipeError("KeyCollator", f"loss_on: {error}") from None
        given = self.pad_token_id
        self._fill: Any = getattr(given, "pad_token_id", given)
        if not isinstance(self._fill, int):
            name = getattr(given, "name_or_path", None) or shown(given)
            what = f"expected a tokenizer with a padding token, got {name} without one"
            raise ModelError("KeyCollator", what, "set tokenizer.pad_token = tokenizer.eos_token")
        if not self.for_key_trainer and not {0.0, 1.0}.issuperset(weights_by_segment(self.loss_on)):
            raise RecipeError(
                "KeyCollator",
                f"expected loss_on without weights other than 0 and 1, got {self.loss_on!r}; "
                "a plain SFTTrainer ignores loss_weights without a word",
                hint="train this stage with sftkey's trainer (`sftkey train`), "
                "or choose loss_on: completion, key or answer",
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch of these rows."""
        _check_rows(rows)
        packed = "seq_lengths" in rows[0]
        if packed and self.one_line:
            columns = ("input_ids", "segment_ids", "seq_lengths")
            rows = [{name: [each for row in rows for each in row[name]] for name in columns}]
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = _padded([row["input_ids"] for row in rows], length, self._fill)
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


def _check_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rows whose segments, or lengths of packed rows, aren't those of their tokens."""
    for place, row in enumerate(rows):
        if missing := [name for name in TOKEN_COLUMNS if name not in row]:
            what = f"expected rows with {' and '.join(TOKEN_COLUMNS)}; got {', '.join(row)}"
            hint = "make rows with sftkey.tokenize"
            if missing == ["segment_ids"]:
                hint += ", and write remove_unused_columns=False: SFTTrainer drops them otherwise"
            raise DataError("KeyCollator", what, hint)
        tokens, segments = (len(row[name]) for name in TOKEN_COLUMNS)
        packed = sum(row["seq_lengths"]) if "seq_lengths" in row else tokens
        if not tokens == segments == packed:
            got = f"got {tokens} tokens and {segments} segments"
            got += f", and seq_lengths of {packed}" if packed != tokens else ""
            what = f"row {place} of a batch: expected a segment for each token; {got}"
            raise DataError("KeyCollator", what, "change both alike, as sftkey.tokenize makes them")


def _positions(packs: Sequence[Sequence[int]], length: int) -> torch.Tensor:
    """Number the tokens of each row of each pack from 0; what fills up counts as one more row."""
    lengths = [[*pack, length - sum(pack)] for pack in packs]
    return torch.tensor([[place for n in pack for place in range(n)] for pack in lengths])


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    """Return rows of unequal lengths as one (B, length) tensor.

    numpy reads lists ten times as fast as torch does.
    """
    padded = np.full((len(rows), length), value, dtype=np.int64)
    for whole, row in zip(padded, rows, strict=True):
        whole[: len(row)] = row
    return torch.from_numpy(padded)
