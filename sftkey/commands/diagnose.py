"""Tell what limits a model's answers, before any training: thinking, answer, or neither."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

import typer

from sftkey.commands.arguments import AsJSON, Overrides, recipe_names
from sftkey.commands.terminal import set_up, stdout_console
from sftkey.diagnosis.run import NUM_ROWS, _chosen, look


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
    load = _chosen(target, overrides or (), data, stage, num_rows)
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
        print(what, file=sys.stderr)
        stdout_console().print(render(figures, recommendation))


def _say(thinking: str, num_done: int, num_all: int) -> None:
    if num_done == num_all:
        print(f"{num_all} answers after {thinking} thinking", file=sys.stderr)
