"""Chooses each stage's learning rate, weight or kl on validation rows; no test row is read."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from sftkey.data.labels import weights_by_segment
from sftkey.data.prepare import Prepared
from sftkey.data.response import Segment
from sftkey.errors import DataError, DivergedError, RunError
from sftkey.evaluation.answers import grade_texts, read_generations
from sftkey.evaluation.grading import grade
from sftkey.files import read_json, write_json
from sftkey.recipe.schema import Recipe
from sftkey.study.cells import StudyFolder, hashed, remove_checkpoints, take_over
from sftkey.study.schema import Choice, Study, has_weight
from sftkey.study.tasks import Task, arm_recipe
from sftkey.training.run import Run, start
from sftkey.training.run_folder import Ledger, open_run

Picked = list[dict[str, float]]  # by stage
ChoiceFigures = dict[str, float | None]  # of a value that was tried


@dataclass
class StudyChoices:
    """What is chosen for one task.

    A stage is chosen once for all arms that come to it in the same way, given what was chosen for
    the stages before it; so arms that share a first stage go on sharing it.

    Args:
        study: With or without something to choose.
        task: Its recipe.
        folder: Keeps the choices.
        arms: In the order in which they are chosen for.
        rows: Gives a recipe's rows.
        matched: Gives an arm's settings that depend on the number of rows.
        note: Says a line to the person.
    """

    study: Study
    task: Task
    folder: StudyFolder
    arms: Sequence[str]
    rows: Callable[[Recipe], Prepared]
    matched: Callable[[Task, str, int, int | None], Picked]
    note: Callable[[str], None]

    def of(self, arm: str, choose: bool = True) -> Picked:
        """Return what is chosen for an arm's stages.

        Args:
            arm: One of the study's.
            choose: Train what this takes; otherwise what isn't chosen yet is left open.
        """
        num_stages = len(self.study.strategy(arm).stages)
        if self.study.choose is None:
            return [{} for _ in range(num_stages)]
        record = self._record(self.study.choose)
        picked: Picked = []
        for number in range(num_stages):
            key = self._key(arm, number)
            if key not in record["stages"]:
                if not choose:
                    return picked + [{} for _ in range(number, num_stages)]
                record["stages"][key] = self._choose(self.study.choose, arm, number, picked)
                path = self.folder.choices(self.task.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, record)
                if all(key in record["stages"] for key in self._keys()):
                    shutil.rmtree(self._runs, ignore_errors=True)
            picked.append(record["stages"][key]["chosen"])
        return picked

    def num_left(self) -> int:
        """Count the runs that are still to be trained, where no grid is widened."""
        choice = self.study.choose
        if choice is None:
            return 0
        stages = self._record(choice)["stages"]
        sizes = {
            self._key(arm, number): math.prod(map(len, grid.values()))
            for arm in self.arms
            for number in range(len(self.study.strategy(arm).stages))
            if (grid := self._grid(choice, arm, number))
        }
        return sum(size for key, size in sizes.items() if key not in stages)

    @property
    def _runs(self) -> Path:
        return self.folder.choices(self.task.name).with_suffix("")

    def _keys(self) -> list[str]:
        strategies = {arm: self.study.strategy(arm) for arm in self.arms}
        return [self._key(arm, n) for arm in self.arms for n in range(len(strategies[arm].stages))]

    def _key(self, arm: str, number: int) -> str:
        """Return what two arms share that come to a stage in the same way."""
        strategy = self.study.strategy(arm)
        last = number == len(strategy.stages) - 1
        way = [list(map(dict, strategy.stages[: number + 1])), dict(strategy.response or {})]
        rest = [
            list(strategy.overrides),
            strategy.matched and last,
            has_weight(strategy.stages[number]),
        ]
        return hashed([way, rest])[:16]

    def _grid(self, choice: Choice, arm: str, number: int) -> dict[str, tuple[float, ...]]:
        """Return the values of what is chosen for a stage of an arm."""
        stage = self.study.strategy(arm).stages[number]
        weight = choice.weight if has_weight(stage) else ()
        kl = choice.kl if stage.get("kl") else ()
        grid = {"learning_rate": choice.learning_rate, "weight": weight, "kl": kl}
        return {name: values for name, values in grid.items() if values}

    def _record(self, choice: Choice) -> dict[str, Any]:
        asked = choice.model_dump(mode="json", exclude={"max_rounds"})
        path = self.folder.choices(self.task.name)
        if not path.exists():
            return {"choose": asked, "stages": {}}
        record = read_json(path)
        if record["choose"] != asked:
            raise RunError(
                str(path),
                f"expected the values that were chosen from, {record['choose']}; got {asked}",
                "another `name` begins another study; without this file it is chosen again",
            )
        return record

    def _choose(self, choice: Choice, arm: str, number: int, before: Picked) -> dict[str, Any]:
        """Try all values of one stage."""
        grid = self._grid(choice, arm, number)
        tried: list[ChoiceFigures] = []
        values: dict[str, list[float]] = {name: [] for name in grid}
        names = [str(stage["name"]) for stage in self.study.strategy(arm).stages[: number + 1]]
        where = f"{self.task.name}, {arm}, {' > '.join(names)}"
        points = [dict(zip(grid, each, strict=True)) for each in product(*grid.values())]
        for rounds_left in range(choice.max_rounds, -1, -1):
            for point in points:
                figures = self._try(choice, arm, [*before, point]) if point else {"loss": None}
                tried.append({**point, **figures})
                for name, value in point.items():
                    values[name].append(value)
            chosen = self._best(tried, grid, f"arm {arm}, {names[-1]}")
            points = widened(values, chosen)
            if not points or not rounds_left:
                break
            self.note(f"{where}: at an edge; tried too: {'; '.join(map(_shown, points))}")
        edge = [name for name in grid if chosen[name] in (min(values[name]), max(values[name]))]
        note = f"{where}: {_shown(chosen) or 'nothing'} chosen"
        self.note(note + (f" (at the grid's edge: {', '.join(edge)})" if edge else ""))
        return {"stages": names, "tried": tried, "chosen": chosen, "at_edge": edge}

    def _best(
        self, tried: Sequence[ChoiceFigures], names: Collection[str], what: str
    ) -> dict[str, float]:
        """Return the values that did best, of those whose loss is a number."""
        finite = [each for each in tried if each["loss"] is not None]
        if not finite and names:
            raise RunError(f"{self.task}, {what}", "the loss diverged with every value")
        best = min(finite, key=_rank) if finite else tried[0]
        return {name: value for name in names if (value := best[name]) is not None}

    def _try(self, choice: Choice, arm: str, picked: Picked) -> ChoiceFigures:
        """Train up to the stage that is chosen for; its loss is None where it diverges."""
        num_stages, by_answers = len(picked), choice.by == "accuracy"
        matched = self.matched(self.task, arm, choice.seed, choice.num_rows)
        laid = [{**values, **more} for values, more in zip(picked, matched, strict=False)]
        recipe = arm_recipe(self.study, self.task, arm, choice.seed, laid, num_stages)
        folder = self._runs / hashed([self._key(arm, num_stages - 1), picked])[:16]
        folder.parent.mkdir(parents=True, exist_ok=True)
        open_run(recipe, folder)
        rows = partial(self._few_rows, choice)
        take_over(Ledger(folder, recipe), rows(recipe))
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
        prepared = self.rows(recipe)
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


def _rank(tried: ChoiceFigures) -> tuple[float, float]:
    """Sort the best first; what was chosen by a loss has no Acc."""
    loss = tried["loss"]
    assert loss is not None
    return -(tried.get("acc") or 0.0), loss


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
        segment.name.lower(): tokens[segment.name] for segment in Segment if weights[segment]
    }
    counted = {name: count for name, count in counted.items() if count}
    return sum(losses[name] * count for name, count in counted.items()) / sum(counted.values())
