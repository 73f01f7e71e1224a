"""Runs the cells of a study, seed by seed; a finished cell is a file, and is not run again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sftkey.data.labels import weights_by_segment
from sftkey.data.prepare import Prepared
from sftkey.data.response import Example, Segment
from sftkey.errors import DataError, RunError, RunLocked
from sftkey.evaluation.grading import grade
from sftkey.files import read_json, write_json, write_text
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import num_stage_epochs, num_stage_steps, trainer_setting
from sftkey.study.cells import (
    Cell,
    StudyFolder,
    cell_record,
    hashed,
    link,
    recipe_hash,
    remove_checkpoints,
    rows_key,
    take_over,
)
from sftkey.study.choose import Picked, StudyChoices
from sftkey.study.schema import Study
from sftkey.study.tasks import Task, arm_recipe
from sftkey.training.run import BASE, Run, start
from sftkey.training.run_folder import Ledger, open_run, refuse_changed

ReadRows = Callable[[Recipe], Prepared]
GradeStage = Callable[[Run, str], None]
OTHER_STUDY = (
    "another `name` begins another study; without its run's folder and its file in cells/ "
    "a cell is run anew"
)
CONFIRM = "confirm.json"
NUM_KEPT = 4  # sets of rows in memory: those of one seed on a few tasks


@dataclass
class StudyRun:
    """A study on its way.

    Args:
        study: What is asked.
        tasks: What the arms are trained on.
        folder: Where all of it lies.
        read: The gate: gives a recipe's rows, or refuses the recipe.
        grade: Grades a stage's answers in its run folder.
        note: Says a line to the person.
        command: The command that began the study, for the record.
        test_seeds: Of a screening, which asks validation rows: the study's seeds. Rows that one of
            these takes for its test questions aren't asked.
    """

    study: Study
    tasks: tuple[Task, ...]
    folder: StudyFolder
    read: ReadRows
    grade: GradeStage
    note: Callable[[str], None]
    command: str
    test_seeds: tuple[int, ...] = ()
    _rows: dict[str, Prepared] = field(default_factory=dict)
    _questions: dict[str, Sequence[Example]] = field(default_factory=dict)

    def cells(self, choose: bool = True) -> Iterator[Cell]:
        """Return all cells in the order in which they are run: one that others start from is first.

        Args:
            choose: Choose what is still to be chosen; otherwise it is as in the recipes.
        """
        choices = {task: self.choices(task) for task in self.tasks}
        for seed in self.study.seeds:
            for task in self.tasks:
                for arm in self.arms:
                    picked = choices[task].of(arm, choose)
                    yield self.cell(task, arm, seed, picked)

    @property
    def arms(self) -> list[str]:
        """Return the arms with few stages first, since later ones take these over."""
        return sorted(self.study.arms, key=lambda arm: len(self.study.strategy(arm).stages))

    def choices(self, task: Task) -> StudyChoices:
        """Return what was chosen for a task, and what chooses."""
        return StudyChoices(
            self.study, task, self.folder, self.arms, self.rows, self.matched, self.note
        )

    def cell(self, task: Task, arm: str, seed: int, picked: Picked) -> Cell:
        """Make one cell, with what a stage takes from the rows: steps, or a weight."""
        matched = self.matched(task, arm, seed)
        laid = [{**values, **more} for values, more in zip(picked, matched, strict=True)]
        recipe = arm_recipe(self.study, task, arm, seed, laid)
        names = [stage.name for stage in recipe.stages]
        chosen = {name: values for name, values in zip(names, picked, strict=True) if values}
        return Cell(task.name, arm, seed, recipe, chosen)

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

    def run(self) -> Iterator[Cell]:
        """Run what isn't finished; yield each cell when its file lies there.

        A cell whose run another process has is left to it.

        Raises:
            SFTKeyError: An arm is refused, or a finished cell is of another recipe.
        """
        self.refuse_early()
        cells = list(self.cells())
        for number, cell in enumerate(cells, start=1):
            if not self.finished(cell):
                self.note(f"cell {number} of {len(cells)}: {cell.task}, {cell.name}")
                try:
                    self.run_cell(cell)
                except RunLocked as error:
                    self.note(f"left to another process: {error.problems[0]}")
                    continue
            yield cell

    def refuse_early(self) -> None:
        """Let the gate see every arm before anything is trained."""
        for task in self.tasks:
            for arm in self.arms:
                recipe = arm_recipe(self.study, task, arm, self.study.seeds[0])
                cell = Cell(task.name, arm, self.study.seeds[0], recipe, {})
                if self.folder.record(cell).exists():
                    continue
                prepared = self._rows.setdefault(rows_key(recipe), self._read(recipe))
                if not prepared.questions(recipe):
                    what = "a study asks test questions; expected test rows, got none"
                    raise DataError(str(task), what, "write data.test into the recipe")

    def keep_confirmed(self) -> None:
        """Write down which arms the screening let through, before any test question is read.

        Raises:
            RunError: Others were written down before.
        """
        file = self.folder.root / CONFIRM
        wanted = {"control": self.study.control, "confirm": sorted(self.study.confirm)}
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, wanted)
        elif (kept := read_json(file)) != wanted:
            raise RunError(
                str(file),
                f"expected the arms that were confirmed before any answer was seen, {kept}; "
                f"got {wanted}",
                OTHER_STUDY,
            )

    def finished(self, cell: Cell) -> bool:
        """Tell whether a cell is done; one of another recipe is refused.

        Raises:
            RunError: Names the changed keys, where the cell's run is still there.
        """
        file, folder = self.folder.record(cell), self.folder.run(cell)
        if not file.exists():
            return False
        if (folder / "recipe.yaml").exists():
            self._refuse_changed(cell)
        elif read_json(file)["recipe_sha256"] != recipe_hash(cell.recipe):
            raise RunError(str(file), "this cell is of another recipe", OTHER_STUDY)
        remove_checkpoints(folder)  # a kill may have come before
        return True

    def run_cell(self, cell: Cell) -> None:
        """Train what no other cell has trained, let the last stage answer, and write the record."""
        since = time.monotonic()
        folder = self.folder.run(cell)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._refuse_changed(cell)
        open_run(cell.recipe, folder)
        take_over(Ledger(folder, cell.recipe), self.rows(cell.recipe))
        run = start(cell.recipe, folder, read=self.rows, grade=grade, measures_gradients=True)
        run.answers.asked = {BASE, cell.last}
        base, own = self._base(run, cell), run.ledger.generations(BASE)
        if base.exists() and not own.exists():
            link(base, own)
        with run.progress:
            for stage in run.stages():
                if stage == BASE and not base.exists():
                    link(own, base)
                if run.ledger.generations(stage).exists():
                    self.grade(run, stage)
        file = self.folder.record(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        record = cell_record(run, cell, self.command, time.monotonic() - since)
        write_text(file, json.dumps(record) + "\n")
        remove_checkpoints(folder)

    def _refuse_changed(self, cell: Cell) -> None:
        """Refuse a cell that another recipe began, with the changed keys."""
        folder = self.folder.run(cell)
        try:
            if (folder / "recipe.yaml").exists():
                refuse_changed(folder, cell.recipe)
        except RunError as error:
            raise RunError(error.where, error.problems, OTHER_STUDY) from None

    def _base(self, run: Run, cell: Cell) -> Path:
        """Return the file of the base model's answers to these very questions."""
        settings = run.recipe.eval.model_dump(include={"max_new_tokens", "temperature"})
        asked = {
            "prompts": [
                [example.key, run.prepared.renderer.prompt_ids(example.prompt)]
                for example in run.answers.questions
            ],
            "settings": {**settings, "seed": run.recipe.seed if settings["temperature"] else 0},
            "model": run.recipe.model.model_dump(mode="json"),
        }
        return self.folder.runs(cell.task) / f"base-{hashed(asked)[:12]}.jsonl"


def matched_steps(trainer: dict[str, object], prepared: Prepared, num_rows: int | None) -> int:
    """Count the steps of full SFT that train as many tokens as a key stage with this trainer.

    Args:
        trainer: The settings of the key stage's trainer.
        prepared: The rows.
        num_rows: How many of them are trained on; None: all.
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
