"""A run's folder: the recipe, the ledger of its stages, and where each file lies."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sftkey.errors import Problem, RunError
from sftkey.files import free_name, write_json, write_text
from sftkey.recipe.load import changed_keys, load_recipe
from sftkey.recipe.schema import Recipe


@dataclass
class StageRecord:
    """What the ledger knows of one stage.

    `validation` holds, under `start` and `end`, the loss of every segment in nats a token.
    `gradient_norm`, in studies, is by segment that of its loss's gradient when the stage began.
    `grid` says what a grid tried and kept.
    `shared_from` names the run beside this one that trained the stage, where it was another.
    """

    name: str
    status: str = "open"  # open | trained (its adapter is whole)
    num_steps: int = 0
    seconds: float = 0.0
    validation: dict[str, dict[str, float]] = field(default_factory=dict)
    gradient_norm: dict[str, float] | None = None
    shared_from: str | None = None
    grid: dict[str, Any] | None = None


class Ledger:
    """`ledger.json` of a run folder.

    Args:
        folder: The run folder.
        recipe: The run's recipe.
        main: Whether this process writes; the others only read along.
    """

    def __init__(self, folder: Path, recipe: Recipe, main: bool = True) -> None:
        self.folder, self.recipe, self.main = folder, recipe, main
        self.facts: dict[str, Any] = {}
        self.stages = [StageRecord(stage.name) for stage in recipe.stages]
        if self.path.exists():
            content = json.loads(self.path.read_text())
            self.facts = content["facts"]
            self.stages = [StageRecord(**record) for record in content["stages"]]

    @property
    def path(self) -> Path:
        """Where the ledger lies."""
        return self.folder / "ledger.json"

    def stage_folder(self, number: int) -> Path:
        """Return the folder of the stage at `number` from 0: `stages/1-completion`, say."""
        return self.folder / "stages" / f"{number + 1}-{self.stages[number].name}"

    def adapter(self, number: int) -> Path:
        """Return the folder of what a stage has trained: its adapter, or its whole model."""
        return self.stage_folder(number) / "adapter"

    def generations(self, name: str) -> Path:
        """Return the file of a stage's answers, or of the base model's; it is there when whole."""
        return self.folder / "evaluation" / f"{name}.jsonl"

    def save(self) -> None:
        """Write the ledger."""
        if self.main:
            stages = [record.__dict__ for record in self.stages]
            write_json(self.path, {"facts": self.facts, "stages": stages})


def open_run(recipe: Recipe, folder: Path, fresh: bool = False) -> Ledger:
    """Begin a run, or find the one that this recipe began.

    Args:
        recipe: What is asked.
        folder: The run folder.
        fresh: Move a run that stands in the way aside, under a new name.

    Raises:
        RunError: The folder can't be written, or holds a run of another recipe.
    """
    try:
        if fresh and folder.exists():
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
            folder.rename(free_name(folder.with_name(f"{folder.name}.{stamp}")))
        (folder / "stages").mkdir(parents=True, exist_ok=True)
        (folder / "evaluation").mkdir(exist_ok=True)
        if (folder / "recipe.yaml").exists():
            refuse_changed(folder, recipe)
        else:
            write_text(folder / "recipe.yaml", recipe.to_yaml())
        ledger = Ledger(folder, recipe)
        ledger.save()
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(
            str(folder),
            f"expected a folder that can be written; got '{reason}'",
            "free the folder, or run where you may write",
        ) from error
    return ledger


def refuse_changed(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on with a run under another recipe than the one that began it.

    Raises:
        RunError: Names every changed key.
    """
    begun = load_recipe(folder / "recipe.yaml")
    problems = [
        Problem(
            key, f"was {value_at(begun, key)!r} when this run began; got {value_at(recipe, key)!r}"
        )
        for key in changed_keys(begun, recipe)
    ]
    if problems:
        raise RunError(
            str(folder),
            problems,
            f"`name=…` begins another run beside it; `--fresh` moves {folder} aside "
            "and begins anew",
        )


def value_at(recipe: Recipe, key: str) -> Any:
    """Return what a recipe says at a dotted path; stages go by their names."""
    value: Any = recipe.model_dump(mode="json")
    value["stages"] = {stage["name"]: stage for stage in value["stages"]}
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return list(value) if key == "stages" else value


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
    """Return the place of a trained stage, the first being 1; 0 is the base model.

    Args:
        folder: The run's.
        recipe: The run's.
        name: A stage's, or `base`; None: the last stage that is trained.

    Raises:
        RunError: There is no such stage, or it isn't trained.
    """
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
