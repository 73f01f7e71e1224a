"""The tasks of a study, and the recipe of each arm on each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sftkey.errors import RecipeError
from sftkey.recipe.schema import Recipe
from sftkey.study.schema import Study, strategy_recipe, task_name


@dataclass(frozen=True)
class Task:
    """A recipe of a study.

    Args:
        name: Of its folders and records.
        file: The recipe's.
        overrides: Laid over the recipe after the study's.
    """

    name: str
    file: Path
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.file}" if self.name == self.file.stem else f"{self.file}, task {self.name}"


def tasks_of(study: Study, folder: Path) -> tuple[Task, ...]:
    """Return the tasks of a study whose file lies in the folder."""
    return tuple(
        Task(task_name(each.recipe, each.name), folder / each.recipe, each.overrides)
        for each in study.recipes
    )


def run_name(arm: str, seed: int) -> str:
    """Name the folder of a cell's run."""
    return f"{arm}-seed{seed}"


def arm_recipe(
    study: Study,
    task: Task,
    arm: str,
    seed: int,
    chosen: Sequence[Mapping[str, float]] = (),
    num_stages: int | None = None,
) -> Recipe:
    """Return the recipe of an arm's cell.

    Args:
        study: The study.
        task: One of its tasks.
        arm: One of the study's.
        seed: One of the study's.
        chosen: What was chosen for the arm's stages, in their order.
        num_stages: Take the first ones alone.

    Raises:
        RecipeError: The recipe is wrong, or can't do what the arm wants.
    """
    strategy = study.strategy(arm)
    strategy = replace(strategy, stages=strategy.stages[:num_stages])
    name = f"{study.name}-{task.name}-{run_name(arm, seed)}"
    overrides = [*study.overrides, *task.overrides, f"name={name}", f"seed={seed}"]
    try:
        return strategy_recipe(task.file, strategy, overrides, chosen)
    except RecipeError as error:
        raise RecipeError(f"{task}, arm {arm}", error.problems, error.hint) from None
