"""A stage tried before it is trained: one step, evaluation, save and reload of a small model.

What upstream refuses, or has no use for, is refused here: as an error of ours, before any weights
are loaded.
"""

import contextlib
import copy
import dataclasses
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from datasets import Dataset
from torch.nn import Identity
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from sftkey.checks.findings import Finding
from sftkey.data.prepare import Prepared
from sftkey.errors import ModelError, RecipeError, SFTKeyError, first_line
from sftkey.models.adapters import add_lora, load_adapter, read_adapter_config
from sftkey.models.device import Device, sharded
from sftkey.models.facts import Skeleton
from sftkey.models.key_pass import act, context_adapters
from sftkey.models.lora_names import refuse_unmatched, short_names, target_names
from sftkey.recipe.schema import Recipe, StageSection
from sftkey.recipe.stages import key_adapter_specs
from sftkey.training.log import reported_to
from sftkey.training.stage import make_trainer, save_stage, stage_arguments

NUM_LAYERS = 2
NUM_ROWS = 2
DEVICE = Device("cpu", 0, torch.float32)  # whatever this machine has, and the run will
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
    "dataloader_multiprocessing_context": None,
    "activation_offloading": False,  # the small model is on the CPU
    "torch_compile": False,
    "torch_compile_backend": None,
    "torch_compile_mode": None,
    "use_cpu": True,
}
# Names of later layers, which the small model hasn't; the whole model's were looked up.
OF_ALL_LAYERS = (
    *("rank_pattern", "alpha_pattern", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "layer_replication"),
)
PLAIN = {"r": 2, "target_modules": "all-linear"}
_PASSED: set[str] = set()  # by what a rehearsal depends on: a study's cells differ in other things


def rehearsal_findings(recipe: Recipe, prepared: Prepared, skeleton: Skeleton) -> Iterator[Finding]:
    """Try every stage of a recipe, whose form and rows are sound, on a small model."""
    sections = {"model", "lora", "trainer", "stages"}
    key = json.dumps(recipe.model_dump(mode="json", include=sections), sort_keys=True, default=str)
    if key in _PASSED:
        return
    _refuse_missing_trackers(recipe)
    _refuse_attention(recipe, skeleton)
    recipe = _with_all_settings(recipe, skeleton.model)
    rows = prepared.train.select(range(min(NUM_ROWS, len(prepared.train))))
    found = list(_stages(recipe, skeleton.model, rows, prepared.renderer.tokenizer))
    yield from found
    if not found:
        _PASSED.add(key)


def _with_all_settings(recipe: Recipe, skeleton: PreTrainedModel) -> Recipe:
    """Look up what `lora`, the stages' too, and an adapter to go on from name in the whole model.

    The recipe that is returned has the adapter's settings as its own.
    """
    own = [stage.lora for stage in recipe.stages if stage.lora is not None]
    for lora in own + ([recipe.lora] if recipe.lora is not None else []):
        refuse_unmatched(skeleton, lora)
    if recipe.model.adapter is None:
        return recipe
    _, config = read_adapter_config(skeleton, recipe.model.adapter, recipe.lora or {})
    found = {key: getattr(config, key) for key in ("r", "lora_alpha", "bias", "use_dora")}
    targets = config.target_modules
    found["target_modules"] = sorted(targets) if isinstance(targets, set) else targets
    return recipe.model_copy(update={"lora": found})


def _stages(
    recipe: Recipe, skeleton: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Finding]:
    """Build what each stage hands to upstream, and take its step."""
    with tempfile.TemporaryDirectory() as folder:
        for stage in recipe.stages:
            _refuse_arguments(recipe, stage, Path(folder))
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if several or sharded():
            return  # other processes would have to take part in a step
        small = small_model(skeleton)
        if small is None:
            return
        rehearsal = Rehearsal(skeleton, small, rows, tokenizer)
        for number, stage in enumerate(recipe.stages):
            where, place = f"stages.{stage.name}", Path(folder) / str(number)
            try:
                unmerged = rehearsal.take(recipe, stage, place)
            except SFTKeyError:
                raise
            except Exception as error:  # whatever upstream raises is what is looked for
                if not rehearsal.plain_works(recipe, stage, place / "plain"):
                    what = f"{where}: could not be tried on a small model"
                    hint = f"its first step will tell; {first_line(error)}"
                    yield Finding("not-rehearsed", (), what, hint, refuses=False)
                    return
                raise RecipeError(
                    where,
                    f"its first step, evaluation or save fails: {_said(error)}",
                    "these settings of `trainer` and `lora` can't be trained; the same stage with "
                    "plain ones can",
                ) from error
            if unmerged:
                what = f"{where}: its adapter can't be merged: {unmerged}"
                hint = "serve it beside its base; `sftkey merge` would refuse it"
                yield Finding("not-merged", (), what, hint, refuses=False)


def _said(error: BaseException) -> str:
    """Return what an error of upstream's says, with its kind where the text alone says little."""
    return f"{type(error).__name__}: {first_line(error)}"


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


@dataclass(frozen=True)
class Rehearsal:
    """What stages are tried with."""

    skeleton: PreTrainedModel  # the whole model, without weights
    small: PreTrainedModel  # one of its architecture, with two layers
    rows: Dataset  # some of train
    tokenizer: PreTrainedTokenizerBase  # the recipe's

    def take(self, recipe: Recipe, stage: StageSection, folder: Path) -> str | None:
        """Take one step of a stage, evaluate, save a checkpoint and the result, and load both.

        Returns:
            Why the adapter can't be merged, if it can't.
        """
        model = self._with_adapters(recipe, stage)
        settings = recipe.stage_trainer(stage)
        by_losses = settings.get("lr_scheduler_type") == "reduce_lr_on_plateau"
        evaluating = {"eval_strategy": "steps", "eval_steps": 1} if by_losses else {}
        short = recipe.model_copy(update={"trainer": {**settings, **SHORT, **evaluating}})
        short_stage = stage.model_copy(update={"trainer": {}})
        with quiet(), torch.random.fork_rng(devices=[]):
            trainer = make_trainer(
                recipe,
                stage,
                model=model,
                args=stage_arguments(short, short_stage, DEVICE, folder, on_start=True),
                tokenizer=self.tokenizer,
                train_dataset=self.rows,
                eval_dataset=self.rows,
            )
            trainer.train()
            _refuse_unknown_metric(settings, trainer.evaluate(), stage)
            save_stage(trainer, folder / "adapter", BASE, write=True)
            if (checkpoint := max(folder.glob("checkpoint-*"), default=None)) is not None:
                trainer._load_from_checkpoint(str(checkpoint))
            if recipe.lora is None or stage.context == "frozen":
                return None
            lora, other = self._lora_of_small(recipe.lora), copy.deepcopy(self.small)
            adapted = load_adapter(other, folder / "adapter", BASE, lora=lora)
            try:
                adapted.merge_and_unload()
            except Exception as error:  # whatever keeps peft from it
                return first_line(error)
            return None

    def plain_works(self, recipe: Recipe, stage: StageSection, folder: Path) -> bool:
        """Tell whether the stage's step can be taken at all with settings that say nothing."""
        lora = None if recipe.lora is None else PLAIN
        plain = recipe.model_copy(update={"trainer": {}, "lora": lora})
        of_key = {"trainer": {}, "lora": PLAIN if stage.context == "frozen" else None}
        try:
            self.take(plain, stage.model_copy(update=of_key), folder)
        except Exception:
            return False
        return True

    def _with_adapters(self, recipe: Recipe, stage: StageSection) -> Any:
        """Return a small model with the stage's adapters, on the modules that they will be on."""
        model: Any = copy.deepcopy(self.small)
        if stage.context == "frozen":
            model.requires_grad_(False)
            for member in key_adapter_specs(recipe, stage):
                lora = self._lora_of_small(member.lora)
                model = add_lora(model, lora, member.seed, member.name)
            act(model, context_adapters(model))
        elif recipe.lora is not None:
            model = add_lora(model, self._lora_of_small(recipe.lora), recipe.seed)
        return model

    def _lora_of_small(self, lora: dict[str, Any]) -> dict[str, Any]:
        """Say what an adapter of the whole model is on two layers: what these have of it."""
        kept = {key: value for key, value in lora.items() if key not in OF_ALL_LAYERS}
        targets = lora.get("target_modules")
        if targets and targets != "all-linear":
            wanted = short_names(target_names(self.skeleton, targets))
            kept["target_modules"] = short_names(target_names(self.small, wanted)) or "all-linear"
        for key, named in (
            ("modules_to_save", self.small.named_modules()),
            ("target_parameters", self.small.named_parameters()),
        ):
            if lora.get(key):
                names = [name for name, _ in named]
                kept[key] = [each for each in lora[key] if any(n.endswith(each) for n in names)]
        return kept


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


def _refuse_missing_trackers(recipe: Recipe) -> None:
    """Refuse trackers whose package is missing."""
    for stage in recipe.stages:
        where = f"stages.{stage.name}.trainer.report_to"
        try:
            for kind in get_reporting_integration_callbacks(
                reported_to(recipe.stage_trainer(stage))
            ):
                kind()
        except (ImportError, RuntimeError, ValueError) as error:
            raise RecipeError(where, first_line(error)) from error


def _refuse_attention(recipe: Recipe, skeleton: Skeleton) -> None:
    """Refuse an attention that this model doesn't have, or whose package is missing."""
    attention = recipe.model.attn_implementation
    if attention == skeleton.attention:
        return  # it is built with this one
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(skeleton.config, attn_implementation=attention)
    except (ValueError, ImportError) as error:
        what = f"expected one that this model has, on this machine; got {attention!r}"
        hint = f"write model.attn_implementation={skeleton.attention}"
        where = "model.attn_implementation"
        raise ModelError(where, f"{what}: {first_line(error)}", hint) from error


def _refuse_arguments(recipe: Recipe, stage: StageSection, folder: Path) -> None:
    """Build a stage's arguments as the run will, and refuse what upstream refuses of them."""
    where = f"stages.{stage.name}.trainer"
    try:
        with quiet():
            arguments = stage_arguments(recipe, stage, DEVICE, folder, on_start=True)
            if arguments.torch_compile:  # a step of a compiled model would take minutes
                backend = str(arguments.torch_compile_backend).lower()
                DynamoBackend(backend.upper())
                torch.compile(Identity(), backend=backend, mode=arguments.torch_compile_mode)
    except SFTKeyError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        raise RecipeError(where, f"trl.SFTConfig refuses it: {_said(error)}") from error
    if arguments.activation_offloading and torch.accelerator.current_accelerator() is None:
        what = "activation_offloading takes activations off a GPU, and this machine has none"
        raise RecipeError(where, what, "leave it out, or write gradient_checkpointing: true")
    _refuse_idle_optimizer_settings(arguments, where)


def _refuse_idle_optimizer_settings(arguments: SFTConfig, where: str) -> None:
    """Refuse settings of an optimizer that the one which is built never reads."""
    defaults = {each.name: each.default for each in dataclasses.fields(SFTConfig)}
    read = Trainer.get_optimizer_cls_and_kwargs
    for key in ("optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"):
        if getattr(arguments, key) == defaults[key]:
            continue
        plain = copy.copy(arguments)
        setattr(plain, key, defaults[key])
        try:
            idle = read(plain) == read(arguments)
        except (ImportError, ValueError):  # the stage's step tells more of it
            return
        if idle:
            optimizer = OptimizerNames(arguments.optim).value
            what = f"{key}={getattr(arguments, key)!r}: {optimizer} never reads it"
            raise RecipeError(where, what, "leave it out, or choose another optimizer")


def _refuse_unknown_metric(
    trainer: dict[str, Any], metrics: dict[str, float], stage: StageSection
) -> None:
    """Refuse to choose the best checkpoint by what no evaluation reports: a KeyError, later."""
    metric = trainer.get("metric_for_best_model")
    if metric is None or f"eval_{metric.removeprefix('eval_')}" in metrics:
        return
    known = ", ".join(name for name in metrics if name.startswith("eval_loss"))
    where = f"stages.{stage.name}.trainer.metric_for_best_model"
    raise RecipeError(where, f"expected one of {known}; got {metric!r}")
