"""The recipe that ships for the nearest model, and in what another differs from it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftkey.recipe.load import changed_keys, load_recipe
from sftkey.recipe.schema import Recipe
from sftkey.recipe.yaml_io import inline

COMPARED = ("model.", "lora", "response.")
OWN = ("model.name_or_path", "model.file", "model.sha256", "model.revision")


@dataclass(frozen=True)
class Nearest:
    """A recipe of the collection.

    Args:
        file: Where it lies.
        same_family: Its model is of the same family by name.
        differences: Key, value there, value here; of the sections model, lora and response.
    """

    file: Path
    same_family: bool
    differences: list[tuple[str, str, str]]


def find_nearest(recipe: Recipe, model_type: str, files: Iterable[Path]) -> Nearest | None:
    """Find the recipe of the nearest model: of the same family, then with the same frame and tags.

    Args:
        recipe: The new one.
        model_type: The architecture's name in its config.
        files: The recipes to look through.
    """
    families = {_family(model_type), _family(recipe.model.name_or_path)}

    def likeness(pair: tuple[Path, Recipe]) -> tuple[bool, bool, float]:
        other = pair[1]
        here, there = _last(recipe.model.name_or_path), _last(other.model.name_or_path)
        return (
            _family(other.model.name_or_path) in families,
            other.response == recipe.response,
            difflib.SequenceMatcher(None, here, there).ratio(),
        )

    known = [(file, load_recipe(file)) for file in files]
    if not known:
        return None
    file, other = max(known, key=likeness)
    return Nearest(file, likeness((file, other))[0], _differences(other, recipe))


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _family(name: str) -> str:
    """Give the letters that a name begins with: `qwen` of Qwen2.5-1.5B and of qwen2_moe."""
    match = re.match("[a-z]+", _last(name).removeprefix("pypi:").removeprefix("meta-"))
    return match[0] if match else ""


def _differences(other: Recipe, recipe: Recipe) -> list[tuple[str, str, str]]:
    before, after = other.model_dump(mode="json"), recipe.model_dump(mode="json")
    keys = [key for key in changed_keys(other, recipe) if key.startswith(COMPARED)]
    return [(key, _shown(before, key), _shown(after, key)) for key in keys if key not in OWN]


def _shown(values: Any, path: str) -> str:
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return inline(values)
