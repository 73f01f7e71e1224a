"""The tasks of a study, its cells with their recipes and rows, and where all of it lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sftkey.data.labels import weights_by_segment
from sftkey.data.prepare import Prepared
from sftkey.data.response import Example, Segment
from sftkey.errors import DataError, RecipeError
from sftkey.files import value_hash
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import num_stage_epochs, num_stage_steps, trainer_setting
from sftkey.study.schema import Study, strategy_recipe, task_name

Picked = list[dict[str, float]]  # by stage
NUM_KEPT = 4  # sets of rows in memory: those of one seed on a few tasks


@dataclass(frozen=True)
class Task:
    """A recipe of a study.

    Its name is that of folders and records; its overrides are laid over the recipe after the
    study's.
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
    """Return the recipe of an arm's cell, or of its first `num_stages` stages alone.

    `chosen` is what was chosen for the arm's stages, in their order.
    """
    strategy = study.strategy(arm)
    strategy = replace(strategy, stages=strategy.stages[:num_stages])
    name = f"{study.name}-{task.name}-{run_name(arm, seed)}"
    overrides = [*study.overrides, *task.overrides, f"name={name}", f"seed={seed}"]
    try:
        return strategy_recipe(task.file, strategy, overrides, chosen)
    except RecipeError as error:
        raise RecipeError(f"{task}, arm {arm}", error.problems, error.hint) from None


@dataclass(frozen=True)
class Cell:
    """One arm on one task with one seed; `chosen` is by stage what validation rows decided."""

    task: str
    arm: str
    seed: int
    recipe: Recipe
    chosen: dict[str, dict[str, float]]

    @property
    def name(self) -> str:
        """Name the run's folder."""
        return run_name(self.arm, self.seed)

    @property
    def last(self) -> str:
        """Name the stage that is judged."""
        return self.recipe.stages[-1].name


@dataclass(frozen=True)
class StudyFolder:
    """Where a study's runs, choices and finished cells lie: below `runs/<study>`.

    A screening has a folder of its own in it, and the study's choices.
    """

    root: Path
    chosen: Path | None = None

    def screening(self) -> StudyFolder:
        """Return the folder of the study's screening."""
        return StudyFolder(self.root / "screen", self.root)

    def runs(self, task: str) -> Path:
        """Return the folder of a task's runs."""
        return self.root / task

    def run(self, cell: Cell) -> Path:
        """Return a cell's run folder."""
        return self.runs(cell.task) / cell.name

    def record(self, cell: Cell) -> Path:
        """Return the file that is there when a cell is finished."""
        return self.root / "cells" / cell.task / cell.arm / f"seed-{cell.seed}.json"

    def choices(self, task: str) -> Path:
        """Return the file of what was chosen on a task's validation rows."""
        return (self.chosen or self.root) / "choices" / f"{task}.json"


def rows_key(recipe: Recipe) -> str:
    """Return what two recipes share that make the same rows."""
    return value_hash(recipe.model_dump(mode="json", include={"seed", "model", "data", "response"}))


@dataclass(kw_only=True)
class StudyRows:
    """A study with the rows of its arms.

    `read` is the gate: it gives a recipe's rows, or refuses the recipe. A screening asks validation
    rows, but for those that one of the study's seeds, its `test_seeds`, takes for test questions.
    `note` says a line to the person.
    """

    study: Study
    tasks: tuple[Task, ...]
    folder: StudyFolder
    read: Callable[[Recipe], Prepared]
    note: Callable[[str], None]
    test_seeds: tuple[int, ...] = ()
    _rows: dict[str, Prepared] = field(default_factory=dict)
    _questions: dict[str, Sequence[Example]] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """Return the arms with few stages first, since later ones take these over."""
        return sorted(self.study.arms, key=lambda arm: len(self.study.strategy(arm).stages))

    def rows(self, recipe: Recipe) -> Prepared:
        """Return a recipe's rows; arms of one seed share them."""
        key = rows_key(recipe)
        if key not in self._rows:
            self._rows[key] = self._read(recipe)
            for old in list(self._rows)[:-NUM_KEPT]:
                del self._rows[old]
        return self._rows[key]

    def _read(self, recipe: Recipe) -> Prepared:
        prepared = self.read(recipe)
        if not self.test_seeds:
            return prepared
        tested = {
            repr(question.prompt)
            for seed in self.test_seeds
            for question in self._tested(recipe.model_copy(update={"seed": seed}))
        }
        rows = prepared.validation_examples
        asked = [example for example in rows if repr(example.prompt) not in tested]
        if not asked:
            what = "a screening asks validation rows that are test questions of no seed"
            got = f"got {len(rows)} validation rows, all of them such"
            raise DataError(recipe.name, f"{what}; {got}", "raise data.validation in the recipe")
        return replace(prepared, test=asked)

    def _tested(self, recipe: Recipe) -> Sequence[Example]:
        """Return the test questions of one of the study's seeds; arms share them."""
        key = rows_key(recipe)
        if key not in self._questions:
            self._questions[key] = self.read(recipe).questions(recipe)
        return self._questions[key]

    def matched(self, task: Task, arm: str, seed: int, num_rows: int | None = None) -> Picked:
        """Return by stage what the rows decide.

        That is the `max_steps` that train as many tokens as a key stage, or the `weight` of the
        key that makes it half of all.
        """
        strategy = self.study.strategy(arm)
        laid: Picked = [{} for _ in strategy.stages]
        balanced = [bool(stage.get("balanced")) for stage in strategy.stages]
        if not strategy.matched and not any(balanced):
            return laid
        recipe = arm_recipe(self.study, task, arm, seed)
        prepared = self.rows(recipe)
        for values, wanted in zip(laid, balanced, strict=True):
            if wanted:
                thinking, key = (trained_tokens(name, prepared) for name in ("thinking", "key"))
                values["weight"] = round(thinking / key, 6)
        if strategy.matched:
            trainer = recipe.stage_trainer(recipe.stages[-1])
            laid[-1] = {"max_steps": matched_steps(trainer, prepared, num_rows)}
        return laid


def matched_steps(trainer: dict[str, object], prepared: Prepared, num_rows: int | None) -> int:
    """Count the steps of full SFT that train as many tokens as a key stage with this trainer.

    `num_rows` of the prepared ones are trained on; None: all.
    """
    rows = num_rows or len(prepared.train)
    tokens = {name: trained_tokens(name, prepared) for name in ("key", "completion")}
    whole = num_stage_epochs(trainer, rows, 1) * rows * tokens["key"]
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    batch, accumulation = (trainer_setting(trainer, name) for name in names)
    steps = round(whole / (tokens["completion"] * batch * accumulation))
    return max(1, min(steps, num_stage_steps(trainer, rows, 1)))


def trained_tokens(group: str, prepared: Prepared) -> float:
    """Return the mean number of tokens a training row that a segment or group has."""
    weights, tokens = weights_by_segment({group: 1.0}), prepared.counts["tokens"]["train"]
    trained = sum(tokens[segment.name] for segment in Segment if weights[segment])
    return float(trained / len(prepared.train))
