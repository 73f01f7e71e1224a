"""How long a stage trains: the trainer's own arithmetic, on what a recipe says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sftkey.upstream import sft_config_fields

STEP_SETTINGS = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)


def trainer_setting(trainer: Mapping[str, Any], name: str) -> Any:
    """Give a setting of a stage's trainer, or upstream's default where the recipe has none."""
    return trainer[name] if name in trainer else sft_config_fields()[name].default


def num_stage_steps(trainer: Mapping[str, Any], num_rows: int, num_processes: int) -> int:
    """Count the optimizer steps of a stage, as the trainer will count them.

    >>> num_stage_steps({"per_device_train_batch_size": 4, "num_train_epochs": 2}, 10, 1)
    6
    """
    max_steps, epochs, batch_size, accumulation = _step_settings(trainer)
    if max_steps > 0:
        return int(max_steps)
    num_batches = math.ceil(num_rows / batch_size / num_processes)
    steps_an_epoch = math.ceil(num_batches / accumulation)
    return math.ceil(epochs * max(steps_an_epoch, 1))


def num_stage_epochs(trainer: Mapping[str, Any], num_rows: int, num_processes: int) -> float:
    """Count how often a stage reads the training rows; `max_steps` may end inside an epoch."""
    max_steps, epochs, batch_size, accumulation = _step_settings(trainer)
    if max_steps > 0:
        return float(max_steps * accumulation * batch_size * num_processes / num_rows)
    return float(epochs)


def _step_settings(trainer: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(trainer_setting(trainer, name) for name in STEP_SETTINGS)
