"""The change that makes a recipe fit a GPU, as overrides of the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sftkey.planning.model_shape import ModelShape
from sftkey.planning.plan import Plan, batch_rows, make_plan, trains_context
from sftkey.planning.plan_setting import DEFAULT_OPTIMIZER
from sftkey.recipe.schema import Recipe

SHORTEST = 256  # tokens; shorter rows hold hardly any reasoning
EIGHT_BITS = {
    "adamw_torch": "adamw_8bit",
    "adamw_torch_fused": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_8bit",
    "lion_32bit": "lion_8bit",
    "paged_lion_32bit": "paged_lion_8bit",
}

Load = Callable[[Sequence[str]], Recipe]
Planned = Callable[[Recipe], Plan]
Overrides = list[str]


def changes_that_fit(load: Load, shape: ModelShape, gpu_bytes: int) -> Overrides | None:
    """Find the simplest change that makes a recipe fit: one kind alone, or as few as it takes.

    The kinds are tried in the order of how little they change what is trained: activations computed
    anew and smaller batches give the same gradients, 8 bits and NF4 nearly the same, a detached
    context optimizes something else, and shorter rows leave some out.

    Args:
        load: Gives the recipe with overrides.
        shape: The model's.
        gpu_bytes: What the GPU has.

    Returns:
        Overrides; none where it fits as it is, and None where all of them don't suffice.
    """

    def planned(recipe: Recipe) -> Plan:
        return make_plan(recipe, shape, gpu_bytes)

    recipe = load([])
    if planned(recipe).fits:
        return []
    for kind in KINDS:
        for overrides in kind(recipe, planned):
            if planned(load(overrides)).fits:
                return overrides
    taken: list[Overrides] = []
    for kind in KINDS:
        strongest: Overrides = []
        for overrides in kind(load(_joined(taken)), planned):
            if planned(load(_joined([*taken, overrides]))).fits:
                return _without_idle([*taken, overrides], load, planned)
            strongest = overrides
        taken.append(strongest)
    return None


def _joined(taken: list[Overrides]) -> Overrides:
    return [each for overrides in taken for each in overrides]


def _without_idle(taken: list[Overrides], load: Load, planned: Planned) -> Overrides:
    """Leave out what isn't needed beside the rest; what changes training most goes first."""
    for overrides in reversed(taken):
        fewer = [each for each in taken if each is not overrides]
        if planned(load(_joined(fewer))).fits:
            taken = fewer
    return _joined(taken)


def _checkpointing(recipe: Recipe, planned: Planned) -> Iterator[Overrides]:
    """Compute activations anew in the backward pass."""
    key = "gradient_checkpointing"
    kept = {
        stage.name: "true"
        for stage in recipe.stages
        if stage.context == "exact" and not recipe.stage_trainer(stage).get(key, True)
    }
    if kept:
        yield _written(recipe, key, kept)


def _batches(recipe: Recipe, planned: Planned) -> Iterator[Overrides]:
    """Take fewer rows at a time, as many in a step."""
    stages = {stage.name: stage for stage in recipe.stages}
    rows = {name: batch_rows(recipe, stage) for name, stage in stages.items()}
    accumulation = "gradient_accumulation_steps"
    total = {
        name: rows[name] * int(recipe.stage_trainer(stage).get(accumulation, 1))
        for name, stage in stages.items()
    }
    before = rows
    for most in range(max(rows.values()) - 1, 0, -1):
        fewer = {name: min(rows[name], largest_part(total[name], most)) for name in rows}
        if fewer != before:
            steps = {name: total[name] // fewer[name] for name in rows}
            yield [
                *_written(recipe, "per_device_train_batch_size", fewer),
                *_written(recipe, accumulation, steps),
            ]
        before = fewer


def largest_part(total: int, most: int) -> int:
    """Give the largest number up to a limit that a step's rows can be divided by."""
    return next(count for count in range(min(most, total), 0, -1) if total % count == 0)


def _optimizer(recipe: Recipe, planned: Planned) -> Iterator[Overrides]:
    """Hold the optimizer's state in 8 bits."""
    names = {
        stage.name: str(recipe.stage_trainer(stage).get("optim", DEFAULT_OPTIMIZER))
        for stage in recipe.stages
    }
    if any(name in EIGHT_BITS for name in names.values()):
        smaller = {stage: EIGHT_BITS.get(name, name) for stage, name in names.items()}
        yield _written(recipe, "optim", smaller)


def _quantization(recipe: Recipe, planned: Planned) -> Iterator[Overrides]:
    """Hold the weights in 4 bits, where they aren't trained."""
    if recipe.model.quantization == "none" and recipe.lora is not None:
        yield ["model.quantization=nf4"]


def _context(recipe: Recipe, planned: Planned) -> Iterator[Overrides]:
    """Let no gradient through the context of the stages that train the key alone."""
    exact = [each for each in recipe.stages if each.context == "exact" and not trains_context(each)]
    if exact:
        yield [f"stages.{stage.name}.context=detached" for stage in exact]


def _length(recipe: Recipe, planned: Planned) -> Iterator[Overrides]:
    """Take the longest rows that fit."""
    longest = min(stage.longest for stage in planned(recipe).stages)
    if longest < recipe.data.max_length:
        yield [f"data.max_length={max(longest, SHORTEST)}"]


KINDS = (_checkpointing, _batches, _optimizer, _quantization, _context, _length)


def _written(recipe: Recipe, key: str, values: dict[str, Any]) -> Overrides:
    """Write a trainer's setting: once for all stages, or for each where they have their own."""
    own = any(key in stage.trainer for stage in recipe.stages)
    if not own and len(set(values.values())) == 1:
        return [f"trainer.{key}={next(iter(values.values()))}"]
    return [f"stages.{name}.trainer.{key}={value}" for name, value in values.items()]
