"""What follows from a recipe for its stages: steps, epochs, and a frozen stage's key adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from sftkey.files import value_hash
from sftkey.recipe.upstream import lora_config_fields, sft_config_fields

if TYPE_CHECKING:
    from sftkey.recipe.schema import Recipe, StageSection

BASE = "base"  # the model before all stages, beside the stages' names
KEY_WEIGHT = 5.0  # of the key in one stage over the whole completion, where none is chosen


def stage_names(recipe: Recipe) -> list[str]:
    """Return `base` and the names of the stages, in their order."""
    return [BASE, *(stage.name for stage in recipe.stages)]


WRITES_THINKINGS = {"grader", "max_new_tokens", "batch_size"}


def prefix_key(recipe: Recipe, num_stages: int) -> str:
    """Return a hash that two recipes share whose first stages end in the same weights.

    That is all but the name, the later stages and the evaluation; of this, what a model's own
    thinkings are written and chosen by counts where one of the stages is over such.
    """
    shared = recipe.model_dump(mode="json", include={"seed", "model", "lora", "data", "response"})
    if any(stage.thinking == "own" for stage in recipe.stages[:num_stages]):
        shared["eval"] = recipe.eval.model_dump(mode="json", include=WRITES_THINKINGS)
    stages = [
        {**stage.model_dump(mode="json"), "trainer": recipe.stage_trainer(stage)}
        for stage in recipe.stages[:num_stages]
    ]
    return value_hash({**shared, "stages": stages})


STEP_SETTINGS = (
    *("max_steps", "num_train_epochs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
)


# transformers takes the newer name where a recipe has it, and renames nothing else.
NEWER_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def trainer_setting(trainer: Mapping[str, Any], name: str) -> Any:
    """Return a setting of a stage's trainer, or upstream's default where the recipe has none.

    >>> trainer_setting({"activation_checkpointing": False}, "gradient_checkpointing")
    False
    """
    newer = NEWER_NAMES.get(name, name)
    if trainer.get(newer) is not None:
        name = newer
    return trainer[name] if name in trainer else sft_config_fields()[name].default


def lora_setting(lora: Mapping[str, Any], name: str) -> Any:
    """Return a setting of an adapter, or upstream's default where the recipe has none."""
    return lora[name] if name in lora else lora_config_fields()[name].default


def num_stage_steps(trainer: Mapping[str, Any], num_rows: int, num_processes: int) -> int:
    """Count the optimizer steps of a stage, as the trainer will count them.

    >>> num_stage_steps({"per_device_train_batch_size": 4, "num_train_epochs": 2}, 10, 1)
    6
    >>> num_stage_steps({"per_device_train_batch_size": 4, "dataloader_drop_last": True}, 10, 1)
    6
    """
    max_steps, epochs, _, accumulation = (trainer_setting(trainer, name) for name in STEP_SETTINGS)
    if max_steps > 0:
        return int(max_steps)
    steps_an_epoch = math.ceil(num_stage_batches(trainer, num_rows, num_processes) / accumulation)
    return math.ceil(epochs * max(steps_an_epoch, 1))


def num_stage_batches(trainer: Mapping[str, Any], num_rows: int, num_processes: int) -> int:
    """Count the batches of an epoch on each process; none where the only one is dropped.

    >>> num_stage_batches({"per_device_train_batch_size": 4, "dataloader_drop_last": True}, 3, 1)
    0
    """
    batch_size = trainer_setting(trainer, "per_device_train_batch_size")
    if trainer_setting(trainer, "dataloader_drop_last"):
        return int(num_rows // batch_size // num_processes)
    return math.ceil(num_rows / batch_size / num_processes)


def num_stage_epochs(trainer: Mapping[str, Any], num_rows: int, num_processes: int) -> float:
    """Count how often a stage reads the training rows; `max_steps` may end inside an epoch."""
    settings = (trainer_setting(trainer, name) for name in STEP_SETTINGS)
    max_steps, epochs, batch_size, accumulation = settings
    if max_steps > 0:
        return float(max_steps * accumulation * batch_size * num_processes / num_rows)
    return float(epochs)


# What peft does to rows of the vocabulary or to whole modules acts on all tokens.
ON_ALL_TOKENS = ("trainable_token_indices", "modules_to_save")


@dataclass(frozen=True)
class KeyAdapterSpec:
    """One adapter of a frozen stage."""

    name: str  # peft's name of it
    chosen: dict[str, Any]  # what the grid says of it: learning_rate, r, seed
    lora: dict[str, Any]  # `peft.LoraConfig`'s fields
    learning_rate: float | None  # its own; None: that of the trainer's settings
    seed: int  # of its first weights


def key_adapter_specs(recipe: Recipe, stage: StageSection) -> list[KeyAdapterSpec]:
    """Return the adapters of a frozen stage; those of a grid are all combinations of its values."""
    own = stage.lora if stage.lora is not None else recipe.lora
    lora = {key: value for key, value in (own or {}).items() if key not in ON_ALL_TOKENS}
    grid = stage.grid or {}
    combined = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return [
        KeyAdapterSpec(
            "key" if len(combined) == 1 else f"key-{number}",
            chosen,
            lora | ({"r": chosen["r"]} if "r" in chosen else {}),
            chosen.get("learning_rate"),
            chosen.get("seed", recipe.seed),
        )
        for number, chosen in enumerate(combined)
    ]
