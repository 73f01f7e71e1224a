"""From a recipe's stage to the `SFTConfig` that trains it: the second of the two hops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl import SFTConfig

from sftkey.data.collator import reads_packs
from sftkey.models.device import Device
from sftkey.recipe.schema import Recipe, StageSection

# What sftkey takes where the recipe says nothing; all else is TRL's own default.
DEFAULTS: dict[str, Any] = {
    "train_sampling_strategy": "group_by_length",  # less padding; packs have next to none
    "logging_steps": 10,
    "save_steps": 0.1,  # a share of the stage: any stage can go on where it stopped
    "save_total_limit": 2,  # the newest, and one before it should a kill tear the newest
    "report_to": "none",
}


def stage_arguments(
    recipe: Recipe, stage: StageSection, device: Device, folder: Path, on_start: bool
) -> SFTConfig:
    """Build the arguments of one stage.

    Args:
        recipe: The whole recipe.
        stage: The stage of it that is to be trained.
        device: Decides the precision.
        folder: Where the stage's checkpoints go.
        on_start: Whether the validation rows are read before the first step.
    """
    owned = {
        "output_dir": str(folder),
        "seed": recipe.seed,
        "bf16": device.bf16,
        "fp16": device.fp16,
        "use_cpu": device.kind == "cpu",
        "eval_on_start": on_start,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "max_length": None,
        "router_aux_loss_coef": 0.0,  # the loss is the tokens' alone
        "average_tokens_across_devices": True,
        "logging_nan_inf_filter": False,  # a diverged loss must be seen: it ends the stage
        "disable_tqdm": True,  # the run has one progress bar of its own
    }
    defaults = DEFAULTS
    if reads_packs(recipe, stage):
        defaults = {**DEFAULTS, "train_sampling_strategy": "random"}
    return SFTConfig(**{**defaults, **recipe.stage_trainer(stage), **owned})
