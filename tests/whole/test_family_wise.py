"""A study calls an arm better or worse by chance in no more than one of twenty, in simulations."""

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftkey.study.seeds import CHANCE, corrected, difference_p

NUM_STUDIES, NUM_QUESTIONS = 2_000, 500
CHUNK = 200  # studies in memory at once
NUM_ARMS, NUM_SEEDS, SPREADS = (2, 5, 10), (3, 6), (0.0, 0.02, 0.05)
MOST = 0.06
DOCS = Path(__file__).parents[2] / "docs" / "does-it-help.md"

pytestmark = pytest.mark.slow


def drawn(
    num_seeds: int, spread: float, *, same: bool, noisy: bool = False, gain: float = 0.0
) -> Iterator[Any]:
    """Draw p `(N, A)` of studies of ten arms, whose true shares are those of the control plus gain.

    Args:
        num_seeds: Of each arm.
        spread: Standard deviation of a run's true share of right answers.
        same: Whether all seeds answer the same questions.
        noisy: The first arm's and the control's runs vary twice as much as the others'.
        gain: What every arm has right more.
    """
    dice = np.random.default_rng(20)
    num_arms = max(NUM_ARMS)
    spreads = np.full(num_arms + 1, spread)
    spreads[:2] *= 2 if noisy else 1
    for _ in range(NUM_STUDIES // CHUNK):
        questions = (CHUNK, 1, 1 if same else num_seeds, NUM_QUESTIONS)
        hard = dice.choice(np.array([0.2, 0.5, 0.8], np.float32), size=questions)
        turned = (CHUNK, num_arms + 1, *questions[2:])  # what an arm does to a question, each seed
        turn = dice.choice(np.array([-0.07, 0.07], np.float32), size=turned)
        runs = spreads[:, None] * dice.standard_normal((CHUNK, num_arms + 1, num_seeds))
        runs[:, 1:] += gain
        shares = hard + turn + runs[..., None].astype(np.float32)
        flags = dice.random((CHUNK, num_arms + 1, num_seeds, NUM_QUESTIONS), np.float32) < shares
        arms = [difference_p(flags[:, arm], flags[:, 0], same) for arm in range(1, num_arms + 1)]
        yield np.stack(arms, axis=-1)


def shown(ps: Any, num_arms: int, primary: str | None = None) -> Any:
    """Tell `(N, A)` which of the first arms a study calls shown."""
    names = [str(arm) for arm in range(num_arms)]

    def of_one(study: Any) -> list[bool]:
        found: Mapping[str, float] = corrected(dict(zip(names, study, strict=True)), primary)
        return [found[name] < CHANCE for name in names]

    return np.array([of_one(study) for study in ps[:, :num_arms]])


@pytest.fixture(scope="module")
def without_difference() -> dict[tuple[Any, ...], Any]:
    """Draw p where no arm differs from the control: by seeds, spread, same questions, noisy."""
    return {
        setting: np.concatenate(list(drawn(*setting[:2], same=setting[2], noisy=setting[3])))
        for setting in product(NUM_SEEDS, SPREADS, (True, False), (False, True))
        if setting[1] or not setting[3]
    }


@pytest.mark.parametrize("primary", [None, "0"], ids=["Holm", "primary first"])
@pytest.mark.parametrize("num_arms", NUM_ARMS)
def test_any_arm_is_shown_by_chance_in_one_of_twenty_studies(
    num_arms: int, primary: str | None, without_difference: dict[tuple[Any, ...], Any]
) -> None:
    """Whatever the seeds, their spread, the questions and the variances are."""
    found = {
        setting: float(shown(ps, num_arms, primary).any(-1).mean())
        for setting, ps in without_difference.items()
    }
    print(num_arms, primary, sorted(found.values()), found)
    assert len(found) == 20
    assert max(found.values()) <= MOST
    assert max(found.values()) >= 0.02  # it isn't kept by showing nothing


def test_the_simulation_finds_a_procedure_that_promises_too_much(
    without_difference: dict[tuple[Any, ...], Any],
) -> None:
    """The same p without a correction for ten arms shows some in far more than 6%."""
    ps = without_difference[6, 0.0, True, False]
    assert float((ps < CHANCE).any(-1).mean()) > 2 * MOST


def test_seeds_taken_as_fixed_show_too_much() -> None:
    """Runs that differ, taken as one long run, are what the interval over seeds is for."""
    dice = np.random.default_rng(5)
    runs = 0.5 + 0.05 * dice.standard_normal((2, 500, 3, 1))
    arm, control = dice.random((2, 500, 3, NUM_QUESTIONS)) < runs
    assert (difference_p(arm, control, False) < CHANCE).mean() <= MOST
    flat = [flags.reshape(500, 1, -1) for flags in (arm, control)]
    assert (difference_p(*flat) < CHANCE).mean() > 0.3


def test_the_tables_of_the_docs_are_these(
    without_difference: dict[tuple[Any, ...], Any],
) -> None:
    """What holds by chance, and how often five points are found: each row as the docs have it."""
    text = DOCS.read_text(encoding="utf-8")
    missing = [row for row in [*_by_chance(without_difference), *_power()] if row not in text]
    assert missing == []


def _by_chance(found: dict[tuple[Any, ...], Any]) -> Iterator[str]:
    for num_arms in NUM_ARMS:
        cells = []
        for spread in SPREADS:
            rates = [
                float(shown(ps, num_arms).any(-1).mean())
                for setting, ps in found.items()
                if setting[1] == spread
            ]
            cells.append(f"{min(rates):.1%} to {max(rates):.1%}")
        print(row := f"| {num_arms} | {' | '.join(cells)} |")
        yield row


def _power() -> Iterator[str]:
    for num_seeds in NUM_SEEDS:
        ps = np.concatenate(list(drawn(num_seeds, 0.02, same=True, gain=0.05)))
        rates = [float(shown(ps, num)[:, 0].mean()) for num in (1, *NUM_ARMS)]
        first = float(shown(ps, 5, "0")[:, 0].mean())
        rates.append(float(shown(ps, 5, "0")[:, 1].mean()))
        assert first == rates[0]  # a primary comparison costs nothing
        print(row := f"| {num_seeds} | {' | '.join(f'{rate:.0%}' for rate in rates)} |")
        yield row
