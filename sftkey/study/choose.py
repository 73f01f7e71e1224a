"""Chooses each stage's learning rate, weight or kl on validation rows; no test row is read."""

import gc
import math
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from sftkey.data.labels import weights_by_segment
from sftkey.data.prepare import Prepared
from sftkey.data.response import Segment
from sftkey.errors import DataError, DivergedError, RunError, RunLocked
from sftkey.evaluation.answers import grade_texts, read_generations
from sftkey.evaluation.grading import grade
from sftkey.files import read_json, value_hash, write_json
from sftkey.recipe.schema import Recipe
from sftkey.study.cells import remove_checkpoints, take_over
from sftkey.study.schema import Choice, has_weight
from sftkey.study.tasks import Picked, StudyRows, Task, arm_recipe
from sftkey.training.run import Run, start
from sftkey.training.run_folder import open_run
from sftkey.training.run_lock import lock_run

ChoiceFigures = dict[str, float | None]  # of a value that was tried
Grid = dict[str, tuple[float, ...]]
WAIT_SECONDS = 10  # before a run that another process has is tried again


@dataclass(frozen=True)
class StudyChoices:
    """What is chosen for one task of a study, if the study has something to choose.

    A stage is chosen once for all arms that come to it in the same way, given what was chosen for
    the stages before it; so arms that share a first stage go on sharing it. So do processes that
    share the study's folder: what one of them has written down counts for all.
    """

    run: StudyRows
    task: Task

    def of(self, arm: str, choose: bool = True) -> Picked:
        """Return what is chosen for an arm's stages.

        What isn't chosen yet is trained for; without `choose` it is left open.
        """
        choice, num_stages = self.run.study.choose, len(self.run.study.strategy(arm).stages)
        if choice is None:
            return [{} for _ in range(num_stages)]
        picked: Picked = []
        for number in range(num_stages):
            key = self._key(arm, number)
            stages = self._record(choice)["stages"]
            if key not in stages:
                if not choose:
                    break
                found = self._choose(choice, arm, number, picked)
                stages = self._keep(choice, key, found)
            picked.append(stages[key]["chosen"])
        return picked + [{} for _ in range(len(picked), num_stages)]

    def num_left(self) -> int:
        """Count the runs that are still to be trained, where no grid is widened."""
        choice = self.run.study.choose
        if choice is None:
            return 0
        stages, grids = self._record(choice)["stages"], self._grids(choice)
        left = [grid for key, grid in grids.items() if grid and key not in stages]
        return sum(math.prod(map(len, grid.values())) for grid in left)

    @property
    def _file(self) -> Path:
        return self.run.folder.choices(self.task.name)

    @property
    def _runs(self) -> Path:
        return self._file.with_suffix("")

    def _keep(self, choice: Choice, key: str, found: dict[str, Any]) -> dict[str, Any]:
        """Write down what was found, and return all choices; one that is there already counts."""
        record = self._record(choice)  # of now: others have written into it in the meantime
        if key not in record["stages"]:
            record["stages"][key] = found
            write_json(self._file, record)
        stages: dict[str, Any] = record["stages"]
        if self._grids(choice).keys() <= stages.keys():
            for folder in self._runs.glob("*"):
                with suppress(RunLocked):  # others choose for other arms
                    lock = lock_run(folder)
                    shutil.rmtree(folder, ignore_errors=True)
                    lock.release(force=True)
            with suppress(OSError):  # it isn't empty, or isn't there
                self._runs.rmdir()
        return stages

    def _key(self, arm: str, number: int) -> str:
        """Return what two arms share that come to a stage in the same way."""
        strategy = self.run.study.strategy(arm)
        last = number == len(strategy.stages) - 1
        way = [list(map(dict, strategy.stages[: number + 1])), dict(strategy.response or {})]
        rest = [
            list(strategy.overrides),
            strategy.matched and last,
            has_weight(strategy.stages[number]),
        ]
        return value_hash([way, rest])[:16]

    def _grids(self, choice: Choice) -> dict[str, Grid]:
        """Return the grid of each stage of all arms, by its key."""
        return {
            self._key(arm, number): self._grid(choice, arm, number)
            for arm in self.run.arms
            for number in range(len(self.run.study.strategy(arm).stages))
        }

    def _grid(self, choice: Choice, arm: str, number: int) -> Grid:
        """Return the values of what is chosen for a stage of an arm."""
        stage = self.run.study.strategy(arm).stages[number]
        weight = choice.weight if has_weight(stage) else ()
        kl = choice.kl if stage.get("kl") else ()
        grid = {"learning_rate": choice.learning_rate, "weight": weight, "kl": kl}
        return {name: values for name, values in grid.items() if values}

    def _record(self, choice: Choice) -> dict[str, Any]:
        asked = choice.model_dump(mode="json", exclude={"max_rounds"})
        if not self._file.exists():
            return {"choose": asked, "stages": {}}
        record = read_json(self._file)
        if record["choose"] != asked:
            raise RunError(
                str(self._file),
                f"expected the values that were chosen from, {record['choose']}; got {asked}",
                "another `name` begins another study; without this file it is chosen again",
            )
        return record

    def _choose(self, choice: Choice, arm: str, number: int, before: Picked) -> dict[str, Any]:
        """Try all values of one stage; where another process has chosen for it, return that."""
        grid, key = self._grid(choice, arm, number), self._key(arm, number)
        tried: list[ChoiceFigures] = []
        values: dict[str, list[float]] = {name: [] for name in grid}
        names = [str(stage["name"]) for stage in self.run.study.strategy(arm).stages[: number + 1]]
        where = f"{self.task.name}, {arm}, {' > '.join(names)}"
        points = [dict(zip(grid, each, strict=True)) for each in product(*grid.values())]
        for rounds_left in range(choice.max_rounds, -1, -1):
            for point in points:
                figures: ChoiceFigures | None = {"loss": None}
                if point:
                    figures = self._try_in_turn(choice, arm, [*before, point], where)
                if figures is None:
                    found: dict[str, Any] = self._record(choice)["stages"][key]
                    return found
                tried.append({**point, **figures})
                for name, value in point.items():
                    values[name].append(value)
            chosen = self._best(tried, grid, f"arm {arm}, {names[-1]}")
            points = widened(values, chosen)
            if not points or not rounds_left:
                break
            self.run.note(f"{where}: at an edge; tried too: {'; '.join(map(_shown, points))}")
        edge = [name for name in grid if chosen[name] in (min(values[name]), max(values[name]))]
        note = f"{where}: {_shown(chosen) or 'nothing'} chosen"
        self.run.note(note + (f" (at the grid's edge: {', '.join(edge)})" if edge else ""))
        return {"stages": names, "tried": tried, "chosen": chosen, "at_edge": edge}

    def _best(
        self, tried: Sequence[ChoiceFigures], names: Collection[str], what: str
    ) -> dict[str, float]:
        """Return the values that did best, of those whose loss is a number."""
        finite = [each for each in tried if each["loss"] is not None]
        if not finite and names:
            raise RunError(f"{self.task}, {what}", "the loss diverged with every value")
        # The most right answers first; what is chosen by a loss has none.
        finite.sort(key=lambda each: (-(each.get("acc") or 0.0), each["loss"] or 0.0))
        best = finite[0] if finite else tried[0]
        return {name: value for name in names if (value := best[name]) is not None}

    def _try_in_turn(
        self, choice: Choice, arm: str, picked: Picked, where: str
    ) -> ChoiceFigures | None:
        """Try values when no other process does; None where one has chosen for the stage."""
        key, waiting = self._key(arm, len(picked) - 1), False
        while key not in self._record(choice)["stages"]:
            try:
                return self._try(choice, arm, picked)
            except RunLocked as error:
                if not waiting:
                    self.run.note(f"{where}: waiting for another process: {error.problems[0]}")
                waiting = True
            gc.collect()  # and the locks of dropped runs, which the other may wait for
            time.sleep(WAIT_SECONDS)
        return None

    def _try(self, choice: Choice, arm: str, picked: Picked) -> ChoiceFigures:
        """Train up to the stage that is chosen for; its loss is None where it diverges."""
        num_stages, by_answers = len(picked), choice.by == "accuracy"
        matched = self.run.matched(self.task, arm, choice.seed, choice.num_rows)
        laid = [{**values, **more} for values, more in zip(picked, matched, strict=False)]
        recipe = arm_recipe(self.run.study, self.task, arm, choice.seed, laid, num_stages)
        folder = self._runs / value_hash([self._key(arm, num_stages - 1), picked])[:16]
        ledger, rows = open_run(recipe, folder), partial(self._few_rows, choice)
        take_over(ledger, rows(recipe))
        run = start(recipe, folder, read=rows, grade=grade)
        run.answers.asked = {recipe.stages[-1].name} if by_answers else ()
        try:
            with run.progress:
                list(run.stages())
        except DivergedError:
            return {"loss": None}
        remove_checkpoints(folder)
        losses = run.ledger.stages[-1].validation["end"]
        loss = validation_loss(losses, run.prepared, "key" if by_answers else choice.by)
        acc: ChoiceFigures = {"acc": accuracy(run)} if by_answers else {}
        return {**acc, "loss": loss if math.isfinite(loss) else None}

    def _few_rows(self, choice: Choice, recipe: Recipe) -> Prepared:
        """Return the first training rows, and the validation rows where test rows are asked."""
        prepared = self.run.rows(recipe)
        if prepared.validation is None:
            what = "choose: expected validation rows to choose on; got none"
            raise DataError(str(self.task), what, "write data.validation into the recipe")
        few = range(min(choice.num_rows, len(prepared.train)))
        train, examples = prepared.train.select(few), prepared.train_examples[: len(few)]
        return replace(
            prepared, train=train, train_examples=examples, test=prepared.validation_examples
        )


def _shown(point: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in point.items() if value)


def widened(
    tried: Mapping[str, Sequence[float]], chosen: Mapping[str, float]
) -> list[dict[str, float]]:
    """Return what to try where the chosen values lie at the ends of those that were tried.

    The step beyond an end is the one before it, as a ratio; the other values stay as chosen.

    >>> widened({"learning_rate": [1.0, 4.0, 8.0]}, {"learning_rate": 8.0})
    [{'learning_rate': 16.0}]
    """
    points = []
    for name, values in tried.items():
        values = sorted(set(values))
        end, next_to_it = values[-1], values[-2:][0]
        if chosen[name] == values[0]:
            end, next_to_it = values[0], values[:2][-1]
        if len(values) > 1 and chosen[name] == end:
            beyond = float(f"{end * end / next_to_it:.3g}")
            points.append({**chosen, name: beyond})
    return points


def accuracy(run: Run) -> float:
    """Return Acc, by the rule, of what the last stage answered."""
    questions, stage = run.answers.questions, run.recipe.stages[-1].name
    keys = [example.key for example in questions]
    written = read_generations(run.ledger.generations(stage), keys)
    texts = grade_texts(run.recipe, run.prepared.renderer, written, questions)
    return sum(each.grade.right for each in texts) / len(texts)


def validation_loss(losses: dict[str, float], prepared: Prepared, by: str) -> float:
    """Return the mean loss a token over the segments of `by`, from the means of all segments."""
    weights, tokens = weights_by_segment(by), prepared.counts["tokens"]["validation"]
    counted = {
        segment.name.lower(): tokens[segment.name]
        for segment in Segment
        if weights[segment] and tokens[segment.name]
    }
    return sum(losses[name] * count for name, count in counted.items()) / sum(counted.values())
