"""List the recipes that come with sftkey: model, data, method, stages, and the memory measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sftkey.recipe.collection import RECIPES, describe, recipe_files

COLUMNS = ("recipe", "model", "data", "method", "stages", "GPU memory")


def ls(as_json: bool = False, folder: Path = RECIPES) -> None:
    """Print a line for each recipe of a folder, or a JSON list of objects.

    Raises:
        RecipeError: One of them is wrong.
    """
    rows = [describe(file) for file in recipe_files(folder)]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the recipes as a table that no pipe cuts."""
    from rich.table import Table

    from sftkey.commands.terminal import stdout_console

    table = Table(*COLUMNS, box=None, pad_edge=False)
    for row in rows:
        memory = "" if row["gpu_memory_gib"] is None else f"{row['gpu_memory_gib']:g} GiB"
        stages = ", ".join(row["stages"])
        table.add_row(row["recipe"], row["model"], row["data"], row["method"], stages, memory)
    stdout_console().print(table)
