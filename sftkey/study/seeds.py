"""Intervals and tests of arms that were trained with several seeds, by seed and by question.

Flags stand in arrays `(…, S, Q)`: S seeds, Q questions. Two kinds of chance are in them: another
seed would have given another model, and other questions other flags. If all seeds answered the same
questions, what is hard about a question is hard for each of them, so S x Q flags are worth less
than as many questions; an interval over questions alone, or over seeds alone, is too short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from sftkey.evaluation.statistics import CHANCE, holm

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
LEAST_LOG_P = -100.0  # the logarithm of the smallest p that is told apart from 0
MOST_SEEDS = 50  # that are looked at for a wish
NUM_DRAWS, POWER = 20_000, 0.85  # studies that are drawn, and the share of them that show it
# Questions that nobody asked, which keep a width where all flags agree: of shares two right and
# two wrong (Agresti and Coull 1998), of paired differences one half of each kind (Agresti and Min
# 2005), whose squares sum to 1.
_ADDED_TO_SHARES: tuple[float, ...] = (0.0, 0.0, 1.0, 1.0)
_ADDED_TO_DIFFERENCES: tuple[float, ...] = (sqrt(0.5), -sqrt(0.5))


@dataclass(frozen=True)
class Estimate:
    """A share, or a difference of shares, with its 95% interval."""

    value: float
    interval: tuple[float, float]
    num_seeds: int
    num_questions: int


def interval(
    right: Any, control: Any = None, same_questions: bool = True
) -> tuple[Floats, Floats, Floats]:
    """Return the share of right flags `(…)` and the ends of its 95% interval over both chances.

    With a `control`, whose flags `(…, S, Q)` are of the same seeds and questions, it is how much
    larger the share is than that one's. `same_questions` tells whether all seeds answered the same.
    """
    values, least, added = np.asarray(right, dtype=np.float64), 0.0, _ADDED_TO_SHARES
    if control is not None:
        values, least, added = _difference(right, control), -1.0, _ADDED_TO_DIFFERENCES
    # Where all flags agree, the added ones draw both ends inwards.
    value, more = values.mean((-2, -1)), _with(values, added)
    centre, half = more.mean((-2, -1)), _parts(more, same_questions).half(CHANCE)
    low, high = np.minimum(centre - half, value), np.maximum(centre + half, value)
    return value, np.maximum(low, least), np.minimum(high, 1.0)


def estimate(right: Any, control: Any = None, same_questions: bool = True) -> Estimate:
    """Return the interval of flags `(S, Q)`, or with a control of the difference from it."""
    value, low, high = map(float, interval(right, control, same_questions))
    return Estimate(value, (low, high), *np.shape(right))


def difference_p(arm: Any, control: Any, same_questions: bool = True) -> Floats:
    """Return the two-sided p `(…)` of the difference of flags `(…, S, Q)`.

    It is the smallest alpha whose interval (`interval` has that of 0.05) excludes 0, so
    p and interval say the same, and both take seeds and questions as drawn by chance.
    """
    values = _with(_difference(arm, control), _ADDED_TO_DIFFERENCES)
    centre = values.mean((-2, -1))
    parts = _parts(values, same_questions)
    low, high = np.full_like(centre, LEAST_LOG_P), np.zeros_like(centre)
    for _ in range(60):  # the half width falls as alpha grows: bisect its logarithm
        middle = (low + high) / 2
        excluded = parts.half(np.exp(middle)) < np.abs(centre)
        low, high = np.where(excluded, low, middle), np.where(excluded, middle, high)
    return np.exp(high)


def corrected(ps: Mapping[str, float], primary: str | None = None) -> dict[str, float]:
    """Correct the p of several arms by Holm; the primary one is tested first, and alone.

    The others count only after it, so theirs is never below its own: the chance that any is
    called different by chance stays the same, and the primary one pays nothing for the others.
    """
    if primary is None or primary not in ps:
        return holm(ps)
    others = holm({name: p for name, p in ps.items() if name != primary})
    return {name: max(ps[primary], others.get(name, 0.0)) for name in ps}


@dataclass(frozen=True)
class Supposed:
    """What is supposed of a study before its results are looked at."""

    # Share of questions that arm and control of one seed answer differently.
    differing: float = 0.25
    # How much of that an arm does alike in all seeds; 0: each seed by chance.
    by_question: float = 0.3
    # Standard deviation of the true difference from seed to seed, as a share.
    between_seeds: float = 0.02


def observed(tables: Sequence[tuple[Any, Any, bool]]) -> Supposed | None:
    """Estimate what to suppose of a study from arms and controls that are trained already.

    The tables have of each arm its flags `(S, Q)`, its control's, and whether all seeds answered
    the same questions; what is found is the mean over those with two seeds or more, None without
    any.
    """
    found = []
    for arm, control, same_questions in tables:
        values = _difference(arm, control)
        num_seeds, num_questions = values.shape
        if num_seeds < 2 or num_questions < 2:
            continue
        parts, num_flags = _parts(values, same_questions), values.size
        by_seed = max(float(parts.by_seed - parts.noise), 0.0) * num_seeds
        by_question = max(float(parts.by_question - parts.noise), 0.0) * num_flags / num_seeds
        found.append(((values**2).mean(), by_question, by_seed))
    if not found:
        return None
    differing, by_question, by_seed = np.mean(found, axis=0)
    shared = by_question / differing if differing else 0.0
    return Supposed(float(differing), float(min(shared, 1.0)), sqrt(by_seed))


def detectable_difference(
    num_questions: int,
    num_seeds: int,
    supposed: Supposed | None = None,
    *,
    num_arms: int = 1,
    same_questions: bool = True,
) -> float | None:
    """Return the difference that is shown in at least four of five studies, as a share.

    Shown is one whose Holm-corrected p is below 0.05. The means are taken as normal and their
    squares as chi-squared, which real flags are not quite: so POWER is above 0.8.

    Args:
        num_questions: Of each seed.
        num_seeds: Of each arm.
        supposed: Default `Supposed()`.
        num_arms: How many are compared with the control; the worst case of Holm's correction.
        same_questions: Whether all seeds answer the same ones.

    Returns:
        None with one seed, which shows nothing of the ways of training.
    """
    if num_seeds == 1:
        return None
    dice = np.random.default_rng(0)
    drawn, parts = _drawn(num_questions, num_seeds, supposed or Supposed(), same_questions, dice)
    return float(min(1.0, np.quantile(parts.half(CHANCE / num_arms) - drawn, POWER)))


def seeds_needed(
    difference: float,
    num_questions: int,
    supposed: Supposed | None = None,
    *,
    num_arms: int = 1,
    same_questions: bool = True,
) -> int | None:
    """Return the fewest seeds whose `detectable_difference` is as small; None: over MOST_SEEDS."""
    for num_seeds in range(2, MOST_SEEDS + 1):
        found = detectable_difference(
            num_questions, num_seeds, supposed, num_arms=num_arms, same_questions=same_questions
        )
        if found is not None and found <= difference:
            return num_seeds
    return None


def _drawn(
    num_questions: int,
    num_seeds: int,
    supposed: Supposed,
    same_questions: bool,
    dice: np.random.Generator,
) -> tuple[Floats, _Parts]:
    """Draw differences of studies without a true one, and the parts of their intervals."""
    # Variances that a single flag has from its question, from chance, and (times Q) from its seed.
    question = supposed.differing * supposed.by_question if same_questions else 0.0
    rest = supposed.differing - question
    seed = num_questions * supposed.between_seeds**2
    num_flags = num_seeds * num_questions
    variance = (num_seeds * question + rest + seed) / num_flags

    def mean_square(expected: float, degrees: int) -> Floats:
        degrees = max(degrees, 1)  # of one question alone
        return expected / num_flags * dice.chisquare(degrees, NUM_DRAWS) / degrees

    # Each part is drawn as the mean square that estimates it would be.
    by_seed = mean_square(rest + seed, num_seeds - 1)
    if not same_questions:
        by_question = noise = mean_square(rest + question, num_seeds * (num_questions - 1))
    else:
        noise = mean_square(rest, (num_seeds - 1) * (num_questions - 1))
        by_question = mean_square(rest + num_seeds * question, num_questions - 1)
    parts = _Parts(by_seed, by_question, noise, num_seeds)
    return dice.normal(0.0, sqrt(variance), NUM_DRAWS), parts


@dataclass(frozen=True)
class _Parts:
    """What the half width of an interval is made of: variances of a mean of S x Q flags `(…)`."""

    by_seed: Any  # of the seeds, with the noise in it
    by_question: Any  # of the questions, with the noise in it
    noise: Any  # of single flags
    num_seeds: int  # how many the first was estimated from

    def half(self, alpha: Any) -> Any:
        """Return the half width of the interval that misses the truth with chance alpha.

        The parts of the seeds and of the questions are added as squared half widths, each with its
        own quantile: with few seeds Student's is large, and the sum is never too short for
        normal parts (Banerjee 1960). The noise is in both variances, and counts in one. What the
        questions alone give is the least that there can be.
        """
        degrees = self.num_seeds - 1
        seeds = stdtrit(degrees, alpha / 2) ** 2 * self.by_seed if degrees else 0.0
        normal = ndtri(alpha / 2) ** 2
        both = seeds + normal * np.maximum(self.by_question - self.noise, 0.0)
        return np.sqrt(np.maximum(both, normal * self.by_question))


def _parts(values: Any, same_questions: bool) -> _Parts:
    """Return the parts of flags `(…, S, Q)`, from the mean squares of a table seeds x questions."""
    # The sum of squares about the centre, taken apart: between seeds, and what is left in them.
    num_seeds, num_questions = values.shape[-2:]
    num_flags = num_seeds * num_questions
    means = values.mean(-1)
    centre = means.mean(-1)
    squares = (values**2).sum((-2, -1))
    seeds = num_questions * ((means - centre[..., None]) ** 2).sum(-1)
    left = np.maximum(squares - num_flags * centre**2 - seeds, 0.0)
    by_seed = seeds / max(num_seeds - 1, 1) / num_flags
    if num_seeds == 1 or not same_questions:  # a question's flag is one of its own
        noise = left / (num_seeds * (num_questions - 1)) / num_flags
        return _Parts(by_seed, noise, noise, num_seeds)
    # On the same questions what is left is taken apart once more: between questions, and noise.
    shared = num_seeds * (values.mean(-2) ** 2).sum(-1) - num_flags * centre**2
    noise = np.maximum(left - shared, 0.0) / ((num_seeds - 1) * (num_questions - 1)) / num_flags
    return _Parts(by_seed, shared / (num_questions - 1) / num_flags, noise, num_seeds)


def _difference(arm: Any, control: Any) -> Any:
    return np.asarray(arm, dtype=np.float64) - np.asarray(control, dtype=np.float64)


def _with(values: Any, added: tuple[float, ...]) -> Any:
    columns = np.broadcast_to(np.asarray(added), (*values.shape[:-1], len(added)))
    return np.concatenate([values, columns], axis=-1)
