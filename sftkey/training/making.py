"""From a stage to its trainer, and from the trainer to what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel

from sftkey.errors import DeviceError
from sftkey.models.adapters import DEFAULT, Base, save_adapter, save_model
from sftkey.recipe.schema import Recipe, StageSection
from sftkey.recipe.stages import members
from sftkey.training.answers import sharded
from sftkey.training.frozen import FrozenTrainer
from sftkey.training.packs import refuse_mixed_rows
from sftkey.training.trainer import KeyTrainer


def refuse_unfit(model: Any, recipe: Recipe, packed: bool) -> None:
    """Refuse what a later stage couldn't do with this model: before hours of training, not after.

    Raises:
        ModelError: The model mixes packed rows.
        DeviceError: A frozen stage where the model is sharded.
    """
    if any(stage.context == "frozen" for stage in recipe.stages) and sharded():
        raise DeviceError(
            "context: frozen",
            "expected processes that hold the whole model each; FSDP and DeepSpeed cut it up",
            "train this stage on one GPU, or launch with accelerate_configs/multi_gpu.yaml",
        )
    if packed:
        refuse_mixed_rows(model, probe=not sharded())


def make_trainer(recipe: Recipe, stage: StageSection, **settings: Any) -> KeyTrainer:
    """Make the trainer of a stage.

    Args:
        recipe: The stage's.
        stage: What is to be trained.
        settings: `KeyTrainer`'s, but for what the stage says.
    """
    settings |= {"loss_on": stage.loss_on, "loss": stage.loss}
    if stage.context == "frozen":
        return FrozenTrainer(members(recipe, stage), **settings)
    return KeyTrainer(context=stage.context, **settings)


def save_stage(trainer: KeyTrainer, folder: Path, base: Base, write: bool) -> None:
    """Write what a stage has trained; a sharded model is gathered by all processes.

    Args:
        trainer: Of the finished stage; of a grid the best adapter is written.
        folder: Where to.
        base: What the trained weights belong to.
        write: Whether this process writes.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded() else None
    if write and isinstance(trainer.model, PeftModel):
        name = DEFAULT
        if isinstance(trainer, FrozenTrainer):
            name = trainer.members[trainer.best].name
        save_adapter(trainer.model, folder, base, state, name)
    elif write:
        assert isinstance(trainer.model, PreTrainedModel)
        save_model(trainer.model, folder, base, state)
    PartialState().wait_for_everyone()
