"""What is found out before any training: `sftkey check`, the gate, and `sftkey diagnose`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sftkey.commands.arguments import GPU, AsJSON, Overrides, RecipeArgument, recipe_names
from sftkey.commands.terminal import say, set_up, stdout_console
from sftkey.diagnosis.run import NUM_ROWS, choose_subject, look
from sftkey.errors import RecipeError, SFTKeyError
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sftkey.checks.findings import Report
    from sftkey.memory_plan.plan import Plan


def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: GPU = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Plan the memory alone; read no data.")
    ] = False,
    as_json: AsJSON = False,
) -> None:
    """Find all that is wrong with a recipe and its rows."""
    if plan_only and gpu is None:
        raise RecipeError("--plan-only", "expected --gpu SIZE beside it", "write --gpu 24GB")
    if gpu is not None:
        from sftkey.memory_plan.plan import gpu_size

        gpu_size(gpu)  # before any row is read
    changes = overrides or ()
    try:
        checked = load_recipe(recipe, changes)
    except RecipeError as error:
        if not as_json:
            raise
        from sftkey.checks.findings import Report, of_error

        print(json.dumps(Report(tuple(of_error(error))).as_json(), ensure_ascii=False))
        sys.exit(2)
    from sftkey.checks.findings import Report

    report, plan = Report(()), None
    if not plan_only:
        from sftkey.checks.gate import check_recipe

        report = check_recipe(checked)
    if gpu is not None:
        report, plan = with_plan(report, recipe, changes, gpu)
    if as_json:
        planned = {"plan": plan.as_json()} if plan else {}
        print(json.dumps({**report.as_json(), **planned}, ensure_ascii=False))
    else:
        console = stdout_console()
        if plan:
            console.print(rendered_plan(plan))
        console.print(rendered(checked, report, "fits" if plan_only else "passes"))
    if report.refusals:
        sys.exit(2)


def with_plan(
    report: Report, recipe: Path, overrides: Sequence[str], gpu: str
) -> tuple[Report, Plan | None]:
    """Add to a report what the plan of the memory finds; the plan itself where there is one."""
    from sftkey.checks.findings import Finding, of_error
    from sftkey.memory_plan.plan import fit

    plan, found = None, list[Finding]()
    try:
        plan = fit(recipe, overrides, gpu)
        if not plan.fits:
            found.append(Finding("memory", (), plan.message, plan.hint))
    except SFTKeyError as error:
        found += of_error(error)
    new = [each for each in found if each not in report.findings]
    return replace(report, findings=(*report.findings, *new)), plan


def rendered(recipe: Recipe, report: Report, good: str) -> RenderableType:
    """Return findings and statistics for a terminal; the last line has `good` if none refuses."""
    from rich.console import Group
    from rich.text import Text

    lines: list[RenderableType] = []
    for finding in report.findings:
        word, style = ("refused", "red") if finding.refuses else ("note", "yellow")
        lines.append(Text.assemble((f"{word} {finding.code}: ", style), str(finding)))
    if report.statistics:
        lines += rendered_numbers(report.statistics)
    if report.prepared is not None:
        lines += [Text(f"note: {remark}") for remark in report.prepared.remarks]
    count = len(report.refusals)
    verdict = f"refused for {count} finding{'s' * (count != 1)}" if count else good
    return Group(*lines, Text(f"{recipe.name}: {verdict}", "bold"))


def rendered_numbers(numbers: dict[str, Any]) -> list[RenderableType]:
    """Return the counts: rows and tokens, the key's share, each stage's steps and tokens."""
    from rich.text import Text

    from sftkey.data.preview import rendered_statistics

    share = numbers["key_share"]
    lines: list[RenderableType] = [
        rendered_statistics(numbers),
        Text(
            f"key: {share['median']:.1%} of a completion's tokens at the median, "
            f"{share['min']:.1%} to {share['max']:.1%}"
        ),
    ]
    for name, stage in numbers["stages"].items():
        text = (
            f"{stage['steps']} steps, {stage['tokens']} tokens, {stage['trained_tokens']} trained"
        )
        lines.append(Text(f"stage {name}: {text}"))
    return lines


def rendered_plan(plan: Plan) -> RenderableType:
    """Return the table: a column a stage, a row a part, and below what would fit."""
    from rich.console import Group

    from sftkey.memory_plan.plan import RESERVED_BYTES, gib
    from sftkey.tables import FittedTable

    heads = [f"{stage.name}\n{stage.rows} x {stage.length}" for stage in plan.stages]
    table = FittedTable("GiB", heads)
    for part in plan.stages[0].parts:
        table.add([part, *(gib(stage.parts[part]) for stage in plan.stages)])
    table.add_section()
    table.add(["peak", *(gib(stage.peak_bytes) for stage in plan.stages)])
    table.add(["set aside", *(gib(RESERVED_BYTES) for _ in plan.stages)])
    table.add_section()
    table.add(["longest rows that fit", *(_count(stage.longest) for stage in plan.stages)])
    table.add(["most rows that fit", *(_count(stage.most_rows) for stage in plan.stages)])
    return Group("peak memory on CUDA, GiB (planned)", table)


def _count(number: int) -> str:
    return str(number or "none")


def diagnose(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|RUN|MODEL",
            help="A recipe's file or name, a run's folder, or a model.",
            autocompletion=recipe_names,
        ),
    ],
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Rows for a MODEL: a file, a folder or a hub id."),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(metavar="NAME", help="A run's stage, or base; else its last one.")
    ] = None,
    num_rows: Annotated[
        int, typer.Option("--rows", min=1, help="How many rows to ask.")
    ] = NUM_ROWS,
    as_json: AsJSON = False,
) -> None:
    """Tell what limits a model's answers, and what could mend it."""
    load = choose_subject(target, overrides or (), data, stage, num_rows)
    set_up()
    from sftkey.diagnosis.rule import as_json as plain
    from sftkey.diagnosis.rule import render

    subject = load()
    start = time.monotonic()
    figures, recommendation = look(subject, _say)
    seconds = time.monotonic() - start
    what = f"{subject.name}, {subject.stage}: {figures.num_rows} rows, {seconds:.0f} s"
    if as_json:
        names = {"name": subject.name, "stage": subject.stage, "seconds": round(seconds, 1)}
        print(json.dumps({**names, **plain(figures, recommendation)}, ensure_ascii=False))
    else:
        say(what)
        stdout_console().print(render(figures, recommendation))


def _say(thinking: str, num_done: int, num_all: int) -> None:
    if num_done == num_all:
        say(f"{num_all} answers after {thinking} thinking")
