"""Intervals and tests for shares of right answers: of one stage, of two on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import binomtest

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

    All three are shares (0.01 is one point), above 0 where `after` has more right. The interval
    is Tango's score interval: unlike the normal one it holds where few questions changed sides,
    and it has a width even where none did (Tango 1998, Statistics in Medicine 17:891-908; among
    those that Fagerland, Lydersen and Laake recommend, 2014, Statistics in Medicine
    33:2850-2875).

    Args:
        before: Right or wrong, a flag a question.
        after: The same of the other stage, in the same order.
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


def score_of(acc: float, fmt: float, alpha: float) -> float:
    """Return alpha * Acc + (1 - alpha) * Fmt; the paper's Score has alpha = 0.7."""
    return alpha * acc + (1 - alpha) * fmt
