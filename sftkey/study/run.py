"""Runs the cells of a study, seed by seed; a finished cell is a file, and is not run again."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sftkey.errors import DataError, RunError, RunLocked
from sftkey.evaluation.grading import grade
from sftkey.files import read_json, value_hash, write_json, write_text
from sftkey.recipe.stages import BASE
from sftkey.study.cells import cell_record, link, recipe_hash, remove_checkpoints, take_over
from sftkey.study.choose import StudyChoices
from sftkey.study.tasks import Cell, Picked, StudyRows, Task, arm_recipe, rows_key
from sftkey.training.run import Run, start
from sftkey.training.run_folder import RECIPE, open_run, refuse_changed

OTHER_STUDY = (
    "another `name` begins another study; without its run's folder and its file in cells/ "
    "a cell is run anew"
)
CONFIRM = "confirm.json"


@dataclass(kw_only=True)
class StudyRun(StudyRows):
    """A study on its way; the other arguments are those of `StudyRows`."""

    grade: Callable[[Run, str], None]  # grades a stage's answers in its run folder
    command: str  # the command that began the study, for the record

    def cells(self, choose: bool = True) -> Iterator[Cell]:
        """Return all cells in the order in which they are run: one that others start from is first.

        What isn't chosen yet is chosen first; without `choose` it is as in the recipes.
        """
        choices = {task: self.choices(task) for task in self.tasks}
        for seed in self.study.seeds:
            for task in self.tasks:
                for arm in self.arms:
                    picked = choices[task].of(arm, choose)
                    yield self.cell(task, arm, seed, picked)

    def choices(self, task: Task) -> StudyChoices:
        """Return what was chosen for a task, and what chooses."""
        return StudyChoices(self, task)

    def cell(self, task: Task, arm: str, seed: int, picked: Picked) -> Cell:
        """Make one cell, with what a stage takes from the rows: steps, or a weight."""
        matched = self.matched(task, arm, seed)
        laid = [{**values, **more} for values, more in zip(picked, matched, strict=True)]
        recipe = arm_recipe(self.study, task, arm, seed, laid)
        names = [stage.name for stage in recipe.stages]
        chosen = {name: values for name, values in zip(names, picked, strict=True) if values}
        return Cell(task.name, arm, seed, recipe, chosen)

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
        """Write down which arms the screening let through, before any test question is read."""
        file = self.folder.root / CONFIRM
        wanted = {"control": self.study.control, "confirm": sorted(self.study.confirm)}
        if not file.exists():
            write_json(file, wanted)
        elif (kept := read_json(file)) != wanted:
            raise RunError(
                str(file),
                f"expected the arms that were confirmed before any answer was seen, {kept}; "
                f"got {wanted}",
                OTHER_STUDY,
            )

    def finished(self, cell: Cell) -> bool:
        """Tell whether a cell is done; one of another recipe is refused."""
        file, folder = self.folder.record(cell), self.folder.run(cell)
        if not file.exists():
            return False
        if (folder / RECIPE).exists():
            self._refuse_changed(cell)
        elif read_json(file)["recipe_sha256"] != recipe_hash(cell.recipe):
            raise RunError(str(file), "this cell is of another recipe", OTHER_STUDY)
        remove_checkpoints(folder)  # a kill may have come before
        return True

    def run_cell(self, cell: Cell) -> None:
        """Train what no other cell has trained, let the last stage answer, and write the record."""
        since = time.monotonic()
        folder = self.folder.run(cell)
        self._refuse_changed(cell)
        ledger = open_run(cell.recipe, folder)
        take_over(ledger, self.rows(cell.recipe))
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
        record = cell_record(run, cell, self.command, time.monotonic() - since)
        write_text(self.folder.record(cell), json.dumps(record) + "\n")
        remove_checkpoints(folder)

    def _refuse_changed(self, cell: Cell) -> None:
        """Refuse a cell that another recipe began, with the changed keys."""
        folder = self.folder.run(cell)
        try:
            if (folder / RECIPE).exists():
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
        return self.folder.runs(cell.task) / f"base-{value_hash(asked)[:12]}.jsonl"
