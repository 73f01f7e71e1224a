"""Intervals and tests of shares of right answers: of one stage, and of two on the same questions.

Where a row asks several questions, a conversation counts as one draw: its turns hang together, so
that 100 turns of 10 conversations say less than 100 questions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import binomtest
from scipy.stats import t as student

CHANCE = 0.05  # p below which a difference isn't chance
Z_95 = 1.959963984540054  # the normal quantile at 0.975: every interval here is a 95% one


def wilson(num_right: int, num_questions: int) -> tuple[float, float]:
    """Return Wilson's score interval of a share; without a question it is all of [0, 1].

    It holds for few questions and for shares near 0 and 1, where the normal interval doesn't
    (Wilson 1927; Brown, Cai and DasGupta 2001).
    """
    if num_questions == 0:
        return 0.0, 1.0
    interval = binomtest(num_right, num_questions).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """Return the difference of two shares on the same questions, and the ends of its 95% interval.

    All three are shares (0.01 is one point), above 0 where `after` has more right; both have a flag
    a question, in one order. The interval is Tango's score interval: unlike the normal one it holds
    where few questions changed sides, and it has a width even where none did (Tango 1998,
    Statistics in Medicine 17:891-908; among those that Fagerland, Lydersen and Laake recommend,
    2014, Statistics in Medicine 33:2850-2875).
    """
    gains, losses = discordant(before, after)
    num_questions = len(before)
    if num_questions == 0:
        return 0.0, -1.0, 1.0
    estimate = (gains - losses) / num_questions

    def score(difference: float) -> float:
        return _tango_score(difference, gains, losses, num_questions)

    edge = 1 - 1e-12  # at -1 and 1 themselves the variance is 0
    low, high = -1.0, 1.0
    if estimate > -1:
        low = float(brentq(lambda x: score(x) - Z_95, -edge, estimate))
    if estimate < 1:
        high = float(brentq(lambda x: score(x) + Z_95, estimate, edge))
    return estimate, low, high


def paired_p(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Return the two-sided p of the difference: the smallest alpha whose interval excludes 0.

    Under no difference Tango's score is McNemar's without a correction, which holds what it
    promises almost everywhere and wastes less than the exact one (Fagerland, Lydersen and Laake
    2013, BMC Medical Research Methodology 13:91).
    """
    gains, losses = discordant(before, after)
    return float(2 * ndtr(-abs(_tango_score(0.0, gains, losses, len(before)))))


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Correct the p of several comparisons (Holm 1979), so that any by chance is one in twenty.

    scipy has only the corrections of the false discovery rate, which promise less.
    """
    corrected: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(ps, key=lambda name: ps[name])):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in ps}


def chance_of_worse(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Return the p of McNemar's exact test against one side: that `after` has fewer right.

    For a warning, which asks whether something got worse and not whether it changed.
    """
    gains, losses = discordant(before, after)
    if gains + losses == 0:
        return 1.0
    return float(binomtest(losses, gains + losses, 0.5, alternative="greater").pvalue)


def flipped(
    before: Sequence[bool], after: Sequence[bool], rows: Rows
) -> tuple[int, int, int, int, float]:
    """Count what is right before and after, and what was lost and gained; with `one_sided_p`."""
    gains, losses = discordant(before, after)
    return sum(before), sum(after), losses, gains, one_sided_p(before, after, rows)


def discordant(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    """Count the questions that only `after` has right, and those that only `before` has right."""
    pairs = list(zip(before, after, strict=True))
    gains = sum(not old and new for old, new in pairs)
    losses = sum(old and not new for old, new in pairs)
    return gains, losses


def _tango_score(difference: float, gains: int, losses: int, num_questions: int) -> float:
    """Standardize the observed difference under a supposed one; falls as the latter grows.

    `loss` is the likeliest probability of a loss if that of a gain is `loss + difference`: the
    larger root of 2n q^2 + b q - c = 0 (Tango's equation for q21).
    """
    b = -(gains + losses) + (2 * num_questions - gains + losses) * difference
    c = losses * difference * (1 - difference)
    root = sqrt(max(b * b + 8 * num_questions * c, 0.0))
    loss = max((root - b) / (4 * num_questions), -difference, 0.0)
    variance = num_questions * (2 * loss + difference * (1 - difference))
    numerator = gains - losses - num_questions * difference
    if variance <= 0:  # a supposed 0 where no question changed sides
        return 0.0
    return numerator / sqrt(variance)


def p_text(p: float) -> str:
    """Write a p, as short as it may be."""
    return "p<0.001" if p < 0.001 else f"p {p:.3f}"


def points_text(interval: tuple[float, float]) -> str:
    """Write an interval of a difference of shares in percentage points."""
    return "[{:+.1f}, {:+.1f}]".format(*(100 * end for end in interval))


def gain_text(difference: float, interval: tuple[float, float]) -> str:
    """Write a difference of shares in percentage points, and its interval.

    >>> gain_text(0.012, (-0.005, 0.031))
    '+1.2 points [-0.5, +3.1]'
    """
    return f"{100 * difference:+.1f} points {points_text(interval)}"


def score_of(acc: float, fmt: float, alpha: float) -> float:
    """Return alpha * Acc + (1 - alpha) * Fmt; the paper's Score has alpha = 0.7."""
    return alpha * acc + (1 - alpha) * fmt


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
    seen: then it is the number of conversations. `rows` has the conversation of each flag.
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

    The arguments are those of `paired_difference`, and the conversation of each question. Over
    conversations it is the interval of a mean of clusters with Student's quantile, two
    conversations added that nobody had, one half of each kind, so that it keeps a width where
    nothing changed (as Agresti and Min 2005 do with questions).
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
