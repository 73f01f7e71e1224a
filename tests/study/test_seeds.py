"""Intervals and tests over seeds and questions hold in simulated studies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student

from sftkey.study.seeds import (
    Supposed,
    detectable_difference,
    difference_estimate,
    difference_interval,
    holm,
    mean_estimate,
    mean_interval,
    sign_flip_p,
)

EASY, BY_QUESTION = 0.85, 0.2  # of a question, how often it is answered; how much an arm changes it


def studies(
    num: int, num_seeds: int, num_questions: int, *, same: bool, spread: float, gain: float = 0.0
) -> tuple[Any, Any]:
    """Draw flags `(num, S, Q)` of an arm and its control, whose true shares are 0.5 + gain and 0.5.

    Half of the questions are easy and half hard, an arm turns each a bit, and the true difference
    of each seed has the standard deviation `spread`.
    """
    dice = np.random.default_rng(7)
    questions = (num, 1 if same else num_seeds, num_questions)
    share = dice.choice([1 - EASY, EASY], size=questions)
    turn = dice.choice([-BY_QUESTION / 2, BY_QUESTION / 2], size=questions)
    seeds = spread * np.sqrt(0.5) * dice.standard_normal((2, num, num_seeds, 1))
    shape = (num, num_seeds, num_questions)
    arm = dice.random(shape) < share + turn / 2 + gain + seeds[0]
    control = dice.random(shape) < share - turn / 2 + seeds[1]
    return arm, control


def covered(interval: tuple[Any, Any, Any], truth: float) -> float:
    """Give the share of intervals that hold the truth."""
    _, low, high = interval
    return float(((low <= truth) & (truth <= high)).mean())


@pytest.mark.parametrize("spread", [0.0, 0.03])
@pytest.mark.parametrize("same", [True, False], ids=["same questions", "other questions"])
@pytest.mark.parametrize(("num_seeds", "num_questions"), [(2, 100), (3, 200), (5, 100)])
def test_intervals_cover_the_truth(
    num_seeds: int, num_questions: int, same: bool, spread: float
) -> None:
    """At nominal 95%, at least 93% of shares and differences lie inside, with few seeds too."""
    arm, control = studies(1500, num_seeds, num_questions, same=same, spread=spread)
    assert covered(difference_interval(arm, control, same), 0.0) >= 0.93
    assert covered(mean_interval(control, same), 0.5) >= 0.93


def test_simulated_coverage_can_fail() -> None:
    """Questions alone, or seeds alone, give intervals that the same simulation finds too short."""
    arm, control = studies(1500, 3, 200, same=True, spread=0.03)
    flat = [flags.reshape(1500, 1, 600) for flags in (arm, control)]
    assert covered(difference_interval(*flat), 0.0) < 0.9
    _, control = studies(1500, 3, 200, same=True, spread=0.0)
    hard = np.broadcast_to(control[:, :1], control.shape)  # all seeds answer alike
    means = hard.mean(-1)
    half = 4.303 * means.std(-1, ddof=1) / np.sqrt(3)
    assert (abs(means.mean(-1) - 0.5) <= half).mean() < 0.2
    assert covered(mean_interval(hard), 0.5) >= 0.93


def test_seeds_that_differ_have_students_interval() -> None:
    """Three shares of 0.42, 0.5 and 0.58 (of the flags and four added ones): two degrees left."""
    flags = np.arange(96) < np.array([[40], [48], [56]])
    low, high = mean_estimate(flags, same_questions=False).interval
    half = student.ppf(0.975, 2) * 0.08 / np.sqrt(3)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))


@pytest.mark.parametrize("share", [0.97, 0.995])
def test_shares_near_one_are_covered(share: float) -> None:
    """Where hardly a flag differs, shares and differences keep a width."""
    dice = np.random.default_rng(3)
    arm, control = dice.random((2, 1500, 3, 100)) < share
    assert covered(mean_interval(arm), share) >= 0.93
    assert covered(difference_interval(arm, control), 0.0) >= 0.93
    flags = np.ones((3, 100), dtype=bool)
    low, high = mean_estimate(flags).interval
    assert (round(low, 3), high) == (0.954, 1.0)
    low, high = difference_estimate(flags, flags).interval
    assert (round(low, 4), round(high, 4)) == (-0.0193, 0.0193)


def shown(arm: Any, control: Any, same: bool) -> float:
    """Give the share of studies that show a difference: by their interval and by p."""
    _, low, high = difference_interval(arm, control, same)
    clear = (low > 0) | (high < 0)
    found = [
        bool(away) and sign_flip_p(*flags, same, num_flips=199) < 0.05
        for *flags, away in zip(arm, control, clear, strict=True)
    ]
    return float(np.mean(found))


@pytest.mark.parametrize("spread", [0.0, 0.03])
@pytest.mark.parametrize("same", [True, False], ids=["same questions", "other questions"])
def test_the_detectable_difference_is_found(same: bool, spread: float) -> None:
    """It is shown in at least 80% of 500 studies, and a gain of 0 in no more than 5%."""
    control_like = studies(500, 3, 200, same=same, spread=spread)
    differing = float((control_like[0] != control_like[1]).mean())
    supposed = Supposed(differing, BY_QUESTION**2 / 4 / differing, spread)
    gain = detectable_difference(200, 3, supposed, same_questions=same)
    assert 0.05 < gain < 0.2
    assert shown(*studies(500, 3, 200, same=same, spread=spread, gain=gain), same) >= 0.8
    assert shown(*control_like, same) <= 0.05


def test_the_detectable_difference_of_one_seed_is_found() -> None:
    """One seed says nothing of others; its questions alone show what they can."""
    control_like = studies(500, 1, 200, same=True, spread=0.0)
    differing = float((control_like[0] != control_like[1]).mean())
    gain = detectable_difference(200, 1, Supposed(differing, 0.3, 0.0))
    assert 0.05 < gain < 0.2
    assert shown(*studies(500, 1, 200, same=True, spread=0.0, gain=gain), True) >= 0.8
    assert shown(*control_like, True) <= 0.05


def test_the_detectable_difference_shrinks_with_questions_and_seeds() -> None:
    """More of either find less; more arms, or seeds that differ more, need more."""
    plain = detectable_difference(500, 3)
    assert detectable_difference(2000, 3) < plain
    assert detectable_difference(500, 5) < plain
    assert detectable_difference(500, 3, num_arms=6) > plain
    assert detectable_difference(500, 3, Supposed(between_seeds=0.03)) > plain
    assert detectable_difference(2000, 1) < detectable_difference(500, 1) < 0.1
    assert detectable_difference(1, 1) == 1.0


def test_the_permutation_test_is_exact_where_seeds_make_no_difference() -> None:
    """Labels of questions that mean nothing give p below 0.05 in about 5% of studies."""
    arm, control = studies(400, 3, 100, same=True, spread=0.0)
    ps = [sign_flip_p(*flags, num_flips=199) for flags in zip(arm, control, strict=True)]
    assert 0.02 <= np.mean(np.array(ps) <= 0.05) <= 0.085


def test_one_seed_is_a_sign_test() -> None:
    """With one seed, 8 gains and no loss have the p of eight coins that fall alike."""
    control = np.zeros((1, 40), dtype=bool)
    arm = control.copy()
    arm[0, :8] = True
    assert sign_flip_p(arm, control) == pytest.approx(2 / 2**8, abs=0.004)
    assert sign_flip_p(arm, arm) == 1.0


def test_no_p_is_zero() -> None:
    """Where no swap comes near, the labels as they are count still: one of 100."""
    arm, control = np.ones((3, 100), dtype=bool), np.zeros((3, 100), dtype=bool)
    assert sign_flip_p(arm, control, num_flips=99) == 1 / 100


def test_seeds_that_disagree_are_no_evidence() -> None:
    """A gain of one seed alone has no small p, though so many flags by themselves would have."""
    control = np.zeros((3, 200), dtype=bool)
    arm = control.copy()
    arm[0, :30] = True
    low, high = difference_estimate(arm, control).interval
    assert low < 0 < high


def test_holm_by_hand() -> None:
    """0.01 x 4, 0.02 x 3, 0.022 x 2 which can't be below the one before it, 0.9."""
    ps = {"d": 0.9, "a": 0.01, "c": 0.022, "b": 0.02}
    assert holm(ps) == pytest.approx({"d": 0.9, "a": 0.04, "c": 0.06, "b": 0.06})
    assert list(holm(ps)) == ["d", "a", "c", "b"]
    assert holm({"a": 0.8, "b": 0.7}) == {"a": 1.0, "b": 1.0}
