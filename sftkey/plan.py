"""What `sftkey check --gpu` prints: a recipe's memory on a GPU, and what makes it fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sftkey.memory_plan.plan import (
    RESERVED_BYTES,
    Plan,
    fit,
    gib,
)

if TYPE_CHECKING:
    from rich.console import RenderableType


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


def _count(number: int) -> str:
    return str(number or "none")
