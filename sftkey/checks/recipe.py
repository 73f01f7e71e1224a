"""What the gate reads off a recipe alone: open choices, learning rates, the launcher's config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sftkey.checks.findings import Finding
from sftkey.data.labels import weights_by_segment
from sftkey.data.response import Segment
from sftkey.models.device import launched_with
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import trainer_setting
from sftkey.recipe.yaml_io import Keys, dotted

UNDECIDED = "DECIDE:"  # what `sftkey adapt` writes in the place of a value that it can't choose
# For all weights between the 5e-6 of arXiv 2512.21017 and the 2e-5 of TRL's example, for LoRA the
# 2e-4 of the same example (trl/scripts/sft.py, 1.16).
USUAL_LEARNING_RATES = {"full fine-tuning": 1e-5, "LoRA": 2e-4}
FACTOR = 10.0


def recipe_findings(recipe: Recipe, env: Mapping[str, str]) -> Iterator[Finding]:
    """Find what no row and no file is needed for.

    Args:
        recipe: A recipe of right form.
        env: `accelerate launch` says in it what its config asks for.
    """
    for keys, value in undecided(recipe):
        what = f"{dotted(keys)} is still to be decided: {value.removeprefix(UNDECIDED).strip()}"
        yield Finding("undecided", (), what, f"write a value in the place of `{UNDECIDED} …`")
    yield from _launcher(recipe, env)
    yield from _learning_rates(recipe)
    if recipe.model.adapter is None:
        yield from _end_untrained(recipe)


def undecided(recipe: Recipe, *sections: str) -> list[tuple[Keys, str]]:
    """List the marked values, of all sections or of these."""
    values = recipe.model_dump(mode="json", include=set(sections) or None)
    return list(_marked(values, ()))


def _marked(value: Any, keys: Keys) -> Iterator[tuple[Keys, str]]:
    if isinstance(value, str) and value.startswith(UNDECIDED):
        yield keys, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _marked(inner, (*keys, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _marked(inner, (*keys, number))


def _launcher(recipe: Recipe, env: Mapping[str, str]) -> Iterator[Finding]:
    """Refuse a launcher's config that can't serve the recipe, and name one that can."""
    deepspeed = launched_with("DEEPSPEED", env)
    stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    if deepspeed and stage == "3" and recipe.model.quantization == "nf4":
        yield Finding(
            "launcher",
            (),
            "model.quantization: ZeRO-3 can't shard nf4 weights",
            "launch with accelerate_configs/fsdp2.yaml, which does, or with deepspeed_zero2.yaml, "
            "where each GPU holds them all; or write model.quantization=none",
        )
    if deepspeed or launched_with("FSDP", env):
        what = (
            "FSDP and DeepSpeed cut the model up: its answers aren't written or graded in the run"
        )
        hint = f"after it, on one process: sftkey evaluate runs/{recipe.name}"
        yield Finding("not-graded", (), what, hint, refuses=False)


def _learning_rates(recipe: Recipe) -> Iterator[Finding]:
    """Warn of a learning rate far from what its kind of training usually takes."""
    kind = "full fine-tuning" if recipe.lora is None else "LoRA"
    usual = USUAL_LEARNING_RATES[kind]
    for stage in recipe.stages:
        rate = trainer_setting(recipe.stage_trainer(stage), "learning_rate")
        far = FACTOR * 1.001  # a rate that is just ten times off isn't far, however it is rounded
        if usual / far <= rate <= usual * far:
            continue
        side = "above" if rate > usual else "below"
        yield Finding(
            "learning-rate",
            (),
            f"stages.{stage.name}: the learning rate {rate:g} lies more than {FACTOR:g} times "
            f"{side} what {kind} usually takes",
            f"usual is around {usual:g}: stages.{stage.name}.trainer.learning_rate={usual:g}",
            refuses=False,
        )


def _end_untrained(recipe: Recipe) -> Iterator[Finding]:
    """Refuse stages of which none trains the end of turn, unless an adapter has before them."""
    if not any(weights_by_segment(stage.loss_on)[Segment.END] for stage in recipe.stages):
        yield Finding(
            "end-untrained",
            (),
            "stages: none of them trains the end of turn, so the model won't learn to stop there",
            "loss_on: key in the last stage, or weights with `end`; model.adapter goes on from an "
            "adapter that was trained to stop",
        )
