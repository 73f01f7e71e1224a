"""Intervals and tests over seeds and questions hold in simulated studies."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from sftkey.study.seeds import (
    Supposed,
    corrected,
    detectable_difference,
    difference_p,
    estimate,
    interval,
    observed,
    seeds_needed,
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


def covered(found: tuple[Any, Any, Any], truth: float) -> float:
    """Return the share of intervals that hold the truth."""
    _, low, high = found
    return float(((low <= truth) & (truth <= high)).mean())


@pytest.mark.parametrize("spread", [0.0, 0.03])
@pytest.mark.parametrize("same", [True, False], ids=["same questions", "other questions"])
@pytest.mark.parametrize(("num_seeds", "num_questions"), [(2, 100), (3, 200), (5, 100)])
def test_intervals_cover_the_truth(
    num_seeds: int, num_questions: int, same: bool, spread: float
) -> None:
    """At nominal 95%, at least 93% of shares and differences lie inside, with few seeds too."""
    arm, control = studies(1500, num_seeds, num_questions, same=same, spread=spread)
    assert covered(interval(arm, control, same), 0.0) >= 0.93
    assert covered(interval(control, same_questions=same), 0.5) >= 0.93


def test_simulated_coverage_can_fail() -> None:
    """Questions alone, or seeds alone, give intervals that the same simulation finds too short."""
    arm, control = studies(1500, 3, 200, same=True, spread=0.03)
    flat = [flags.reshape(1500, 1, 600) for flags in (arm, control)]
    assert covered(interval(*flat), 0.0) < 0.9
    _, control = studies(1500, 3, 200, same=True, spread=0.0)
    hard = np.broadcast_to(control[:, :1], control.shape)  # all seeds answer alike
    means = hard.mean(-1)
    half = 4.303 * means.std(-1, ddof=1) / np.sqrt(3)
    assert (abs(means.mean(-1) - 0.5) <= half).mean() < 0.2
    assert covered(interval(hard), 0.5) >= 0.93


def test_seeds_that_differ_have_students_interval() -> None:
    """Three shares of 0.42, 0.5 and 0.58 (of the flags and four added ones): two degrees left."""
    flags = np.arange(96) < np.array([[40], [48], [56]])
    low, high = estimate(flags, same_questions=False).interval
    half = student.ppf(0.975, 2) * 0.08 / np.sqrt(3)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))


@pytest.mark.parametrize("share", [0.97, 0.995])
def test_shares_near_one_are_covered(share: float) -> None:
    """Where hardly a flag differs, shares and differences keep a width."""
    dice = np.random.default_rng(3)
    arm, control = dice.random((2, 1500, 3, 100)) < share
    assert covered(interval(arm), share) >= 0.93
    assert covered(interval(arm, control), 0.0) >= 0.93
    flags = np.ones((3, 100), dtype=bool)
    low, high = estimate(flags).interval
    assert (round(low, 3), high) == (0.954, 1.0)
    many = np.ones((6, 500), dtype=bool)
    assert estimate(many, same_questions=False).interval[1] == 1.0
    assert estimate(~many, same_questions=False).interval[0] == 0.0
    assert estimate(many, ~many, same_questions=False).interval[1] == 1.0
    low, high = estimate(flags, flags).interval
    assert (round(low, 4), round(high, 4)) == (-0.0193, 0.0193)


def shown(arm: Any, control: Any, same: bool) -> float:
    """Return the share of studies that show a difference."""
    return float((difference_p(arm, control, same) < 0.05).mean())


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


def test_the_detectable_difference_shrinks_with_questions_and_seeds() -> None:
    """More of either find less; more arms, or seeds that differ more, need more."""
    plain = detectable_difference(500, 3) or 0.0
    assert (detectable_difference(2000, 3) or 1.0) < plain
    assert (detectable_difference(500, 5) or 1.0) < plain
    assert (detectable_difference(500, 3, num_arms=6) or 0.0) > plain
    assert (detectable_difference(500, 3, Supposed(between_seeds=0.05)) or 0.0) > plain
    assert detectable_difference(1, 3) == 1.0


def test_one_seed_detects_nothing() -> None:
    """Of two runs no number of questions tells what other runs would give."""
    assert detectable_difference(100_000, 1) is None


def test_a_wish_says_how_many_seeds_it_needs() -> None:
    """One fewer finds less than was wished; a wish that is too small has no answer."""
    found = seeds_needed(0.05, 500, num_arms=5)
    assert found is not None
    assert (detectable_difference(500, found, num_arms=5) or 1.0) <= 0.05
    assert (detectable_difference(500, found - 1, num_arms=5) or 0.0) > 0.05
    assert seeds_needed(0.0001, 50) is None


@pytest.mark.parametrize("same", [True, False], ids=["same questions", "other questions"])
def test_what_is_supposed_is_estimated_from_trained_arms(same: bool) -> None:
    """Over many studies the estimates' means are what the flags were drawn with."""
    arm, control = studies(200, 6, 300, same=same, spread=0.05)
    tables = [(*flags, same) for flags in zip(arm, control, strict=True)]
    found = observed(tables)
    assert found is not None
    assert found.between_seeds == pytest.approx(0.05, abs=0.005)
    assert found.differing == pytest.approx((arm != control).mean())
    expected = BY_QUESTION**2 / 4 / found.differing if same else 0.0
    assert found.by_question == pytest.approx(expected, abs=0.02)
    assert observed([(arm[0, :1], control[0, :1], same)]) is None


@pytest.mark.parametrize("same", [True, False], ids=["same questions", "other questions"])
@pytest.mark.parametrize("num_seeds", [1, 2, 3, 6])
def test_p_is_the_smallest_alpha_whose_interval_excludes_zero(num_seeds: int, same: bool) -> None:
    """Below 0.05 where the shown interval is clear of 0, and only there; Student's by hand."""
    arm, control = studies(400, num_seeds, 100, same=same, spread=0.03, gain=0.06)
    ps = difference_p(arm, control, same)
    _, low, high = interval(arm, control, same)
    clear = (low > 0) | (high < 0)
    assert 0 < clear.mean() < 1
    assert ((ps < 0.05) == clear).all()


def test_p_is_students_where_only_seeds_differ() -> None:
    """Three gains of 0.10, 0.12 and 0.14 (of the flags and two added ones): two degrees left."""
    arm = np.arange(98) < np.array([[10], [12], [14]])
    p = float(difference_p(arm, np.zeros_like(arm), same_questions=False))
    values = np.array([0.10, 0.12, 0.14])
    assert p == pytest.approx(2 * student.sf(0.12 / (values.std(ddof=1) / np.sqrt(3)), 2))


def test_p_of_one_seed_is_that_of_its_questions() -> None:
    """Eight gains of 40 and the two added halves, against their own spread."""
    control = np.zeros((1, 40), dtype=bool)
    arm = control.copy()
    arm[0, :8] = True
    values = np.array([1.0] * 8 + [0.0] * 32 + [np.sqrt(0.5), -np.sqrt(0.5)])
    z = values.mean() / (values.std(ddof=1) / np.sqrt(42))
    assert float(difference_p(arm, control)) == pytest.approx(2 * norm.sf(z))
    assert float(difference_p(arm, arm)) == 1.0


def test_no_p_is_zero() -> None:
    """Where all seeds and questions say the same, p is tiny and above 0."""
    arm, control = np.ones((3, 100), dtype=bool), np.zeros((3, 100), dtype=bool)
    assert 0 < float(difference_p(arm, control)) < 1e-6


def test_seeds_that_disagree_are_no_evidence() -> None:
    """A gain of one seed alone has no small p, though so many flags by themselves would have."""
    control = np.zeros((3, 200), dtype=bool)
    arm = control.copy()
    arm[0, :30] = True
    low, high = estimate(arm, control).interval
    assert low < 0 < high


def test_a_primary_arm_is_tested_first_and_alone() -> None:
    """Its own p stays; the others are corrected among themselves, and never fall below it."""
    ps = {"a": 0.03, "b": 0.004, "c": 0.2}
    assert corrected(ps) == pytest.approx({"a": 0.06, "b": 0.012, "c": 0.2})
    assert corrected(ps, "a") == pytest.approx({"a": 0.03, "b": 0.03, "c": 0.2})
    assert corrected(ps, "c") == pytest.approx({"a": 0.2, "b": 0.2, "c": 0.2})
    assert corrected(ps, "not there") == corrected(ps)
