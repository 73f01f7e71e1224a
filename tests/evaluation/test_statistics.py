"""Intervals and tests: published figures, exact coverage, symmetries."""

from itertools import product
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binom, multinomial, norm

from sftkey.evaluation.statistics import Z_95, holm, paired_difference, paired_p, wilson

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def flags(both: int, losses: int, gains: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Lay a 2x2 table out as one pair of flags a question."""
    before = [True] * (both + losses) + [False] * (gains + neither)
    after = [True] * both + [False] * losses + [True] * gains + [False] * neither
    return before, after


def test_wilson_gives_the_published_interval() -> None:
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, Statistics in Medicine 17:857-872, table I)."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_wilson_has_a_width_at_none_at_all_and_without_questions() -> None:
    """No share is sure: 0 of n, n of n and 0 of 0 have intervals of the right side and width."""
    square = Z_95**2
    assert wilson(0, 10) == pytest.approx((0, square / (10 + square)))
    assert wilson(10, 10) == pytest.approx((10 / (10 + square), 1))
    assert wilson(0, 0) == (0.0, 1.0)


def test_paired_difference_gives_the_published_interval() -> None:
    """Cavo 2012, as in Fagerland, Lydersen and Laake's book of contingency tables, chapter 8."""
    expected = (-0.0621, -0.1240, -0.0054)
    assert paired_difference(*flags(59, 16, 6, 80)) == pytest.approx(expected, abs=5e-5)


def test_paired_difference_has_a_width_where_no_question_changed_sides() -> None:
    """With no discordant pair the ends are z^2 / (n + z^2) from 0."""
    width = Z_95**2 / (50 + Z_95**2)
    assert paired_difference(*flags(20, 0, 0, 30)) == pytest.approx((0, -width, width), abs=1e-6)


def test_paired_difference_of_all_gains_ends_at_one() -> None:
    """The interval doesn't leave [-1, 1]."""
    difference, low, high = paired_difference(*flags(0, 0, 5, 0))
    assert (difference, high) == (1, 1)
    assert 0 < low < 1
    assert paired_difference([], []) == (0.0, -1.0, 1.0)


@given(PAIRS)
@settings(max_examples=50)
def test_paired_difference_inverts_the_score_test(pairs: list[tuple[bool, bool]]) -> None:
    """At each end, with the likelihood maximized by a search, the score is z."""
    before, after = [old for old, _ in pairs], [new for _, new in pairs]
    n = len(pairs)
    gains = sum(new > old for old, new in pairs)
    losses = sum(old > new for old, new in pairs)
    difference, low, high = paired_difference(before, after)
    assert low <= difference <= high
    for end in (low, high):
        if abs(end) == 1:
            continue

        def unlikeliness(loss: float, end: float = end) -> float:
            chances = [loss + end, loss, 1 - 2 * loss - end]
            counts = [gains, losses, n - gains - losses]
            return float(
                -multinomial.logpmf(counts, n, [max(chance, 1e-300) for chance in chances])
            )

        bounds = (max(0.0, -end), (1 - end) / 2)
        loss = minimize_scalar(
            unlikeliness, bounds=bounds, method="bounded", options={"xatol": 1e-9}
        ).x
        score = n * (difference - end) / sqrt(n * (2 * loss + end - end**2))
        assert abs(score) == pytest.approx(Z_95, rel=2e-3)


@given(PAIRS)
@settings(max_examples=50)
def test_paired_difference_turns_its_sign_with_the_order(pairs: list[tuple[bool, bool]]) -> None:
    """Exchanging the stages mirrors the interval."""
    before, after = [old for old, _ in pairs], [new for _, new in pairs]
    difference, low, high = paired_difference(before, after)
    assert paired_difference(after, before) == pytest.approx((-difference, -high, -low), abs=1e-6)


@pytest.mark.parametrize("chances", [(0.02, 0.02), (0.05, 0.01), (0.2, 0.1), (0.3, 0.3), (0.1, 0)])
def test_paired_difference_covers_the_truth(chances: tuple[float, float]) -> None:
    """Over all tables of 50 questions the interval holds the true difference 94% of the time."""
    n = 50
    gain, loss = chances
    covered = 0.0
    for gains, losses in product(range(n + 1), repeat=2):
        if gains + losses > n:
            continue
        chance = multinomial.pmf(
            [gains, losses, n - gains - losses], n, [gain, loss, 1 - gain - loss]
        )
        if chance > 1e-7:
            _, low, high = paired_difference(*flags(0, losses, gains, n - gains - losses))
            covered += chance * (low <= gain - loss <= high)
    assert covered >= 0.94


@given(PAIRS)
@settings(max_examples=50)
def test_p_is_the_score_of_the_questions_that_changed_sides(
    pairs: list[tuple[bool, bool]],
) -> None:
    """It is a normal's two tails at (gains - losses) / sqrt(gains + losses)."""
    gains = sum(new > old for old, new in pairs)
    losses = sum(old > new for old, new in pairs)
    z = abs(gains - losses) / sqrt(max(gains + losses, 1))
    assert paired_p(*zip(*pairs, strict=True)) == pytest.approx(2 * norm.sf(z))


@pytest.mark.parametrize(("gains", "losses"), [(4, 0), (3, 0), (12, 3), (12, 4), (0, 5), (30, 16)])
def test_p_and_interval_say_the_same(gains: int, losses: int) -> None:
    """It is below 0.05 where the interval excludes 0, and only there."""
    pair = flags(50, losses, gains, 150 - gains - losses)
    _, low, high = paired_difference(*pair)
    assert (paired_p(*pair) < 0.05) == (low > 0 or high < 0)


def test_p_promises_what_it_holds() -> None:
    """Over all tables of 60 questions without a difference it is below 0.05 in 6% at the most."""
    for share in (0.05, 0.2, 0.5, 0.9):
        wrong = 0.0
        for changed in range(61):
            gains = np.arange(changed + 1)
            below = [paired_p(*flags(0, changed - n, n, 60 - changed)) < 0.05 for n in gains]
            chance = binom.pmf(changed, 60, share)
            wrong += chance * binom.pmf(gains, changed, 0.5)[below].sum()
        assert wrong <= 0.06


def test_holm_by_hand() -> None:
    """0.01 x 4, 0.02 x 3, 0.022 x 2 which can't be below the one before it, 0.9."""
    ps = {"d": 0.9, "a": 0.01, "c": 0.022, "b": 0.02}
    assert holm(ps) == pytest.approx({"d": 0.9, "a": 0.04, "c": 0.06, "b": 0.06})
    assert list(holm(ps)) == ["d", "a", "c", "b"]
    assert holm({"a": 0.8, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_flags_of_unequal_number_are_refused() -> None:
    """Pairs need the same questions on both sides."""
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter than argument 1"):
        paired_difference([True, False], [True])
