"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sftkey.recipe.collection import find_recipe, short_names


def recipe_file(target: Path | None) -> Path | None:
    """Return the file of a recipe that was named by its path or short name."""
    return target and find_recipe(target)


def recipe_names(incomplete: str) -> list[str]:
    """Return the short names that complete a word."""
    return [name for name in short_names() if name.startswith(incomplete)]


RecipeArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe's YAML file, or a name of `sftkey ls`.",
        callback=recipe_file,
        autocompletion=recipe_names,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes: trainer.learning_rate=1e-4, for one."),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
GPU = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="SIZE",
        help="Plan the memory on a GPU of this size: 24GB (as on a card's label, so 24 GiB).",
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Score = alpha * Acc + (1 - alpha) * Fmt."),
]
