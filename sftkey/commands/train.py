"""Train and evaluate a recipe: `sftkey train`, and `python -m sftkey.train` for launchers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sftkey.recipe.load import load_recipe


def train(
    recipe: Path, overrides: Sequence[str] = (), fresh: bool = False, yes: bool = False
) -> None:
    """Check the recipe's form, set the process up, train, and print the table.

    The form comes first: a wrong recipe must be told before torch is imported, which takes seconds.

    Raises:
        SFTKeyError: What the user can mend; the command line prints it.
    """
    checked = load_recipe(recipe, overrides)
    from sftkey.commands.terminal import quiet_libraries, use_all_cores

    use_all_cores()
    quiet_libraries()
    from sftkey.commands.evaluate import print_table
    from sftkey.pipeline import train_recipe

    print_table(train_recipe(checked, fresh=fresh, yes=yes))
