"""A stage tried before it is trained: one step, evaluation, save and reload of a small model.

What upstream refuses, it refuses here: as an error of ours, before any weights are loaded.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from sftkey.checks.findings import Finding, of_error
from sftkey.checks.settings import (
    refuse_attention,
    refuse_idle_optimizer_settings,
    refuse_missing_trackers,
    refuse_unknown_metric,
)
from sftkey.data.collator import row_lengths
from sftkey.data.prepare import Prepared
from sftkey.errors import ModelError, RecipeError, SFTKeyError, first_line
from sftkey.models.adapters import add_lora, load_adapter, read_adapter_config
from sftkey.models.device import Device, sharded
from sftkey.models.facts import skeleton_of
from sftkey.models.key_adapter import act, context_adapters
from sftkey.models.loading import check_targets, short_names, target_names
from sftkey.models.lora_names import refuse_unmatched
from sftkey.models.positions import mixing_length
from sftkey.recipe.schema import Recipe, StageSection
from sftkey.recipe.stages import key_adapter_specs
from sftkey.training.stage import make_trainer, save_stage, stage_arguments
from sftkey.training.trainer import KeyTrainer

NUM_LAYERS = 2
NUM_ROWS = 2
BASE = {"name_or_path": "rehearsal", "revision": None}
# What a step of a rehearsal is, whatever the stage is told.
SHORT: dict[str, Any] = {
    "max_steps": 1,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "logging_steps": 1,
    "logging_strategy": "steps",
    "report_to": "none",
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": None,
    "dataloader_persistent_workers": False,
    "torch_compile": False,
    "use_cpu": True,
}
# Names of later layers, which the small model hasn't; the whole model's were looked up.
OF_ALL_LAYERS = (
    *("rank_pattern", "alpha_pattern", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "layer_replication"),
)
PLAIN = {"r": 2, "target_modules": "all-linear"}
_PASSED: set[str] = set()  # by what a rehearsal depends on: a study's cells differ in other things


def rehearsal_findings(recipe: Recipe, prepared: Prepared) -> Iterator[Finding]:
    """Try every stage on a small model, and find what upstream would refuse.

    Args:
        recipe: A recipe whose form and rows are sound.
        prepared: Its rows.
    """
    yield from _of_rows(recipe, prepared)
    sections = {"model", "lora", "trainer", "stages"}
    key = json.dumps(recipe.model_dump(mode="json", include=sections), sort_keys=True, default=str)
    if key in _PASSED:
        return
    try:
        device = Device("cpu", 0, torch.float32)  # whatever this machine has, and the run will
        skeleton = skeleton_of(recipe.model)
        refuse_missing_trackers(recipe)
        refuse_attention(recipe, skeleton)
        recipe = _with_all_settings(recipe, skeleton)
        rows = prepared.train.select(range(min(NUM_ROWS, len(prepared.train))))
        found = list(_stages(recipe, skeleton, device, rows, prepared))
    except SFTKeyError as error:
        found = list(of_error(error))
    if not found:
        _PASSED.add(key)
    yield from found


def _with_all_settings(recipe: Recipe, skeleton: PreTrainedModel) -> Recipe:
    """Look up what `lora`, the stages' too, and an adapter to go on from name in the whole model.

    Returns:
        The recipe; where it goes on from an adapter, with that adapter's settings as its own.

    Raises:
        ModelError: Something is named that isn't there, or can't be trained.
    """
    own = [stage.lora for stage in recipe.stages if stage.lora is not None]
    for lora in own + ([recipe.lora] if recipe.lora is not None else []):
        check_targets(skeleton, lora.get("target_modules"))
        refuse_unmatched(skeleton, lora)
    if recipe.model.adapter is None:
        return recipe
    _, config = read_adapter_config(skeleton, recipe.model.adapter, recipe.lora or {})
    found = {key: getattr(config, key) for key in ("r", "lora_alpha", "bias", "use_dora")}
    targets = config.target_modules
    found["target_modules"] = sorted(targets) if isinstance(targets, set) else targets
    return recipe.model_copy(update={"lora": found})


def _of_rows(recipe: Recipe, prepared: Prepared) -> Iterator[Finding]:
    """Find rows that the model can't read, or not beside others."""
    try:
        skeleton = skeleton_of(recipe.model)
        refuse_mixed_lengths(skeleton, prepared)
    except SFTKeyError as error:
        yield from of_error(error)


def refuse_mixed_lengths(skeleton: PreTrainedModel, prepared: Prepared) -> None:
    """Refuse rows so long that they would change the positions of the rows beside them.

    Raises:
        ModelError: Says from which length on.
    """
    limit = mixing_length(skeleton.config)
    datasets = [rows for rows in (prepared.train, prepared.validation) if rows is not None]
    longest = max(max(row_lengths(rows)) for rows in datasets)
    if limit is not None and longest > limit:
        raise ModelError(
            skeleton.config.model_type,
            f"its positions are scaled by a batch's longest row above {limit} tokens, so that a "
            f"row's loss would depend on the rows beside it; the longest row has {longest}",
            f"write data.max_length={limit}",
        )


def _stages(
    recipe: Recipe, skeleton: PreTrainedModel, device: Device, rows: Dataset, prepared: Prepared
) -> Iterator[Finding]:
    """Build what each stage hands to upstream, and take its step."""
    with tempfile.TemporaryDirectory() as folder:
        for stage in recipe.stages:
            build_arguments(recipe, stage, device, Path(folder))
        if distributed():
            return
        small = small_model(skeleton)
        if small is None:
            return
        for number, stage in enumerate(recipe.stages):
            place = Path(folder) / str(number)
            try:
                unmerged = _take(recipe, stage, skeleton, small, rows, prepared, place)
            except SFTKeyError:
                raise
            except Exception as error:  # whatever upstream raises is what is looked for
                if not _plain_works(
                    recipe, stage, skeleton, small, rows, prepared, place / "plain"
                ):
                    what = f"stages.{stage.name}: could not be tried on a small model"
                    hint = f"its first step will tell; {first_line(error)}"
                    yield Finding("not-rehearsed", (), what, hint, refuses=False)
                    return
                raise RecipeError(
                    f"stages.{stage.name}",
                    f"its first step, evaluation or save fails: {_said(error)}",
                    "these settings of `trainer` and `lora` can't be trained; the same stage with "
                    "plain ones can",
                ) from error
            if unmerged:
                what = f"stages.{stage.name}: its adapter can't be merged: {unmerged}"
                hint = "serve it beside its base; `sftkey merge` would refuse it"
                yield Finding("not-merged", (), what, hint, refuses=False)


def distributed() -> bool:
    """Tell whether other processes would have to take part in a step."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or sharded()


def _said(error: BaseException) -> str:
    """Return what an error of upstream's says, with its kind where the text alone says little."""
    return f"{type(error).__name__}: {first_line(error)}"


def build_arguments(recipe: Recipe, stage: StageSection, device: Device, folder: Path) -> None:
    """Build a stage's arguments as the run will.

    Raises:
        RecipeError: Upstream refuses them.
    """
    try:
        with quiet():
            arguments = stage_arguments(recipe, stage, device, folder, on_start=True)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        if isinstance(error, SFTKeyError):
            raise
        where = f"stages.{stage.name}.trainer"
        raise RecipeError(where, f"trl.SFTConfig refuses it: {_said(error)}") from error
    refuse_idle_optimizer_settings(arguments, f"stages.{stage.name}.trainer")


def small_model(skeleton: PreTrainedModel) -> PreTrainedModel | None:
    """Make a model of the same architecture with two narrow layers and random weights.

    Its vocabulary is the model's own. None where the architecture can't be cut so.
    """
    config = copy.deepcopy(skeleton.config)
    text: Any = config.get_text_config()
    count = text.num_hidden_layers
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sizes = {
        "hidden_size": head_dim * 2 if head_dim < 64 else head_dim,
        "num_attention_heads": 2 if head_dim < 64 else 1,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": NUM_LAYERS,
    }
    for name, value in vars(text).copy().items():
        if isinstance(value, list) and len(value) == count and not name.startswith("_"):
            setattr(text, name, value[:NUM_LAYERS])
    for name, value in sizes.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    try:
        attention = skeleton.config._attn_implementation
        with torch.random.fork_rng(devices=[]):
            made = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            small: PreTrainedModel = made.float()
            ids = torch.arange(3)[None]
            small.eval()(input_ids=ids)
    except Exception:  # an architecture with other sizes: nothing can be said of it here
        return None
    return small


def _plain_works(recipe: Recipe, stage: StageSection, *rest: Any) -> bool:
    """Tell whether the stage's step can be taken at all with settings that say nothing."""
    lora = None if recipe.lora is None else PLAIN
    plain = recipe.model_copy(update={"trainer": {}, "lora": lora})
    of_key = {"trainer": {}, "lora": PLAIN if stage.context == "frozen" else None}
    try:
        _take(plain, stage.model_copy(update=of_key), *rest)
    except Exception:
        return False
    return True


def _take(
    recipe: Recipe,
    stage: StageSection,
    skeleton: PreTrainedModel,
    small: PreTrainedModel,
    rows: Dataset,
    prepared: Prepared,
    folder: Path,
) -> str | None:
    """Take one step of a stage, evaluate, save a checkpoint and the result, and load both.

    Returns:
        Why the adapter can't be merged, if it can't.
    """
    model = _with_adapters(recipe, stage, skeleton, copy.deepcopy(small))
    trainer_settings = recipe.stage_trainer(stage)
    told = {"trainer": {**trainer_settings, **SHORT}}
    short, short_stage = recipe.model_copy(update=told), stage.model_copy(update={"trainer": {}})
    device = Device("cpu", 0, torch.float32)
    with quiet(), torch.random.fork_rng(devices=[]):
        arguments = stage_arguments(short, short_stage, device, folder, on_start=True)
        trainer = make_trainer(
            recipe,
            stage,
            model=model,
            args=arguments,
            tokenizer=prepared.renderer.tokenizer,
            train_dataset=rows,
            eval_dataset=rows,
        )
        trainer.train()
        metrics = trainer.evaluate()
        refuse_unknown_metric(trainer_settings, metrics, stage)
        save_stage(trainer, folder / "adapter", BASE, write=True)
        return _reload(recipe, stage, skeleton, small, trainer, folder)


def _with_adapters(
    recipe: Recipe, stage: StageSection, skeleton: PreTrainedModel, small: PreTrainedModel
) -> Any:
    """Put the stage's adapters on a small model, on the modules that they will be on."""
    model: Any = small
    if stage.context == "frozen":
        model.requires_grad_(False)
        for member in key_adapter_specs(recipe, stage):
            model = add_lora(
                model, _of_small(skeleton, small, member.lora), member.seed, member.name
            )
            for name, parameter in model.named_parameters():
                if f".{member.name}." in name:
                    parameter.requires_grad = True
        act(model, context_adapters(model))
    elif recipe.lora is not None:
        model = add_lora(model, _of_small(skeleton, small, recipe.lora), recipe.seed)
    return model


def _of_small(
    skeleton: PreTrainedModel, small: PreTrainedModel, lora: dict[str, Any]
) -> dict[str, Any]:
    """Say what an adapter of the whole model is on one with two layers: what these have of it."""
    kept = {key: value for key, value in lora.items() if key not in OF_ALL_LAYERS}
    targets = lora.get("target_modules")
    if targets and targets != "all-linear":
        wanted = short_names(target_names(skeleton, targets))
        kept["target_modules"] = short_names(target_names(small, wanted)) or "all-linear"
    for key, named in (
        ("modules_to_save", small.named_modules()),
        ("target_parameters", small.named_parameters()),
    ):
        if lora.get(key):
            names = [name for name, _ in named]
            kept[key] = [each for each in lora[key] if any(n.endswith(each) for n in names)]
    return kept


def _reload(
    recipe: Recipe,
    stage: StageSection,
    skeleton: PreTrainedModel,
    small: PreTrainedModel,
    trainer: KeyTrainer,
    folder: Path,
) -> str | None:
    """Load what was written: the checkpoint by its own trainer, the adapter onto another model."""
    checkpoint = max(folder.glob("checkpoint-*"), default=None)
    if checkpoint is not None:
        trainer._load_from_checkpoint(str(checkpoint))
    if recipe.lora is None or stage.context == "frozen":
        return None
    lora = _of_small(skeleton, small, recipe.lora)
    model = load_adapter(copy.deepcopy(small), folder / "adapter", BASE, lora=lora)
    try:
        model.merge_and_unload()
    except Exception as error:  # whatever keeps peft from it
        return first_line(error)
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep upstream's warnings of a rehearsal to ourselves: what matters is an error."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
