"""Show which tokens each stage of a recipe trains: needs the tokenizer, no weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sftkey.recipe.load import load_recipe


def show(
    recipe: Path, overrides: Sequence[str] = (), num_rows: int = 3, as_json: bool = False
) -> None:
    """Print the first rows token by token, and statistics of them all.

    With `as_json` stdout gets one JSON object a row, and the statistics go to stderr.

    Raises:
        SFTKeyError: Whatever of the recipe, its tokenizer or its data can't be used.
    """
    checked = load_recipe(recipe, overrides)
    from rich.console import Console

    from sftkey.checks.stop import not_verified
    from sftkey.commands.terminal import stdout_console
    from sftkey.data.prepare import prepare
    from sftkey.data.preview import preview_rows, rendered_rows, rendered_statistics, statistics
    from sftkey.models.facts import published_stops
    from sftkey.models.loading import load_tokenizer

    prepared = prepare(checked, load_tokenizer(checked.model), need_test=False)
    rows = preview_rows(checked, prepared, num_rows)
    numbers = rendered_statistics(statistics(checked, prepared))
    if as_json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        Console(stderr=True).print(numbers)
    else:
        console = stdout_console()
        console.print(rendered_rows(rows))
        console.print(numbers)
    for remark in prepared.remarks:
        print(f"note: {remark}", file=sys.stderr)
    if not published_stops(checked.model)[1]:
        print(f"note: {not_verified(checked, prepared.renderer)}", file=sys.stderr)
