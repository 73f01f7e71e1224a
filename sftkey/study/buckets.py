"""Where an arm gains: its questions in quarters, by the length of their reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from sftkey.evaluation.conversations import by_conversation
from sftkey.study.rates import share
from sftkey.study.results import Bucket, FinishedCell, paired, same_questions, table_of
from sftkey.study.seeds import difference_estimate

NUM_BUCKETS = 4
Measure = Literal["length", "ratio"]
Cells = Sequence[FinishedCell]


def buckets(cells: Cells, control: Cells, measure: Measure) -> tuple[Bucket, ...]:
    """Divide each seed's questions into quarters of equal number; none where the measure is one.

    Args:
        cells: An arm's, one a seed.
        control: The control's; empty for its own row.
        measure: `length`: the tokens of the reference's thinking; `ratio`: these by its key's.
    """
    pairs = paired(cells, control)
    cells = [cell for cell, _ in pairs] or cells
    values = [_measured(cell, measure) for cell in cells]
    if any(value is None for value in values):
        return ()
    measured: Any = np.array(values)
    num = min(NUM_BUCKETS, measured.shape[1])
    if measured.min() == measured.max() or num < NUM_BUCKETS:
        return ()
    orders = np.argsort(measured, axis=1, kind="stable")
    right = table_of(cells, "correct")
    other = table_of([each for _, each in pairs], "correct") if pairs else None
    same = same_questions(cells)
    parts = np.array_split(orders, num, axis=1)
    rows = np.array([cell.rows for cell in cells])
    return tuple(_bucket(part, measured, rows, (right, other), same) for part in parts)


def _bucket(part: Any, measured: Any, rows: Any, flags: tuple[Any, Any], same: bool) -> Bucket:
    """Return the figures of some questions of each seed, whose places are `(S, q)`.

    Args:
        part: The places.
        measured: What each question is sorted by.
        rows: The conversation of each question.
        flags: Of an arm and of the control, or None.
        same: Whether all seeds answered the same questions.
    """
    mine, inside = (np.take_along_axis(each, part, axis=1) for each in (flags[0], measured))
    rows = np.take_along_axis(rows, part, axis=1).tolist()
    acc = share(mine, rows, same)
    figures = Bucket(
        low=float(inside.min()),
        high=float(inside.max()),
        num_questions=part.shape[1],
        num_seeds=acc.num_seeds,
        acc=acc.value,
        acc_interval=acc.interval,
    )
    if flags[1] is None:
        return figures
    other = by_conversation(np.take_along_axis(flags[1], part, axis=1), rows)
    gain = difference_estimate(by_conversation(mine, rows), other, same)
    return figures.model_copy(update={"gain": gain.value, "gain_interval": gain.interval})


def _measured(cell: FinishedCell, measure: Measure) -> list[float] | None:
    """Return the measure of each question; None where the cell doesn't have the lengths."""
    thinking, key = (cell.reference_tokens.get(name, []) for name in ("thinking", "key"))
    if len(thinking) != len(cell.questions) or len(key) != len(thinking):
        return None
    if measure == "length":
        return [float(length) for length in thinking]
    return [length / max(end, 1) for length, end in zip(thinking, key, strict=True)]
