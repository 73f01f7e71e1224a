"""What `sftkey check --gpu` prints: a recipe's memory on a GPU, and what makes it fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftkey.planning.plan import GIB, RESERVED_BYTES, Plan, make_plan, size_bytes
from sftkey.planning.plan_changes import changes_that_fit
from sftkey.planning.shape_reading import read_shape
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe

if TYPE_CHECKING:
    from rich.console import RenderableType

NONE_FITS = "no change that is known here makes it fit: take a smaller model or a larger GPU"


@dataclass(frozen=True)
class Fit:
    """A recipe's plan, and what to write where it doesn't fit.

    Args:
        name: The recipe's.
        plan: As the recipe stands.
        changes: Overrides; none where it fits, None where no change suffices.
    """

    name: str
    plan: Plan
    changes: list[str] | None

    def as_json(self) -> dict[str, Any]:
        """Give plan and changes."""
        return {**self.plan.as_json(), "changes": self.changes}

    @property
    def message(self) -> str:
        """Say of a recipe that doesn't fit what it needs."""
        worst = max(self.plan.stages, key=lambda stage: stage.peak_bytes)
        return (
            f"stage {worst.name} needs {gib(worst.peak_bytes)} GiB at its peak, and "
            f"{gib(RESERVED_BYTES)} GiB are set aside; the GPU has {gib(self.plan.gpu_bytes)} GiB"
        )

    @property
    def hint(self) -> str:
        """Say what to do about it."""
        return f"write {' '.join(self.changes)}" if self.changes else NONE_FITS

    def finding(self) -> dict[str, Any]:
        """Give the fields of the gate's finding."""
        return {
            "code": "memory",
            "rows": (),
            "message": self.message,
            "hint": self.hint,
            "refuses": True,
        }


def fit(recipe: Path, overrides: Sequence[str], gpu: str) -> Fit:
    """Plan a recipe on a GPU, and look for what makes it fit.

    Raises:
        SFTKeyError: The size, the recipe or its model can't be read, or aren't planned.
    """
    size = size_bytes(gpu)

    def load(more: Sequence[str]) -> Recipe:
        return load_recipe(recipe, [*overrides, *more])

    loaded = load([])
    shape = read_shape(loaded.model)
    plan = make_plan(loaded, shape, size)
    return Fit(loaded.name, plan, changes_that_fit(load, shape, size))


def check_plan(recipe: Path, overrides: Sequence[str], gpu: str, as_json: bool) -> None:
    """Print a recipe's plan alone; no data are read.

    Raises:
        SystemExit: With 2, where it doesn't fit.
    """
    found = fit(recipe, overrides, gpu)
    if as_json:
        findings = [] if found.plan.fits else [found.finding()]
        report = {"findings": findings, "statistics": {}, "plan": found.as_json()}
        print(json.dumps(report, ensure_ascii=False))
    else:
        from rich.text import Text

        from sftkey.console import stdout_console

        console = stdout_console()
        console.print(rendered_plan(found.plan))
        verdict = "fits" if found.plan.fits else f"doesn't fit: {found.message}"
        console.print(Text(f"{found.name}: {verdict}", "bold"))
        if not found.plan.fits:
            console.print(f"    hint: {found.hint}")
    if not found.plan.fits:
        sys.exit(2)


def rendered_plan(plan: Plan) -> RenderableType:
    """Give the table: a column a stage, a row a part, and below what would fit."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, title="peak memory on CUDA, GiB (planned)", title_justify="left")
    table.add_column("")
    for stage in plan.stages:
        table.add_column(f"{stage.name}, {stage.rows} x {stage.length}", justify="right")
    for part in plan.stages[0].parts:
        table.add_row(part, *(gib(stage.parts[part]) for stage in plan.stages))
    table.add_section()
    table.add_row("peak", *(gib(stage.peak_bytes) for stage in plan.stages))
    table.add_row("set aside", *(gib(RESERVED_BYTES) for _ in plan.stages))
    table.add_section()
    table.add_row("longest rows that fit", *(_count(stage.longest) for stage in plan.stages))
    table.add_row("most rows that fit", *(_count(stage.most_rows) for stage in plan.stages))
    return table


def gib(size: int) -> str:
    """Write a size."""
    return f"{size / GIB:.2f}"


def _count(number: int) -> str:
    return str(number or "none")
