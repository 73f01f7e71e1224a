"""Compare runs by what was graded: reads their folders alone, and imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sftkey.console import stdout_console
from sftkey.evaluation.comparison import as_json as comparison_json
from sftkey.evaluation.comparison import compare_runs, render


def compare(folders: Sequence[Path], as_json: bool = False, alpha: float | None = None) -> None:
    """Print the stages of runs side by side, and what the differences show.

    Args:
        folders: Run folders.
        as_json: Print one JSON object instead of the table.
        alpha: Weight of Acc in Score; default each result's own.

    Raises:
        RunError: A folder holds no results.
    """
    comparison = compare_runs(folders, alpha)
    if as_json:
        print(json.dumps(comparison_json(comparison), indent=2, ensure_ascii=False))
    else:
        stdout_console().print(render(comparison))
