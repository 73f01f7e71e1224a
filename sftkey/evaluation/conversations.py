"""Intervals and tests where a row asks several questions: a conversation counts as one draw.

The turns of a conversation hang together, so that 100 turns of 10 conversations say less than 100
questions. Where each row asks one question, all is as `statistics` gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import sqrt
from typing import Any

import numpy as np
from scipy.stats import t as student

from sftkey.evaluation.statistics import (
    Z_95,
    chance_of_worse,
    paired_difference,
    paired_p,
    wilson,
)

Rows = Sequence[Hashable]  # the conversation of each question


def num_conversations(rows: Rows) -> int | None:
    """Count the conversations; None where each row asks one question."""
    count = len(set(rows))
    return count if count < len(rows) else None


def share_interval(flags: Sequence[bool], rows: Rows) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share, with the number of questions that they are worth.

    That number is n by the design effect, how much more the share varies from conversation to
    conversation than from question to question (Rao and Scott 1992), at most n, and with Student's
    quantile for few conversations (Korn and Graubard 1998). Where all flags are alike no effect is
    seen: then it is the number of conversations.

    Args:
        flags: Right or wrong, a flag a question.
        rows: The conversation of each.
    """
    count, num = num_conversations(rows), len(flags)
    if count is None:
        return wilson(sum(flags), num)
    if count == 1:
        return 0.0, 1.0
    share = sum(flags) / num
    if share in (0.0, 1.0):
        worth = float(count)
    else:
        sums = _sums(np.asarray(flags, dtype=np.float64) - share, rows)
        variance = count / (count - 1) * float((sums**2).sum()) / num**2
        simple = share * (1 - share) / num
        worth = num / max(1.0, variance / simple)
    worth *= (Z_95 / student.ppf(0.975, count - 1)) ** 2
    centre = share + Z_95**2 / (2 * worth)
    half = Z_95 * sqrt(share * (1 - share) / worth + Z_95**2 / (4 * worth**2))
    whole = 1 + Z_95**2 / worth
    return max(0.0, (centre - half) / whole), min(1.0, (centre + half) / whole)


def difference_with_interval(
    before: Sequence[bool], after: Sequence[bool], rows: Rows
) -> tuple[float, float, float]:
    """Return the difference of two shares on the same questions, and its 95% interval's ends.

    Over conversations it is the interval of a mean of clusters with Student's quantile, two
    conversations added that nobody had, one half of each kind, so that it keeps a width where
    nothing changed (as Agresti and Min 2005 do with questions).

    Args:
        before: Right or wrong, a flag a question.
        after: The same of the other stage, in the same order.
        rows: The conversation of each.
    """
    count = num_conversations(rows)
    if count is None:
        return paired_difference(before, after)
    changes = _changes(before, after)
    mean, num = float(changes.mean()), len(changes) + 2
    if count == 1:
        return mean, -1.0, 1.0
    centre = float(changes.sum()) / num
    spread = float((_sums(changes - centre, rows) ** 2).sum()) + 2 * (0.5 + centre**2)
    half = float(student.ppf(0.975, count - 1)) * sqrt(count / (count - 1) * spread) / num
    return mean, max(-1.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


def two_sided_p(before: Sequence[bool], after: Sequence[bool], rows: Rows) -> float:
    """Return the p of the difference; of conversations, that of swapping whole ones."""
    return _p(paired_p, lambda sums, seen: np.abs(sums) >= abs(seen), before, after, rows)


def one_sided_p(before: Sequence[bool], after: Sequence[bool], rows: Rows) -> float:
    """Return the same against one side: that `after` has fewer right."""
    return _p(chance_of_worse, lambda sums, seen: sums <= seen, before, after, rows)


def _p(
    simple: Callable[[Sequence[bool], Sequence[bool]], float],
    extreme: Callable[[Any, int], Any],
    before: Sequence[bool],
    after: Sequence[bool],
    rows: Rows,
) -> float:
    """Count all ways of swapping before and after in each conversation, which chance would do."""
    if num_conversations(rows) is None:
        return simple(before, after)
    gains = _sums(_changes(before, after), rows).astype(int)
    chances: Any = np.ones(1)  # of each sum from -n to n
    for gain in np.abs(gains[gains != 0]):
        ways = np.zeros(2 * gain + 1)
        ways[[0, -1]] = 0.5
        chances = np.convolve(chances, ways)
    sums = np.arange(len(chances)) - len(chances) // 2
    return min(1.0, float(chances[extreme(sums, int(gains.sum()))].sum()))


def by_conversation(table: Any, rows: Sequence[Rows], around_mean: bool = False) -> Any:
    """Return a column for each conversation, with the same mean: what a study's tests then flip.

    Args:
        table: Flags `(S, Q)` of S seeds.
        rows: The conversation of each question of each seed.
        around_mean: Keep no more of a conversation's length than how far its flags lie from the
            mean: for an interval of a share. Else a column is the sum of its flags.

    Returns:
        `(S, C)`, scaled to the mean of all flags. The table itself where each row asks one.
    """
    counts = [len(set(each)) for each in rows]
    if all(num_conversations(each) is None for each in rows):
        return table
    values, most = np.asarray(table, dtype=np.float64), max(counts)
    mean = values.mean(1, keepdims=True) if around_mean else np.zeros((len(values), 1))
    columns = np.zeros((len(values), most))
    for place, each in enumerate(rows):
        columns[place, : counts[place]] = _sums((values - mean)[place], each)
    return mean + columns * most / values.shape[1]


def _changes(before: Sequence[bool], after: Sequence[bool]) -> Any:
    return np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)


def _sums(values: Any, rows: Rows) -> Any:
    """Add up the values of each conversation."""
    places = {row: place for place, row in enumerate(dict.fromkeys(rows))}
    return np.bincount([places[row] for row in rows], weights=values, minlength=len(places))
