"""Tell what limits a model's answers, before any training: thinking, answer, or neither."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

from sftkey.commands.terminal import stdout_console
from sftkey.diagnosis.run import NUM_ROWS, _chosen, look


def diagnose(
    target: str,
    overrides: Sequence[str] = (),
    *,
    data: str | None = None,
    stage: str | None = None,
    num_rows: int = NUM_ROWS,
    as_json: bool = False,
) -> None:
    """Print the three conditions, their differences, and what they speak for.

    Args:
        target: A recipe, a run's folder, or with `data` a model.
        overrides: Changes to a recipe.
        data: Rows for a model without a recipe: a file, a folder, a hub id or a built-in name.
        stage: Of a run, or `base`; default the last one that is trained.
        num_rows: Validation rows that are asked at most.
        as_json: Print JSON instead of tables.

    Raises:
        SFTKeyError: The model, its rows or the run can't be used.
    """
    load = _chosen(target, overrides, data, stage, num_rows)
    from sftkey.commands.terminal import quiet_libraries, use_all_cores
    from sftkey.diagnosis.report import as_json as plain
    from sftkey.diagnosis.report import render

    use_all_cores()
    quiet_libraries()
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
