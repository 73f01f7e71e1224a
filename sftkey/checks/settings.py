"""Settings that upstream has no use for: each is refused by name, before any weight is loaded."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from sftkey.errors import ModelError, RecipeError, first_line
from sftkey.recipe.schema import Recipe, StageSection
from sftkey.training.log import reported_to


def refuse_missing_trackers(recipe: Recipe) -> None:
    """Refuse trackers whose package is missing.

    Raises:
        RecipeError: Names the tracker, and what its integration says.
    """
    for stage in recipe.stages:
        names = reported_to(recipe.stage_trainer(stage))
        try:
            for kind in get_reporting_integration_callbacks(names):
                kind()
        except (ImportError, RuntimeError, ValueError) as error:
            raise RecipeError(
                f"stages.{stage.name}.trainer.report_to", first_line(error)
            ) from error


def refuse_attention(recipe: Recipe, skeleton: PreTrainedModel) -> None:
    """Refuse an attention that this model doesn't have, or whose package is missing.

    Raises:
        ModelError: Says what transformers says.
    """
    attention = recipe.model.attn_implementation
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(skeleton.config, attn_implementation=attention)
    except (ValueError, ImportError) as error:
        what = f"expected one that this model has, on this machine; got {attention!r}"
        raise ModelError("model.attn_implementation", f"{what}: {first_line(error)}") from error


def refuse_idle_optimizer_settings(arguments: SFTConfig, where: str) -> None:
    """Refuse settings of an optimizer that the one which is built never reads.

    Raises:
        RecipeError: Names the first.
    """
    defaults = {each.name: each.default for each in dataclasses.fields(SFTConfig)}
    read = Trainer.get_optimizer_cls_and_kwargs
    for key in ("optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"):
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


def refuse_unknown_metric(
    trainer: dict[str, Any], metrics: dict[str, float], stage: StageSection
) -> None:
    """Refuse to choose the best checkpoint by what no evaluation reports: a KeyError, later.

    Raises:
        RecipeError: Names what there is.
    """
    metric = trainer.get("metric_for_best_model")
    if metric is None or f"eval_{metric.removeprefix('eval_')}" in metrics:
        return
    known = [name for name in metrics if name.startswith("eval_loss")]
    raise RecipeError(
        f"stages.{stage.name}.trainer.metric_for_best_model",
        f"expected one of {', '.join(known)}; got {metric!r}",
    )
