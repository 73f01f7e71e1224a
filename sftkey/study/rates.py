"""Shares over seeds and questions: of flags, thinking forms, parts by the reference's length."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from sftkey.evaluation.statistics import by_conversation
from sftkey.evaluation.thinking import Rate, form_flags
from sftkey.study.results import Answered, Bucket, FinishedCell, paired, same_questions
from sftkey.study.seeds import Estimate, estimate


def share(
    flags: Any, rows: Sequence[Sequence[Any]], same: bool, one_model: bool = False
) -> Estimate:
    """Return the share of flags `(S, Q)` with its interval.

    Args:
        flags: Of S seeds.
        rows: The conversation of each question of each seed.
        same: Whether all seeds answered the same questions.
        one_model: Whether no seed trained the model: other questions are so many more of it.
    """
    if one_model and not same:  # rows of other seeds are other conversations
        rows = [[(place, row) for place, each in enumerate(rows) for row in each]]
        flags = flags.reshape(1, -1)
    return estimate(by_conversation(flags, rows, around_mean=True), same_questions=same)


def rates(answered: Sequence[Answered], same: bool, one_model: bool = False) -> dict[str, Rate]:
    """Return the rates of the thinking's forms; nothing where the form of a question isn't known.

    `answered` has one for each seed; the other arguments are those of `share`.
    """
    flags = [form_flags(each.questions) for each in answered]
    if not all(flags):
        return {}
    rows = [each.rows for each in answered]
    tables = {name: np.array([each[name] for each in flags]) for name in flags[0]}
    found = {name: share(table, rows, same, one_model) for name, table in tables.items()}
    return {name: Rate(rate=each.value, interval=each.interval) for name, each in found.items()}


NUM_BUCKETS = 4
Measure = Literal["length", "ratio"]
Cells = Sequence[FinishedCell]


def buckets(cells: Cells, control: Cells, measure: Measure) -> tuple[Bucket, ...]:
    """Divide the questions near their quarters, never between equal measures.

    The control has no cells of its own row. The measure is the `length` of the reference's thinking
    in tokens, or its `ratio` to the key's.

    Returns:
        Up to four; none where a cell doesn't have the lengths, or all questions have one measure.
    """
    pairs = paired(cells, control)
    cells = [cell for cell, _ in pairs] or cells
    values = [_measured(cell, measure) for cell in cells]
    if any(value is None for value in values):
        return ()
    measured = [np.array(value) for value in values]
    tops = _tops(np.concatenate(measured))
    if len(tops) < 2 or min(map(len, measured)) < NUM_BUCKETS:
        return ()
    found, low = [], -np.inf
    for top in tops:
        inside = [np.flatnonzero((each > low) & (each <= top)) for each in measured]
        found.append(_bucket(inside, measured, cells, [each for _, each in pairs]))
        low = top
    return tuple(found)


def _tops(values: Any) -> list[float]:
    """Return the largest measure of each part: ends of equal measures, the nearest to quarters.

    >>> _tops(np.array([1, 1, 1, 1, 1, 2, 3, 4])), _tops(np.array([7, 7]))
    ([1.0, 2.0, 4.0], [7.0])
    """
    distinct, counts = np.unique(values, return_counts=True)
    shares = np.cumsum(counts) / len(values)
    wanted = (number / NUM_BUCKETS for number in range(1, NUM_BUCKETS + 1))
    return sorted({float(distinct[np.abs(shares - share).argmin()]) for share in wanted})


def _bucket(places: Sequence[Any], measured: Sequence[Any], cells: Cells, control: Cells) -> Bucket:
    """Return the figures of the questions at some places of each seed, which may be none.

    The other arguments are those of `buckets`, and what each seed's questions are `measured` by.
    """
    seeds = [seed for seed, each in enumerate(places) if len(each)]
    inside = np.concatenate([measured[seed][places[seed]] for seed in seeds])
    rows = [[cells[seed].rows[place] for place in places[seed]] for seed in seeds]

    def flags(of: Cells) -> list[Any]:
        return [np.array(of[seed].flags("correct"))[places[seed]] for seed in seeds]

    same = same_questions(cells)
    acc = estimate(_table(flags(cells), rows, around_mean=True), same_questions=same)
    figures = Bucket(
        low=float(inside.min()),
        high=float(inside.max()),
        num_questions=round(len(inside) / len(seeds)),
        num_seeds=acc.num_seeds,
        acc=acc.value,
        acc_interval=acc.interval,
    )
    if not control:
        return figures
    arm, other = (_table(flags(each), rows) for each in (cells, control))
    gain = estimate(arm, other, same)
    return figures.model_copy(update={"gain": gain.value, "gain_interval": gain.interval})


def _table(flags: Sequence[Any], rows: Sequence[Sequence[int]], around_mean: bool = False) -> Any:
    """Return the flags of seeds that answered so and so many questions as one table `(S, Q)`.

    A shorter row is filled up with its mean, and its flags are drawn away from it by as much as
    keeps the variance of its mean.
    """
    each = [
        by_conversation(flag[None], [row], around_mean)[0].astype(float)
        for flag, row in zip(flags, rows, strict=True)
    ]
    most = max(map(len, each))
    table = np.empty((len(each), most))
    for place, values in enumerate(each):
        mean = values.mean()
        table[place] = mean
        table[place, : len(values)] += (values - mean) * (most / len(values))
    return table


def _measured(cell: FinishedCell, measure: Measure) -> list[float] | None:
    """Return the measure of each question; None where the cell doesn't have the lengths."""
    thinking, key = (cell.reference_tokens.get(name, []) for name in ("thinking", "key"))
    if len(thinking) != len(cell.questions) or len(key) != len(thinking):
        return None
    if measure == "length":
        return [float(length) for length in thinking]
    return [length / max(end, 1) for length, end in zip(thinking, key, strict=True)]
