"""Intervals and tests of arms that were trained with several seeds, by seed and by question.

Flags stand in arrays `(…, S, Q)`: S seeds, Q questions. Two kinds of chance are in them: another
seed would have given another model, and other questions other flags. If all seeds answered the same
questions, what is hard about a question is hard for each of them, so S x Q flags are worth less
than as many questions; an interval over questions alone, or over seeds alone, is too short.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from sftkey.evaluation.statistics import Z_95

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
FLIPS = 9_999
CHANCE = 0.05
# Questions that nobody asked, which keep a width where all flags agree: of shares two right and
# two wrong (Agresti and Coull 1998), of paired differences one half of each kind (Agresti and Min
# 2005), whose squares sum to 1.
_ADDED_TO_SHARES = (0.0, 0.0, 1.0, 1.0)
_ADDED_TO_DIFFERENCES = (sqrt(0.5), -sqrt(0.5))


@dataclass(frozen=True)
class Estimate:
    """A share, or a difference of shares, with its 95% interval."""

    value: float
    interval: tuple[float, float]
    num_seeds: int
    num_questions: int


def mean_interval(right: Any, same_questions: bool = True) -> tuple[Floats, Floats, Floats]:
    """Give the share of right flags `(…)` and the ends of its 95% interval over both chances."""
    values = np.asarray(right, dtype=np.float64)
    low, high = _ends(_with(values, _ADDED_TO_SHARES), same_questions)
    return values.mean((-2, -1)), np.maximum(low, 0.0), np.minimum(high, 1.0)


def difference_interval(
    arm: Any, control: Any, same_questions: bool = True
) -> tuple[Floats, Floats, Floats]:
    """Give how much more an arm has right `(…)` and the ends of its 95% interval.

    Args:
        arm: Flags `(…, S, Q)`.
        control: Those of the same seeds and questions.
        same_questions: Whether all seeds answered the same ones.
    """
    values = _difference(arm, control)
    low, high = _ends(_with(values, _ADDED_TO_DIFFERENCES), same_questions)
    return values.mean((-2, -1)), np.maximum(low, -1.0), np.minimum(high, 1.0)


def mean_estimate(right: Any, same_questions: bool = True) -> Estimate:
    """Give the interval of flags `(S, Q)`."""
    value, low, high = map(float, mean_interval(right, same_questions))
    return Estimate(value, (low, high), *np.shape(right))


def difference_estimate(arm: Any, control: Any, same_questions: bool = True) -> Estimate:
    """Give the interval of the difference of flags `(S, Q)`."""
    value, low, high = map(float, difference_interval(arm, control, same_questions))
    return Estimate(value, (low, high), *np.shape(arm))


def sign_flip_p(
    arm: Any, control: Any, same_questions: bool = True, num_flips: int = FLIPS, seed: int = 0
) -> float:
    """Give the two-sided p of a permutation test of flags `(S, Q)`.

    With 3 seeds there are 8 ways of swapping whole runs, so that no p below 0.25 could come. So
    the labels of arm and control are swapped question by question, in all seeds at once, since
    the seeds' flags of one question hang together. Where seeds make no difference this is exact.
    Where they do, questions aren't exchangeable by themselves; the statistic is therefore
    the difference over its own half width, which holds the seeds' spread (studentized: Janssen
    1997; Chung and Romano 2013), and tests simulate that it is kept then too.
    """
    values = _with(_difference(arm, control), _ADDED_TO_DIFFERENCES)
    num_seeds, num_columns = values.shape
    dice = np.random.default_rng(seed)
    shape = (num_flips, num_columns) if same_questions else (num_seeds, num_flips, num_columns)
    signs = 1.0 - 2.0 * dice.integers(0, 2, size=shape, dtype=np.int8).astype(np.float32)
    signs[..., -len(_ADDED_TO_DIFFERENCES) :] = 1.0
    means = np.einsum("...fq,sq->fs" if same_questions else "sfq,sq->fs", signs, values)
    flipped = _ratio(means / num_columns, values, same_questions)
    observed = _ratio(values.mean(1)[None], values, same_questions)[0]
    return float((1 + (flipped >= observed * (1 - 1e-9)).sum()) / (num_flips + 1))


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Correct the p of several arms against one control (Holm 1979).

    scipy has only the corrections of the false discovery rate, which promise less.
    """
    corrected: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(ps, key=lambda name: ps[name])):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in ps}


@dataclass(frozen=True)
class Supposed:
    """What is supposed of a study before its results are looked at.

    Args:
        differing: Share of questions that arm and control of one seed answer differently.
        by_question: How much of that an arm does alike in all seeds; 0: each seed by chance.
        between_seeds: Standard deviation of the true difference from seed to seed, as a share.
    """

    differing: float = 0.25
    by_question: float = 0.3
    between_seeds: float = 0.01


def detectable_difference(
    num_questions: int,
    num_seeds: int,
    supposed: Supposed | None = None,
    *,
    num_arms: int = 1,
    same_questions: bool = True,
    power: float = 0.85,
) -> float:
    """Give the difference that is shown in at least four of five studies, as a share.

    Shown is one whose interval is clear of 0 and whose Holm-corrected p is below 0.05. The means
    are taken as normal and their squares as chi-squared, which real flags are not quite: so `power`
    is above 0.8.

    Args:
        num_questions: Of each seed.
        num_seeds: Of each arm.
        supposed: Default `Supposed()`.
        num_arms: How many are compared with the control; the worst case of Holm's correction.
        same_questions: Whether all seeds answer the same ones.
        power: Share of drawn studies that show it.
    """
    supposed = supposed or Supposed()
    dice = np.random.default_rng(0)
    drawn, halves = _drawn(num_questions, num_seeds, supposed, same_questions, dice)
    without = Supposed(supposed.differing, supposed.by_question, 0.0)
    swapped, swapped_halves = _drawn(num_questions, num_seeds, without, same_questions, dice)
    wanted = np.quantile(np.abs(swapped) / swapped_halves, 1 - CHANCE / num_arms)
    return float(min(1.0, np.quantile(max(1.0, wanted) * halves - drawn, power)))


def _drawn(
    num_questions: int,
    num_seeds: int,
    supposed: Supposed,
    same_questions: bool,
    dice: np.random.Generator,
    num_draws: int = 40_000,
) -> tuple[Floats, Floats]:
    """Draw differences of studies without a true one, and the half widths of their intervals."""
    question = supposed.differing * supposed.by_question if same_questions else 0.0
    rest = supposed.differing - question
    seed = num_questions * supposed.between_seeds**2
    num_flags = num_seeds * num_questions
    variance = (num_seeds * question + rest + seed) / num_flags

    def mean_square(expected: float, degrees: int) -> Floats:
        degrees = max(degrees, 1)  # of one question alone
        return expected * dice.chisquare(degrees, num_draws) / degrees

    by_seed = mean_square(rest + seed, num_seeds - 1) if num_seeds > 1 else np.zeros(num_draws)
    if num_seeds == 1 or not same_questions:
        by_question = noise = mean_square(rest + question, num_seeds * (num_questions - 1))
    else:
        noise = mean_square(rest, (num_seeds - 1) * (num_questions - 1))
        by_question = mean_square(rest + num_seeds * question, num_questions - 1)
    squared = _squared_half(by_seed, by_question, noise, num_seeds, num_flags)
    return dice.normal(0.0, sqrt(variance), num_draws), np.sqrt(squared)


def _squared_half(
    by_seed: Any, by_question: Any, noise: Any, num_seeds: int, num_flags: int
) -> Any:
    """Give the square of the half width from the mean squares of a table seeds x questions.

    The parts of the seeds and of the questions are added as squared half widths, each with its
    own quantile: with few seeds Student's is large, and the sum is never too short for
    normal parts (Banerjee 1960). The noise is in both mean squares, and counts in one. What the
    questions alone give is the least that there can be.
    """
    quantile = student.ppf(1 - CHANCE / 2, num_seeds - 1) if num_seeds > 1 else 0.0
    seeds = quantile**2 * by_seed
    questions = Z_95**2 * by_question
    both = seeds + np.maximum(questions - Z_95**2 * noise, 0.0)
    return np.maximum(both, questions) / num_flags


def _from_means(means: Any, values: Any, same_questions: bool) -> Any:
    """Give squared half widths of flags whose means by seed are `means`.

    Args:
        means: `(…, S)`.
        values: `(…, S, Q)`, or one table whose signs alone differ from those of the means.
        same_questions: Whether all seeds answered the same questions.
    """
    num_seeds, num_questions = values.shape[-2:]
    num_flags = num_seeds * num_questions
    centre = means.mean(-1)
    squares = (values**2).sum((-2, -1))
    seeds = num_questions * ((means - centre[..., None]) ** 2).sum(-1)
    left = np.maximum(squares - num_flags * centre**2 - seeds, 0.0)
    by_seed = seeds / max(num_seeds - 1, 1)
    if num_seeds == 1 or not same_questions:  # a question's flag is one of its own
        noise = left / (num_seeds * (num_questions - 1))
        return _squared_half(by_seed, noise, noise, num_seeds, num_flags)
    shared = num_seeds * (values.mean(-2) ** 2).sum(-1) - num_flags * centre**2
    noise = np.maximum(left - shared, 0.0) / ((num_seeds - 1) * (num_questions - 1))
    by_question = shared / (num_questions - 1)
    return _squared_half(by_seed, by_question, noise, num_seeds, num_flags)


def _ends(values: Any, same_questions: bool) -> tuple[Any, Any]:
    half = np.sqrt(_from_means(values.mean(-1), values, same_questions))
    centre = values.mean((-2, -1))
    return centre - half, centre + half


def _ratio(means: Any, values: Any, same_questions: bool) -> Any:
    return np.abs(means.mean(-1)) / np.sqrt(_from_means(means, values, same_questions))


def _difference(arm: Any, control: Any) -> Any:
    return np.asarray(arm, dtype=np.float64) - np.asarray(control, dtype=np.float64)


def _with(values: Any, added: tuple[float, ...]) -> Any:
    columns = np.broadcast_to(np.asarray(added), (*values.shape[:-1], len(added)))
    return np.concatenate([values, columns], axis=-1)
