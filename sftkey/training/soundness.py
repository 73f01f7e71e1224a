"""Whether a stage has made its model worse: validation losses row by row, at its start and end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import ttest_1samp

from sftkey.errors import DivergedError, RunError
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

    Raises:
        DivergedError: With both losses.
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
