"""The recipes that come with sftkey, by short names such as `qwen3-8b/gsm8k`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftkey.errors import RecipeError, did_you_mean
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe

PACKAGE = Path(__file__).parents[1]
# A wheel carries the recipes inside the package; a checkout has them beside it.
RECIPES = next(
    (folder for folder in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if folder.is_dir()),
    PACKAGE / "recipes",
)


def recipe_files(folder: Path) -> Iterator[Path]:
    """Find the recipes; studies and their results lie beside them and are none."""
    for file in sorted(folder.rglob("*.yaml")):
        inside = file.relative_to(folder)
        if not file.name.startswith("study-") and "results" not in inside.parts:
            yield file


def short_names(folder: Path = RECIPES) -> dict[str, Path]:
    """Return the files by their short names: a recipe's folder and its own name."""
    return {short_name(file, folder): file for file in recipe_files(folder)}


def short_name(file: Path, folder: Path = RECIPES) -> str:
    """Return a recipe's short name; of one that lies elsewhere its path, as it was given."""
    if file.absolute().is_relative_to(folder):
        return file.absolute().relative_to(folder).with_suffix("").as_posix()
    return str(file)


def find_recipe(target: Path, folder: Path = RECIPES) -> Path:
    """Return the file that a command's RECIPE means: a path that exists, else a short name's.

    Raises:
        RecipeError: It is neither. A missing YAML file that resembles no short name is returned:
            whoever reads it says that there is none.
    """
    if os.path.exists(target):
        return target
    known, name = short_names(folder), target.as_posix()
    if name in known:
        return Path(shortest(known[name]))
    written = name.removesuffix(".yaml").removeprefix(f"{folder.name}/")
    meant = did_you_mean(written, known)
    if target.suffix in (".yaml", ".yml") and not meant:
        return target
    what = f"expected a recipe's file, or a name of `sftkey ls`; there is none{meant}"
    raise RecipeError(str(target), what, "`sftkey ls` shows the recipes that there are")


def describe(file: Path, folder: Path = RECIPES) -> dict[str, Any]:
    """Read what `ls` shows of a recipe; `gpu_memory_gib` is None until it has been measured."""
    recipe = load_recipe(file)
    return {
        "recipe": short_name(file, folder),
        "file": shortest(file),
        "name": recipe.name,
        "model": recipe.model.name_or_path,
        "data": " ".join(filter(None, (recipe.data.source, recipe.data.config, recipe.data.task))),
        "method": method(recipe),
        "stages": [stage.name for stage in recipe.stages],
        "gpu_memory_gib": measured_memory(file.read_text(encoding="utf-8")),
    }


def shortest(file: Path) -> str:
    """Write a path as `sftkey train` takes it from here: relative where that leads downwards."""
    relative = os.path.relpath(file)
    return str(file) if relative.startswith(os.pardir) else relative


def method(recipe: Recipe) -> str:
    """Name how the recipe trains: all weights, or an adapter over whole or quantized ones."""
    if recipe.lora is None:
        return "full"
    return "LoRA" if recipe.model.quantization == "none" else "QLoRA"


def measured_memory(text: str) -> float | None:
    """Read the GiB of the `# Fits:` line in the comment at a recipe's head."""
    head = re.match(r"(?:#.*\n)*", text)
    found = re.search(r"^# Fits:.*?([\d.]+) GiB", head[0], re.MULTILINE) if head else None
    return float(found[1]) if found else None
