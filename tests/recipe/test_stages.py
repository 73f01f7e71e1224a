"""Steps and epochs of a stage are what the trainer makes of the same settings."""

import doctest
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import Trainer
from trl import SFTConfig

import sftkey.recipe.stages
from sftkey.recipe.stages import (
    STEP_SETTINGS,
    lora_setting,
    num_stage_epochs,
    num_stage_steps,
    trainer_setting,
)


def test_doctests_hold() -> None:
    """The example in the docstring is true."""
    assert doctest.testmod(sftkey.recipe.stages).failed == 0


@pytest.mark.parametrize("num_rows", [1, 7, 40])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_steps": 5},
        {"num_train_epochs": 2, "per_device_train_batch_size": 4},
        {
            "num_train_epochs": 1.5,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 4,
        },
    ],
)
def test_steps_are_the_trainers(
    settings: dict[str, Any], num_rows: int, tiny_model: Any, tmp_path: Path
) -> None:
    """Upstream's own count is the same, with its defaults where the recipe says nothing."""
    arguments = SFTConfig(str(tmp_path), bf16=False, use_cpu=True, **settings)
    trainer = Trainer(tiny_model, arguments, train_dataset=[{"input_ids": [1]}] * num_rows)
    *_, steps = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())
    assert num_stage_steps(settings, num_rows, num_processes=1) == steps


def test_processes_share_the_rows() -> None:
    """Four processes need a quarter of the steps, rounded up; accumulation counts on each."""
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 1}
    assert num_stage_steps(settings, 40, 4) == 5
    assert num_stage_steps({**settings, "gradient_accumulation_steps": 2}, 41, 4) == 3


def test_epochs_are_the_recipes_or_come_from_its_steps() -> None:
    """`max_steps` may end inside an epoch, or go on after one."""
    assert num_stage_epochs({"num_train_epochs": 2}, 40, 1) == 2
    assert num_stage_epochs({"max_steps": 5, "per_device_train_batch_size": 2}, 40, 2) == 0.5


def test_defaults_are_upstreams(tmp_path: Path) -> None:
    """What is read from the sources is what the class has."""
    arguments = SFTConfig(str(tmp_path), bf16=False, use_cpu=True)
    for name in (*STEP_SETTINGS, "learning_rate", "optim", "gradient_checkpointing"):
        assert trainer_setting({}, name) == getattr(arguments, name)
        assert trainer_setting({name: 7}, name) == 7
    for name in ("r", "lora_alpha", "lora_dropout", "init_lora_weights"):
        assert lora_setting({}, name) == getattr(LoraConfig(), name)
        assert lora_setting({name: 7}, name) == 7
