"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sftkey.recipe.load import find_recipe, short_names


def recipe_file(target: Path | None) -> Path | None:
    """Return the file that an argument means, by its path or its short name."""
    return target and find_recipe(target)


def recipe_names(incomplete: str) -> list[str]:
    """Return the short names that a shell can offer for the beginning of one."""
    return [name for name in short_names() if name.startswith(incomplete)]


# An argument or option that takes a recipe by its file or its short name.
TAKES_NAMES: dict[str, Any] = {"callback": recipe_file, "autocompletion": recipe_names}
RecipeArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="A recipe's YAML file, or a name of `sftkey ls`.", **TAKES_NAMES
    ),
]
RecipeOrRun = Annotated[
    Path,
    typer.Argument(
        metavar="TARGET", help="A recipe's file or name, or a run's folder.", **TAKES_NAMES
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
LastStage = Annotated[
    str | None, typer.Option("--stage", metavar="NAME", help="A trained stage; default the last.")
]
Answering = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The stage that answers, or base; default the last."),
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Default: the recipe's eval.max_new_tokens.")
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
    float | None, typer.Option(min=0.0, max=1.0, help="Score = alpha * Acc + (1 - alpha) * Fmt.")
]
