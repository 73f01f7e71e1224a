"""The peaks of recipes whose models are on this machine, for a list that fetches nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from sftkey.errors import SFTKeyError
from sftkey.memory_plan.held import Skeleton, read_skeleton
from sftkey.memory_plan.plan import make_plan
from sftkey.models.source import at_hand
from sftkey.recipe.schema import ModelSection, Recipe


def peak_bytes(recipe: Recipe) -> int | None:
    """Return what the recipe's largest stage needs on CUDA, beside what is set aside.

    None where the model's config would have to be fetched, or the recipe asks for what isn't
    planned; `sftkey check RECIPE --gpu SIZE --plan-only` says which.
    """
    folder = at_hand(recipe.model)
    if folder is None:
        return None
    try:
        plan = make_plan(recipe, _skeleton(folder, recipe.model.attn_implementation), 0)
        return max(stage.peak_bytes for stage in plan.stages)
    except SFTKeyError:
        return None


@cache
def _skeleton(folder: Path, attention: str) -> Skeleton:
    """Read a model once for all of its recipes: what is traced of it is kept with it."""
    return read_skeleton(ModelSection(name_or_path=str(folder), attn_implementation=attention))
