"""The plan: how much memory each stage of a recipe needs on a GPU, part by part.

It is computed from the model's config alone. What is held is counted to the byte; what a batch
needs is added up from what autograd keeps of each module (`plan_activations`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sftkey.errors import RecipeError, shown
from sftkey.planning import plan_held
from sftkey.planning.model_shape import ModelShape
from sftkey.planning.plan_activations import Batch, passing
from sftkey.planning.plan_setting import Setting, setting_of
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
        "weights": plan_held.weight_bytes(shape, setting),
        "quantization constants": plan_held.constant_bytes(shape, setting),
        "adapters": plan_held.adapter_bytes(shape, setting),
        "gradients": plan_held.gradient_bytes(shape, setting),
        "optimizer": plan_held.optimizer_bytes(shape, setting),
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
