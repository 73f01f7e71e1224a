"""What a run needs of its machine: room on the disk, memory, and processes that go on together."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState

from sftkey.errors import DeviceError, DiskError, ProcessLost, SFTKeyError, first_line
from sftkey.files import GIB, free_bytes, num_bytes_below
from sftkey.memory_plan import held
from sftkey.models.device import Device, is_out_of_memory
from sftkey.recipe.schema import Recipe, StageSection
from sftkey.recipe.stages import trainer_setting
from sftkey.training.run_folder import Ledger
from sftkey.training.stage import DEFAULTS

MANY, A_FEW = 2**20, 2**16  # bytes beside the weights: a tokenizer; the states of trainer and dice
# What gloo, NCCL and torch's own store say when they wait in vain for another process.
LOST = re.compile(r"gloo|nccl|closed by peer|Connection reset|Broken pipe|timed out|timeout", re.I)


def patience(recipe: Recipe) -> timedelta:
    """Return how long processes wait for one another: the longest `ddp_timeout` of the stages.

    Their group is made once, before any trainer could say it.
    """
    told = (trainer_setting(recipe.stage_trainer(each), "ddp_timeout") for each in recipe.stages)
    return timedelta(seconds=max(told))


@contextmanager
def explained_faults(folder: Path) -> Iterator[None]:
    """Turn a lack of memory, or the loss of another process, into a DeviceError with a way on."""
    try:
        yield
    except SFTKeyError:
        raise
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise DeviceError(
                str(folder),
                "out of memory; what was reached is kept",
                "lower trainer.per_device_train_batch_size (and raise "
                "gradient_accumulation_steps), lower data.max_length, or set "
                "trainer.gradient_checkpointing=true; then go on with a new `name=…`",
            ) from error
        if PartialState().num_processes > 1 and LOST.search(str(error)):
            raise _lost(folder, error) from error
        raise


def _lost(folder: Path, error: BaseException) -> ProcessLost:
    return ProcessLost(
        str(folder),
        f"another process of this run is gone, or answers no more: {first_line(error)}",
        "see what it said before; the same command, with the same number of processes, goes on "
        "from the newest checkpoint. trainer.ddp_timeout says for how long processes wait",
    )


def join(recipe: Recipe, device: Device, folder: Path) -> PartialState:
    """Return the processes of a run, this one among them, once all of them are there.

    Raises:
        DeviceError: One doesn't come, or another program has the port where they meet.
    """
    try:
        return PartialState(cpu=device.kind == "cpu", timeout=patience(recipe))
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            port = os.environ.get("MASTER_PORT")
            raise DeviceError(
                f"$MASTER_PORT={port}",
                "expected a port where a run's processes meet; another program has this one",
                "set MASTER_PORT to another one; `accelerate launch --main_process_port 0` finds "
                "one",
            ) from error
        if LOST.search(str(error)):
            raise _lost(folder, error) from error
        raise


@dataclass(frozen=True)
class StageDisk:
    """What a stage writes, in bytes."""

    result: int  # its adapter, or its whole model
    checkpoint: int  # each of its checkpoints: weights and the optimizer's state
    num_kept: int  # checkpoints that stay
    num_at_once: int  # checkpoints that lie there while the oldest is still to be removed

    @property
    def left_bytes(self) -> int:
        """What stays after the stage."""
        return self.result + self.num_kept * self.checkpoint

    @property
    def peak_bytes(self) -> int:
        """What lies there at most."""
        return self.result + self.num_at_once * self.checkpoint


def require_disk(ledger: Ledger, num_steps: dict[str, int]) -> str | None:
    """Say in a line what the open stages will write; refuse where the disk can't hold it.

    What the open stages, of so many steps each, have written already is there already.

    Returns:
        None where all is trained, or the model's size isn't known.
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
    checkpoint = max(each.checkpoint for each in stages)
    raise DiskError(
        str(ledger.folder),
        f"the disk can't hold what the stages will write: {needed:,} bytes are needed; "
        f"{free:,} are free",
        "free some space, or run on another disk; a lower trainer.save_total_limit keeps fewer "
        f"checkpoints, each of {checkpoint:,} bytes",
    )


def _size(num_bytes: int) -> str:
    small = num_bytes < GIB
    return f"{num_bytes / 2**20:.1f} MiB" if small else f"{num_bytes / GIB:.2f} GiB"


def plan_disk(recipe: Recipe, num_steps: dict[str, int]) -> dict[str, StageDisk] | None:
    """Plan what each stage writes, from the model's config; None where that doesn't tell."""
    try:
        skeleton = held.read_skeleton(recipe.model)
        return {
            stage.name: _of_stage(recipe, stage, skeleton, num_steps[stage.name])
            for stage in recipe.stages
            if stage.name in num_steps
        }
    except SFTKeyError:  # an adapter or optimizer whose size isn't counted
        return None


def _of_stage(
    recipe: Recipe, stage: StageSection, skeleton: held.Skeleton, num_steps: int
) -> StageDisk:
    setting = held.setting_of(recipe, stage, skeleton, "cpu")
    trained = sum(held.trained(skeleton, setting))
    weights = held.ADAPTER_BYTES * trained  # what is trained is float32
    members = max(len(setting.ranks), 1)  # of a grid one is kept
    trainer = {**DEFAULTS, **recipe.stage_trainer(stage)}
    saves, limit = num_saves(trainer, num_steps), trainer_setting(trainer, "save_total_limit")
    kept = min(saves, limit) if limit else saves
    checkpoint = weights + held.optimizer_bytes(skeleton, setting) + A_FEW
    return StageDisk(weights // members + MANY, checkpoint, kept, min(saves, kept + 1))


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
