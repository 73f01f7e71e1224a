"""What the stages of a run will leave on its disk, before anything of them is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sftkey.errors import DiskError, SFTKeyError
from sftkey.files import free_bytes, num_bytes_below
from sftkey.memory_plan.held import (
    ADAPTER_BYTES,
    Skeleton,
    optimizer_bytes,
    read_skeleton,
    setting_of,
    trained,
)
from sftkey.recipe.schema import Recipe, StageSection
from sftkey.recipe.stages import trainer_setting
from sftkey.training.run_folder import Ledger
from sftkey.training.stage import DEFAULTS

MANY, A_FEW = 2**20, 2**16  # bytes beside the weights: a tokenizer; the states of trainer and dice


@dataclass(frozen=True)
class StageDisk:
    """What a stage writes, in bytes.

    Args:
        result: Its adapter, or its whole model.
        checkpoint: Each of its checkpoints: weights and the optimizer's state.
        num_kept: Checkpoints that stay.
        num_at_once: Checkpoints that lie there while the oldest is still to be removed.
    """

    result: int
    checkpoint: int
    num_kept: int
    num_at_once: int

    @property
    def left_bytes(self) -> int:
        """What stays after the stage."""
        return self.result + self.num_kept * self.checkpoint

    @property
    def peak_bytes(self) -> int:
        """What lies there at most."""
        return self.result + self.num_at_once * self.checkpoint


def require_disk(ledger: Ledger, num_steps: dict[str, int]) -> str | None:
    """Say what the open stages will write; refuse where the disk can't hold it.

    Args:
        ledger: The run's; what its open stages have written already is there already.
        num_steps: Of each open stage.

    Returns:
        A line for the person; None where all is trained, or the model's size isn't known.

    Raises:
        DiskError: With the needed and the free bytes.
    """
    planned = plan_disk(ledger.recipe, num_steps)
    opened = [n for n, record in enumerate(ledger.stages) if record.status == "open"]
    if planned is None or not opened:
        return None
    stages = [planned[ledger.stages[number].name] for number in opened]
    there = sum(num_bytes_below(ledger.stage_folder(number) / "checkpoints") for number in opened)
    more = max(each.peak_bytes - each.left_bytes for each in stages)
    needed = sum(each.left_bytes for each in stages) + more - there
    free = free_bytes(ledger.folder)
    if needed <= free:
        results = sum(each.result for each in stages)
        what = f"{_size(needed)}, the results {_size(results)} of them"
        return f"on disk: checkpoints and results will take {what}; {_size(free)} are free"
    raise DiskError(
        str(ledger.folder),
        f"the disk can't hold what the stages will write: {needed:,} bytes are needed; "
        f"{free:,} are free",
        "free some space, or run on another disk; a lower trainer.save_total_limit keeps fewer "
        "checkpoints, each of "
        f"{max(each.checkpoint for each in stages):,} bytes",
    )


def _size(num_bytes: int) -> str:
    small = num_bytes < 2**30
    return f"{num_bytes / 2**20:.1f} MiB" if small else f"{num_bytes / 2**30:.2f} GiB"


def plan_disk(recipe: Recipe, num_steps: dict[str, int]) -> dict[str, StageDisk] | None:
    """Plan what each stage writes, from the model's config; None where that doesn't tell."""
    try:
        skeleton = read_skeleton(recipe.model)
        return {
            stage.name: _of_stage(recipe, stage, skeleton, num_steps[stage.name])
            for stage in recipe.stages
            if stage.name in num_steps
        }
    except SFTKeyError:  # an adapter or optimizer whose size isn't counted
        return None


def _of_stage(recipe: Recipe, stage: StageSection, skeleton: Skeleton, num_steps: int) -> StageDisk:
    setting = setting_of(recipe, stage, skeleton, "cpu")
    weights = ADAPTER_BYTES * sum(trained(skeleton, setting))  # what is trained is float32
    members = max(len(setting.ranks), 1)  # of a grid one is kept
    saves = num_saves({**DEFAULTS, **recipe.stage_trainer(stage)}, num_steps)
    limit = trainer_setting({**DEFAULTS, **recipe.stage_trainer(stage)}, "save_total_limit")
    kept = min(saves, limit) if limit else saves
    return StageDisk(
        weights // members + MANY,
        weights + optimizer_bytes(skeleton, setting) + A_FEW,
        kept,
        min(saves, kept + 1),
    )


def num_saves(trainer: dict[str, Any], num_steps: int) -> int:
    """Count the checkpoints that a stage writes.

    >>> num_saves({"save_steps": 0.1}, 40), num_saves({"save_steps": 15}, 40)
    (10, 3)
    """
    strategy = str(trainer_setting(trainer, "save_strategy"))
    if strategy == "no":
        return 0
    if strategy != "steps":  # each epoch, or each best one
        return math.ceil(trainer_setting(trainer, "num_train_epochs"))
    every = trainer_setting(trainer, "save_steps")
    every = math.ceil(every * num_steps) if every < 1 else int(every)
    return math.ceil(num_steps / max(every, 1))  # the last step has one, too
