"""Whether a stage's losses are sound: they begin where they should, are finite, get no worse."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from scipy.stats import ttest_1samp

from sftkey.errors import SMALLER_STEPS, DivergedError, RunError
from sftkey.files import read_json, write_json

ROWS_FILE = "validation.json"  # of a stage's folder: its own loss of each row, nats a token
SAME = 1e-3  # nats: rows whose losses are as near to a guess's are guessed
DESTROYED = 0.5  # nats that a loss has risen by at least; a model may start worse than a guess


@dataclass(frozen=True)
class Change:
    """How a stage's own validation loss has moved, by the rows that it trains something of."""

    start: float  # mean over the rows before its first step, nats a token
    end: float  # the same after its last step
    low: float  # the 95% interval of the difference, end less start, over these rows (paired t)
    high: float
    num_rows: int

    @property
    def is_worse(self) -> bool:
        """Whether the loss has risen by more than chance."""
        return self.low > 0

    def said(self, loss_name: str) -> str:
        """Say it in a line, with what the loss is called: it may be one on training rows."""
        return (
            f"its {loss_name} ended above its start, by more than chance: {self.start:.4f} -> "
            f"{self.end:.4f} nats a token, +{self.end - self.start:.4f} [{self.low:.4f}, "
            f"{self.high:.4f}] over {self.num_rows} rows"
        )


HINT = (
    "lower its learning_rate or num_train_epochs, or keep the best checkpoint: "
    "load_best_model_at_end: true, eval_strategy: steps"
)


def change_of(start: Sequence[float], end: Sequence[float]) -> Change | None:
    """Compare the losses of the same rows; None of fewer than two rows."""
    before, after = np.asarray(start, dtype=float), np.asarray(end, dtype=float)
    if before.shape != after.shape:
        return None
    both = np.isfinite(before) & np.isfinite(after)
    before, after = before[both], after[both]
    if len(before) < 2:
        return None
    difference = after - before
    if np.ptp(difference) == 0:  # no chance in it, and no t either
        low = high = float(difference[0])
    else:
        low, high = (float(x) for x in ttest_1samp(difference, 0.0).confidence_interval(0.95))
    return Change(float(before.mean()), float(after.mean()), low, high, len(before))


def refuse_destroyed(
    start: Sequence[float], end: Sequence[float], vocabulary: int, where: str
) -> None:
    """Refuse to save a model that a guess among all tokens would beat, and that hasn't begun so.

    Steps far too large leave such a one: its activations overflow and every token is as likely as
    any other, or it is sure of wrong ones.

    Args:
        start: The stage's own loss of each validation row before its first step, nats a token.
        end: The same after its last step.
        vocabulary: Tokens of the model's head.
        where: The stage, for the message.
    """
    guess, change = math.log(vocabulary), change_of(start, end)
    if change is None:
        return
    guessed = [
        all(abs(each - guess) < SAME for each in rows if each == each) for rows in (start, end)
    ]
    risen = change.is_worse and change.end - change.start > DESTROYED
    if guessed == [False, True] or (risen and change.end > guess):
        raise DivergedError(
            where,
            f"expected a loss below a guess among all {vocabulary:,} tokens, "
            f"{guess:.4f} nats a token; it went from {change.start:.4f} to {change.end:.4f}, and "
            "nothing was saved",
            "lower trainer.learning_rate; the checkpoints are kept",
        )


def check_handoff(
    end: dict[str, float],
    start: dict[str, float],
    tolerance: float,
    where: str,
    tokens: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Compare a stage's first losses, by segment in nats a token, with the last ones before it.

    Where both were read in other batches or surroundings, there are `tokens` of each segment:
    their mean loss may differ by as much as they are rounded differently.
    """
    missed = {}
    for name in (each for each in end if each in start):
        gap, allowed = abs(start[name] - end[name]), tolerance
        if name in tokens:
            rounded = STANDARD_ERRORS * OTHER_ROUNDING * tolerance / math.sqrt(tokens[name])
            allowed = max(tolerance, rounded)
        if not gap <= allowed:  # NaN is one
            missed[name] = gap
    if missed:
        worst = max(missed, key=lambda name: missed[name])
        raise RunError(
            where,
            f"expected to start where the previous stage ended; the {worst} loss was "
            f"{end[worst]:.6f} then and is {start[worst]:.6f} now (nats a token)",
            "was the previous stage's adapter folder changed? `--fresh` begins anew",
        )


# A key that is read at another place has other losses: they differ as much as the losses vary.
MOST_NOISE = 0.25  # of that spread
ALWAYS_ALLOWED = 100.0  # times the hand-off's tolerance, where all losses are nearly the same
# Other rows beside a row, or another processor, round each of its tokens differently, up and down:
# in 16 bits by hundredths of a nat.
OTHER_ROUNDING = 100.0  # times the hand-off's tolerance
STANDARD_ERRORS = 6.0


def check_behind_cache(behind: dict[str, float], tolerance: float, where: str) -> None:
    """Compare the key's losses behind a cache with those of a full pass of the same model."""
    allowed = max(MOST_NOISE * behind["spread"], ALWAYS_ALLOWED * tolerance)
    gap = abs(behind["loss"] - behind["full_pass"])
    if gap <= behind["bound"] and behind["noise"] <= allowed and not behind["misplaced"]:
        return
    raise RunError(
        where,
        f"expected the key's loss behind the cache to be that of a full pass, up to rounding; got "
        f"{behind['loss']:.6f} and {behind['full_pass']:.6f} nats a token (each token moves by "
        f"{behind['noise']:.4f}, and {behind['misplaced']:.0f} lie on the wrong side of it)",
        "this model can't be trained with context: frozen; write context: exact",
    )


def not_finite(losses: dict[str, float]) -> str:
    """Name the segments whose loss isn't finite."""
    return ", ".join(name for name, loss in losses.items() if not math.isfinite(loss))


def refuse_unsound_end(end: dict[str, float], where: str) -> None:
    """Refuse to save a stage whose last losses, by segment, aren't all finite."""
    if unsound := not_finite(end):
        raise RunError(
            where,
            f"expected finite losses at the end; those of {unsound} are not, and nothing was saved",
            SMALLER_STEPS,
        )


def keep_losses(folder: Path, at: str, losses: Sequence[float]) -> None:
    """Write the losses of a stage's validation rows at its start or end into its folder."""
    kept = kept_losses(folder) | {at: [loss if loss == loss else None for loss in losses]}
    write_json(folder / ROWS_FILE, kept)


def kept_losses(folder: Path) -> dict[str, list[float]]:
    """Read what `keep_losses` wrote; nothing where that is gone or broken."""
    try:
        return {
            at: [math.nan if loss is None else float(loss) for loss in losses]
            for at, losses in read_json(folder / ROWS_FILE).items()
        }
    except (RunError, ValueError, TypeError):
        return {}
