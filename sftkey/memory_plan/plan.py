"""The plan: how much memory each stage of a recipe needs on a GPU, part by part.

It is computed from the model's config alone. What is held is counted to the byte; what a batch
needs is added up from what autograd keeps of each module (`plan_activations`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftkey.errors import RecipeError, shown
from sftkey.memory_plan import held
from sftkey.memory_plan.activations import Batch, passing
from sftkey.memory_plan.held import DEFAULT_OPTIMIZER, Setting, setting_of
from sftkey.memory_plan.shape import ModelShape, read_shape
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe, StageSection

GIB = 2**30
# Not planned but set aside: CUDA's own context, and what its allocator loses to fragments.
RESERVED_BYTES = GIB
KEY_TOKENS = 128  # of a row's key, where no data were read
MOST_ROWS = 1024
LENGTH_STEP = 64


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs, in bytes, with the largest batch that the recipe allows.

    Args:
        name: The stage's.
        context: The stage's.
        rows: Of a batch.
        length: Tokens of each row.
        parts: What each part needs at the peak.
        longest: The longest rows that fit, at so many a batch; 0: none.
        most_rows: How many rows fit, of so many tokens; 0: none.
    """

    name: str
    context: str
    rows: int
    length: int
    parts: dict[str, int]
    longest: int
    most_rows: int

    @property
    def peak_bytes(self) -> int:
        """Add up the parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """What a recipe needs on a GPU.

    Args:
        gpu_bytes: What the GPU has.
        stages: In their order.
    """

    gpu_bytes: int
    stages: tuple[StagePlan, ...]

    @property
    def fits(self) -> bool:
        """Tell whether every stage fits, beside what is set aside."""
        return all(each.peak_bytes + RESERVED_BYTES <= self.gpu_bytes for each in self.stages)

    def as_json(self) -> dict[str, Any]:
        """Give the plan for `--json`."""
        return {
            "gpu_bytes": self.gpu_bytes,
            "reserved_bytes": RESERVED_BYTES,
            "fits": self.fits,
            "stages": {
                each.name: {
                    "context": each.context,
                    "batch_rows": each.rows,
                    "max_length": each.length,
                    "parts": each.parts,
                    "peak_bytes": each.peak_bytes,
                    "longest_tokens": each.longest,
                    "most_rows": each.most_rows,
                }
                for each in self.stages
            },
        }


def size_bytes(text: str) -> int:
    """Read the size of a GPU's memory: `24GB` is what a card is sold as, and that is 24 GiB.

    Raises:
        RecipeError: It is no such size.

    >>> size_bytes("24GB") == size_bytes("24GiB") == 24 * 2**30
    True
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB|GiB)", text.strip(), re.IGNORECASE)
    size = float(found[1]) * GIB if found else 0
    if size <= RESERVED_BYTES:
        raise RecipeError(
            "--gpu",
            f"expected a size of memory above 1 GiB; got {shown(text)}",
            "write --gpu 24GB, for one; a GB is 2^30 bytes here, as on a card's label",
        )
    return round(size)


def make_plan(recipe: Recipe, shape: ModelShape, gpu_bytes: int) -> Plan:
    """Plan all stages of a recipe on one GPU, for rows as long as the recipe allows.

    Raises:
        CheckError: The recipe asks for something that isn't planned.
    """
    stages = (_stage_plan(recipe, stage, shape, gpu_bytes) for stage in recipe.stages)
    return Plan(gpu_bytes, tuple(stages))


def _stage_plan(
    recipe: Recipe, stage: StageSection, shape: ModelShape, gpu_bytes: int
) -> StagePlan:
    setting = setting_of(recipe, stage, shape, "cuda")
    long = trains_context(stage)
    packed = recipe.data.packing and stage.context == "exact"
    rows, length = batch_rows(recipe, stage), recipe.data.max_length

    def parts(rows: int, length: int) -> dict[str, int]:
        labelled = length if long else min(KEY_TOKENS, max(length - 2, 1))
        padded = rows > 1 or packed
        return parts_of(shape, setting, Batch(rows, length, labelled, padded))

    def fits(rows: int, length: int) -> bool:
        return sum(parts(rows, length).values()) + RESERVED_BYTES <= gpu_bytes

    steps = shape.most_tokens // LENGTH_STEP
    longest = LENGTH_STEP * _most(lambda count: fits(rows, count * LENGTH_STEP), steps)
    most_rows = _most(lambda count: fits(count, length), MOST_ROWS)
    return StagePlan(
        stage.name, stage.context, rows, length, parts(rows, length), longest, most_rows
    )


def parts_of(shape: ModelShape, setting: Setting, batch: Batch) -> dict[str, int]:
    """Give the bytes of each part at the peak."""
    needs = passing(shape, setting, batch)
    return {
        "weights": held.weight_bytes(shape, setting),
        "quantization constants": held.constant_bytes(shape, setting),
        "adapters": held.adapter_bytes(shape, setting),
        "gradients": held.gradient_bytes(shape, setting),
        "optimizer": held.optimizer_bytes(shape, setting),
        "activations": round(needs.activations),
        "logits": round(needs.logits),
        "cache": round(needs.cache),
    }


def batch_rows(recipe: Recipe, stage: StageSection) -> int:
    """Give the rows of a stage's batch; 8 is upstream's default."""
    return int(recipe.stage_trainer(stage).get("per_device_train_batch_size", 8))


def trains_context(stage: StageSection) -> bool:
    """Tell whether the loss is on more than the key."""
    loss_on = stage.loss_on
    if isinstance(loss_on, str):
        return loss_on == "completion"
    thinking = loss_on.get("thinking", loss_on.get("completion", 0))
    return thinking > 0 or loss_on.get("prompt", 0) > 0


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """Give the largest number from 1 to the limit that fits; 0 if 1 doesn't."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


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


NONE_FITS = "no change that is known here makes it fit: take a smaller model or a larger GPU"


@dataclass(frozen=True)
class Fit:
    """A recipe's plan, and what to write where it doesn't fit.

    Args:
        name: The recipe's.
        plan: As the recipe stands.
        changes: Overrides; none where it fits, None where no change suffices.
    """

    name: str
    plan: Plan
    changes: list[str] | None

    def as_json(self) -> dict[str, Any]:
        """Give plan and changes."""
        return {**self.plan.as_json(), "changes": self.changes}

    @property
    def message(self) -> str:
        """Say of a recipe that doesn't fit what it needs."""
        worst = max(self.plan.stages, key=lambda stage: stage.peak_bytes)
        return (
            f"stage {worst.name} needs {gib(worst.peak_bytes)} GiB at its peak, and "
            f"{gib(RESERVED_BYTES)} GiB are set aside; the GPU has {gib(self.plan.gpu_bytes)} GiB"
        )

    @property
    def hint(self) -> str:
        """Say what to do about it."""
        return f"write {' '.join(self.changes)}" if self.changes else NONE_FITS

    def finding(self) -> dict[str, Any]:
        """Give the fields of the gate's finding."""
        return {
            "code": "memory",
            "rows": (),
            "message": self.message,
            "hint": self.hint,
            "refuses": True,
        }


def fit(recipe: Path, overrides: Sequence[str], gpu: str) -> Fit:
    """Plan a recipe on a GPU, and look for what makes it fit.

    Raises:
        SFTKeyError: The size, the recipe or its model can't be read, or aren't planned.
    """
    size = size_bytes(gpu)

    def load(more: Sequence[str]) -> Recipe:
        return load_recipe(recipe, [*overrides, *more])

    loaded = load([])
    shape = read_shape(loaded.model)
    plan = make_plan(loaded, shape, size)
    return Fit(loaded.name, plan, changes_that_fit(load, shape, size))


def gib(size: int) -> str:
    """Write a size."""
    return f"{size / GIB:.2f}"
