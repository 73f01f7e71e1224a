"""One stage's trainer: its arguments, what it saves, and the gradient norm of each segment."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import SFTConfig

from sftkey.data.collator import reads_packs
from sftkey.data.labels import COMPLETION, IGNORED
from sftkey.data.response import Segment
from sftkey.errors import DeviceError
from sftkey.generation.generate import inferring
from sftkey.models.adapters import DEFAULT, Base, save_adapter, save_model
from sftkey.models.device import Device, sharded
from sftkey.recipe.schema import Recipe, StageSection
from sftkey.recipe.stages import key_adapter_specs
from sftkey.training.frozen import FrozenTrainer
from sftkey.training.log import TRACKERS, reported_to
from sftkey.training.losses import token_losses
from sftkey.training.stage_model import refuse_mixed_rows
from sftkey.training.trainer import KeyTrainer

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
    """Build the arguments of one stage, whose checkpoints go into `folder`.

    With `on_start` the validation rows are read before the first step.
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
        "greater_is_better": False,  # all metrics are losses; upstream goes by the name's end
        "disable_tqdm": True,  # the run has one progress bar of its own
    }
    packs = {"train_sampling_strategy": "random"} if reads_packs(recipe, stage) else {}
    told = recipe.stage_trainer(stage)
    if names := reported_to(told):
        owned["report_to"] = [name for name in names if name not in TRACKERS] or "none"
    return SFTConfig(**{**DEFAULTS, **packs, **told, **owned})


NUM_ROWS = 16  # validation rows: half a minute of a small model on two cores


def gradient_norms(trainer: KeyTrainer) -> dict[str, float]:
    """Return by segment the norm of its loss's gradient, summed over rows, on what is trained.

    Every segment of the completion is measured, trained by the stage or not, on the first
    validation rows, without dropout. Nothing of the trainer changes: it has one process, is before
    its first step, and its model isn't sharded.
    """
    with inferring(trainer.model_wrapped):
        return {segment.name.lower(): _norm(trainer, segment) for segment in COMPLETION}


def _norm(trainer: KeyTrainer, segment: Segment) -> float:
    """Go through the rows for one segment alone: one gradient is held at a time, not four."""
    model, rows = trainer.model_wrapped, trainer.eval_dataset
    assert isinstance(rows, Dataset)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = [torch.zeros_like(parameter) for parameter in trained]
    size, num_rows = trainer.args.eval_batch_size, min(NUM_ROWS, len(rows))
    for start in range(0, num_rows, size):
        chosen = [rows[place] for place in range(start, min(start + size, num_rows))]
        batch = trainer._prepare_inputs(trainer.data_collator(chosen))
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        inputs["labels"] = batch["input_ids"].masked_fill(batch["segment_ids"] != segment, IGNORED)
        with trainer.compute_loss_context_manager():
            loss = token_losses(model, inputs).sum()
        for added, gradient in zip(
            sums, torch.autograd.grad(loss, trained, allow_unused=True), strict=True
        ):
            if gradient is not None:
                added += gradient
    return sum(float(gradient.double().square().sum()) for gradient in sums) ** 0.5


# The settings of a stage that need the whole model in each process: what for, and who has them.
WHOLE_MODEL: dict[str, tuple[str, Callable[[StageSection], Any]]] = {
    "context: frozen": ("", lambda stage: stage.context == "frozen"),
    "early_stop": (" and can answer", lambda stage: stage.early_stop),
    "thinking: own": (" and can answer", lambda stage: stage.thinking == "own"),
    "kl": (", as it was when the stage began", lambda stage: stage.kl),
}


def refuse_unfit(model: Any, recipe: Recipe, packed: bool) -> None:
    """Refuse what a later stage couldn't do with this model: before hours of training, not after.

    Raises:
        ModelError: The model mixes packed rows.
        DeviceError: A stage that needs the whole model, where it is sharded.
    """
    for where, (what_for, needed) in WHOLE_MODEL.items():
        if sharded() and any(map(needed, recipe.stages)):
            raise DeviceError(
                where,
                f"expected processes that hold the whole model each{what_for}; "
                "FSDP and DeepSpeed cut it up",
                "train this stage on one GPU, or launch with accelerate_configs/multi_gpu.yaml",
            )
    if packed:
        refuse_mixed_rows(model, probe=not sharded())


def make_trainer(recipe: Recipe, stage: StageSection, **settings: Any) -> KeyTrainer:
    """Make the trainer of a stage; `settings` are `KeyTrainer`'s, but for what the stage says."""
    for name in ("loss_on", "loss", "anneal", "kl", "key_batch_tokens"):
        settings[name] = getattr(stage, name)
    if stage.context == "frozen":
        members = key_adapter_specs(recipe, stage)
        return FrozenTrainer(members, context_cache=stage.context_cache, **settings)
    return KeyTrainer(context=stage.context, **settings)


def save_stage(trainer: KeyTrainer, folder: Path, base: Base, write: bool) -> None:
    """Write what a stage has trained, of a grid the best adapter, where this process writes.

    A sharded model is gathered by all processes. `base` is what the weights belong to.
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
