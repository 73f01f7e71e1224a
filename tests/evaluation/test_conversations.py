"""Intervals and tests over conversations: by hand, by simulation, and as before without any."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest

from sftkey.evaluation.statistics import (
    by_conversation,
    chance_of_worse,
    difference_with_interval,
    num_conversations,
    one_sided_p,
    paired_difference,
    paired_p,
    share_interval,
    two_sided_p,
    wilson,
)

BEFORE = [True, True, False, True, False, False, True, True]
AFTER = [False, True, True, False, False, True, False, False]
PAIRS = [0, 0, 1, 1, 2, 2, 3, 3]


def test_one_question_a_row_is_as_without_conversations() -> None:
    """To the last digit."""
    rows = list(range(8))
    assert num_conversations(rows) is None
    assert share_interval(BEFORE, rows) == wilson(5, 8)
    assert difference_with_interval(BEFORE, AFTER, rows) == paired_difference(BEFORE, AFTER)
    assert two_sided_p(BEFORE, AFTER, rows) == paired_p(BEFORE, AFTER)
    assert one_sided_p(BEFORE, AFTER, rows) == chance_of_worse(BEFORE, AFTER)
    table = np.array([BEFORE, AFTER])
    assert by_conversation(table, [rows, rows]) is table


def test_p_counts_the_swaps_of_whole_conversations() -> None:
    """Of the 16 ways to swap four conversations, as many are so extreme as a loop finds."""
    changes = [sum(AFTER[n : n + 2]) - sum(BEFORE[n : n + 2]) for n in range(0, 8, 2)]
    sums = [sum(map(int.__mul__, signs, changes)) for signs in product((1, -1), repeat=4)]
    assert changes == [-1, 0, 1, -2]
    extreme = sum(abs(each) >= 2 for each in sums)
    assert two_sided_p(BEFORE, AFTER, PAIRS) == pytest.approx(extreme / 16)
    assert one_sided_p(BEFORE, AFTER, PAIRS) == pytest.approx(sum(s <= -2 for s in sums) / 16)
    assert two_sided_p(BEFORE, BEFORE, PAIRS) == one_sided_p(BEFORE, BEFORE, PAIRS) == 1.0


def test_turns_that_say_the_same_are_worth_one_question() -> None:
    """A question that stands four times in its conversation makes no interval shorter."""
    flags, other = [n % 3 > 0 for n in range(60)], [n % 5 > 0 for n in range(60)]
    rows = [row for row in range(60) for _ in range(4)]
    flags4, other4 = [flags[row] for row in rows], [other[row] for row in rows]
    low, high = share_interval(flags4, rows)
    assert (low, high) == pytest.approx(wilson(40, 60), abs=0.01)
    assert high - low > 1.8 * (wilson(160, 240)[1] - wilson(160, 240)[0])
    expected = paired_difference(flags, other)
    assert difference_with_interval(flags4, other4, rows) == pytest.approx(expected, abs=0.02)
    gains = sum(not a and b for a, b in zip(flags, other, strict=True))
    losses = sum(a and not b for a, b in zip(flags, other, strict=True))
    exact = binomtest(gains, gains + losses).pvalue  # of swapping each question
    assert two_sided_p(flags4, other4, rows) == pytest.approx(exact)
    alike = share_interval([True] * 240, rows)
    assert alike == pytest.approx(wilson(60, 60), abs=0.005)


def test_intervals_cover() -> None:
    """Of 400 draws of 30 conversations of 1 to 6 turns that hang together, 93% to 98%."""
    dice = np.random.default_rng(0)
    shares, differences, false_alarms = 0, 0, 0
    for _ in range(400):
        lengths = dice.integers(1, 7, size=30)
        rows = np.repeat(np.arange(30), lengths).tolist()
        easy = np.repeat(dice.choice([0.2, 0.9], size=30), lengths)
        before, after = (
            (dice.random(len(rows)) < easy + np.repeat(dice.choice([-0.1, 0.1], 30), lengths))
            for _ in range(2)
        )
        low, high = share_interval(before.tolist(), rows)
        shares += low <= 0.55 <= high
        _, low, high = difference_with_interval(before.tolist(), after.tolist(), rows)
        differences += low <= 0 <= high
        false_alarms += two_sided_p(before.tolist(), after.tolist(), rows) < 0.05
    assert 0.92 <= shares / 400 <= 0.99
    assert 0.93 <= differences / 400 <= 0.99
    assert false_alarms / 400 <= 0.06


def test_a_studys_columns_are_conversations_with_the_same_mean() -> None:
    """Sums for differences, deviations from the mean for shares; seeds may have fewer of them."""
    table = np.array([BEFORE, AFTER])
    rows = [PAIRS, [0, 0, 0, 0, 1, 1, 1, 1]]
    sums = by_conversation(table, rows)
    assert sums.mean(1) == pytest.approx(table.mean(1))
    assert sums[0] == pytest.approx([1.0, 0.5, 0.0, 1.0])
    around = by_conversation(table, rows, around_mean=True)
    assert around.mean(1) == pytest.approx(table.mean(1))
    alike = by_conversation(np.ones((1, 5)), [[0, 0, 0, 1, 2]], around_mean=True)
    assert alike.tolist() == [[1.0, 1.0, 1.0]]  # all right: other lengths are no spread
