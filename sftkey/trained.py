"""Which of a run's stages a command is about."""

from __future__ import annotations

from pathlib import Path

from sftkey.errors import RunError
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe

BASE = "base"


def run_recipe(folder: Path) -> Recipe:
    """Read the recipe of a run.

    Raises:
        RunError: The folder is no run.
    """
    if not (folder / "recipe.yaml").is_file():
        raise RunError(
            str(folder), "expected a run folder; it holds no recipe.yaml", "runs lie in runs/<name>"
        )
    return load_recipe(folder / "recipe.yaml")


def trained_stage(folder: Path, recipe: Recipe, name: str | None) -> int:
    """Give the place of a trained stage, the first being 1; 0 is the base model.

    Args:
        folder: The run's.
        recipe: The run's.
        name: A stage's, or `base`; None: the last stage that is trained.

    Raises:
        RunError: There is no such stage, or it isn't trained.
    """
    from sftkey.training.ledger import Ledger

    names = [BASE, *(stage.name for stage in recipe.stages)]
    if name is not None and name not in names:
        raise RunError(str(folder), f"--stage: expected one of {', '.join(names)}; got {name!r}")
    records = Ledger(folder, recipe, main=False).stages
    trained = [BASE, *(record.name for record in records if record.status == "trained")]
    if name is None and trained == [BASE]:
        raise RunError(
            str(folder),
            "expected a trained stage; there is none yet",
            f"train it: sftkey train {folder / 'recipe.yaml'}; or take --stage base",
        )
    if name is not None and name not in trained:
        raise RunError(
            str(folder),
            f"--stage: {name!r} isn't trained yet",
            f"go on with: sftkey train {folder / 'recipe.yaml'}",
        )
    return names.index(name or trained[-1])
