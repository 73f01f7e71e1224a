"""Rows packed together, so that batches need little padding; no row is cut, none sees another."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from sftkey.errors import DataError
from sftkey.recipe.schema import Recipe, StageSection

TOKEN_COLUMNS = ["input_ids", "segment_ids"]  # what a pack holds of its rows


def reads_packs(recipe: Recipe, stage: StageSection) -> bool:
    """Tell whether a stage trains on packs.

    A context that is read without gradient needs each row on its own: its key has to begin where
    the others' begin. Rows of the model's own thinking are made when the stage begins.
    """
    return recipe.data.packing and stage.context == "exact" and stage.thinking == "reference"


def packed_rows(recipe: Recipe, train: Dataset) -> Dataset | None:
    """Pack the training rows if a stage of the recipe reads packs."""
    if not any(reads_packs(recipe, stage) for stage in recipe.stages):
        return None
    return pack_rows(train, recipe.data.max_length)


def stage_rows(
    recipe: Recipe, stage: StageSection, train: Dataset, packs: Dataset | None
) -> Dataset:
    """Give what a stage's batches are made of: rows, or packs of them."""
    return packs if packs is not None and reads_packs(recipe, stage) else train


def pack_rows(rows: Dataset, max_length: int) -> Dataset:
    """Pack rows with TRL's packer (best fit decreasing); the same rows always pack alike.

    Args:
        rows: Columns `input_ids` and `segment_ids`, and others, which packs don't have.
        max_length: Tokens of a pack at most.

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
