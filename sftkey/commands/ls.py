"""List the recipes that come with sftkey: model, data, method, stages, and the memory measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sftkey.recipe.collection import RECIPES, describe, recipe_files

COLUMNS = ("model", "data", "method", "stages", "GPU memory")
# To plan it, config and tokenizer of the model are needed, which may have to be fetched.
PLANNED = "planned GPU memory of one: sftkey check RECIPE --gpu 24GB --plan-only"


def ls(as_json: bool = False, folder: Path = RECIPES) -> None:
    """Print a row for each recipe of a folder, or a JSON list of objects.

    Raises:
        RecipeError: One of them is wrong.
    """
    rows = [describe(file, folder) for file in recipe_files(folder)]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(rows)
        print(PLANNED, file=sys.stderr)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the recipes as a table that no pipe cuts and no terminal breaks."""
    from sftkey.commands.terminal import stdout_console
    from sftkey.tables import FittedTable

    table = FittedTable("recipe", COLUMNS, left=True)
    for row in rows:
        memory = "" if row["gpu_memory_gib"] is None else f"{row['gpu_memory_gib']:g} GiB"
        stages = ", ".join(row["stages"])
        table.add([row["recipe"], row["model"], row["data"], row["method"], stages, memory])
    stdout_console().print(table)
