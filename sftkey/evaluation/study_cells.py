"""The cells of a study, where they lie, and what one takes over from another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe
from sftkey.training.run_folder import Ledger

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Cell:
    """One arm on one task with one seed.

    Args:
        task: The stem of the recipe's file.
        arm: The strategy's name.
        seed: The run's.
        recipe: What the cell trains.
        chosen: By stage what was chosen on validation rows; empty where nothing was.
    """

    task: str
    arm: str
    seed: int
    recipe: Recipe
    chosen: dict[str, dict[str, float]]

    @property
    def name(self) -> str:
        """Name the run's folder."""
        return f"{self.arm}-seed{self.seed}"

    @property
    def last(self) -> str:
        """Name the stage that is judged."""
        return self.recipe.stages[-1].name


@dataclass(frozen=True)
class StudyFolder:
    """Where a study's runs, choices and finished cells lie: below `runs/<study>`."""

    root: Path

    def runs(self, task: str) -> Path:
        """Give the folder of a task's runs."""
        return self.root / task

    def run(self, cell: Cell) -> Path:
        """Give a cell's run folder."""
        return self.runs(cell.task) / cell.name

    def record(self, cell: Cell) -> Path:
        """Give the file that is there when a cell is finished."""
        return self.root / "cells" / cell.task / cell.arm / f"seed-{cell.seed}.json"

    def choices(self, task: str) -> Path:
        """Give the file of what was chosen on a task's validation rows."""
        return self.root / "choices" / f"{task}.json"


def hashed(value: Any) -> str:
    """Hash plain data."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def rows_key(recipe: Recipe) -> str:
    """Give what two recipes share that make the same rows."""
    sections = recipe.model_dump(mode="json", include={"seed", "model", "data", "response"})
    return hashed(sections)


def prefix_key(recipe: Recipe, num_stages: int) -> str:
    """Give what two recipes share whose first stages end in the same weights.

    That is all but the name, the evaluation and the later stages.
    """
    shared = recipe.model_dump(mode="json", include={"seed", "model", "lora", "data", "response"})
    stages = [
        {**stage.model_dump(mode="json"), "trainer": recipe.stage_trainer(stage)}
        for stage in recipe.stages[:num_stages]
    ]
    return hashed({**shared, "stages": stages})


def take_over(ledger: Ledger) -> None:
    """Take over the stages that a run beside this one has trained already, with their answers.

    The files are linked, not copied, where the file system can; nobody writes into them again.
    """
    for number, record in enumerate(ledger.stages):
        if record.status != "open":
            continue
        giver = _giver(ledger, number)
        if giver is None:
            return
        theirs = giver.stages[number]
        _link_folder(giver.stage_folder(number), ledger.stage_folder(number))
        answers, own = giver.generations(theirs.name), ledger.generations(record.name)
        if answers.exists() and not own.exists() and giver.recipe.eval == ledger.recipe.eval:
            link(answers, own)
        by = theirs.shared_from or giver.folder.name
        ledger.stages[number] = replace(theirs, name=record.name, shared_from=by)
        ledger.save()


def _giver(ledger: Ledger, number: int) -> Ledger | None:
    """Find a run beside this one whose stage at `number` came about as this one's would.

    One that has answered the questions after it comes first.
    """
    wanted = prefix_key(ledger.recipe, number + 1)
    found = [
        other
        for other in _others(ledger.folder)
        if len(other.stages) > number
        and other.stages[number].status == "trained"
        and prefix_key(other.recipe, number + 1) == wanted
    ]
    found.sort(key=lambda other: not other.generations(other.stages[number].name).exists())
    return found[0] if found else None


def _others(folder: Path) -> Iterator[Ledger]:
    for file in sorted(folder.parent.glob("*/ledger.json")):
        if file.parent != folder:
            recipe = _recipe((file.parent / "recipe.yaml").resolve())
            yield Ledger(file.parent, recipe, main=False)


@lru_cache(maxsize=256)
def _recipe(file: Path) -> Recipe:
    return load_recipe(file)


def _link_folder(source: Path, folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    for left in (temporary, folder):  # by a kill; the ledger doesn't know of them
        shutil.rmtree(left, ignore_errors=True)
    ignore = shutil.ignore_patterns(CHECKPOINTS, ".*")
    shutil.copytree(source, temporary, copy_function=link, ignore=ignore)
    temporary.rename(folder)


def link(source: str | Path, target: str | Path) -> None:
    """Link a file that nobody will change; copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        temporary = Path(f"{target}.tmp")
        shutil.copyfile(source, temporary)
        temporary.replace(target)


def remove_checkpoints(folder: Path) -> None:
    """Free what only an unfinished stage needs."""
    for checkpoints in folder.glob(f"stages/*/{CHECKPOINTS}"):
        shutil.rmtree(checkpoints)
