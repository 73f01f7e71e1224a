"""Copy a recipe, to edit it."""

from __future__ import annotations

import sys
from pathlib import Path

from sftkey.recipe.collection import short_name
from sftkey.recipe.load import load_recipe
from sftkey.recipe.yaml_io import write_new


def cp(recipe: Path, output: Path) -> None:
    """Write a recipe's text into a new file; the commands in its head then name that file.

    Args:
        recipe: Its file.
        output: The new file; nothing is overwritten.

    Raises:
        RecipeError: The recipe is wrong, or `output` exists or can't be written.
    """
    name = load_recipe(recipe).name
    text = recipe.read_text(encoding="utf-8-sig")
    write_new(output, text.replace(f"recipes/{short_name(recipe)}.yaml", str(output)))
    print(f"{output}: written")
    what = f"its runs go into runs/{name}; write another `name` there to keep several"
    print(f"note: {what}", file=sys.stderr)
