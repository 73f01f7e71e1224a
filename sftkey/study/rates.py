"""Shares over seeds and questions, of flags and of thinking forms; a conversation counts once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sftkey.evaluation.conversations import by_conversation
from sftkey.evaluation.thinking_form import Rate, form_flags
from sftkey.study.results import Answered
from sftkey.study.seeds import Estimate, mean_estimate


def share(flags: Any, rows: Sequence[Sequence[Any]], same: bool) -> Estimate:
    """Return the share of flags `(S, Q)` with its interval.

    Args:
        flags: Of S seeds.
        rows: The conversation of each question of each seed.
        same: Whether all seeds answered the same questions.
    """
    return mean_estimate(by_conversation(flags, rows, around_mean=True), same)


def share_of_one_model(flags: Any, rows: Sequence[Sequence[Any]], same: bool) -> Estimate:
    """Return the same where no seed trained the model: other questions are so many more of it."""
    if not same:  # rows of other seeds are other conversations
        rows = [[(place, row) for place, each in enumerate(rows) for row in each]]
        flags = flags.reshape(1, -1)
    return share(flags, rows, same)


def rates(answered: Sequence[Answered], same: bool, one_model: bool = False) -> dict[str, Rate]:
    """Return the rates of the thinking's forms; nothing where the form of a question isn't known.

    Args:
        answered: One for each seed.
        same: Whether all seeds answered the same questions.
        one_model: Whether no seed trained the model.
    """
    flags = [form_flags(each.questions) for each in answered]
    if not all(flags):
        return {}
    rows, found = [each.rows for each in answered], {}
    for name in flags[0]:
        table = np.array([each[name] for each in flags])
        estimate = (share_of_one_model if one_model else share)(table, rows, same)
        found[name] = Rate(rate=estimate.value, interval=estimate.interval)
    return found
