"""Compare runs, or studies, by what was graded: reads their files alone, and imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftkey.commands.terminal import stdout_console
from sftkey.evaluation.comparison import as_json as comparison_json
from sftkey.evaluation.comparison import compare_runs, render
from sftkey.evaluation.statistics import score_of
from sftkey.study.report import report
from sftkey.study.results import StudyResults, find_results, read_results_file


def compare(folders: Sequence[Path], as_json: bool = False, alpha: float | None = None) -> None:
    """Print the stages of runs side by side, and what the differences show; then studies.

    Args:
        folders: Run folders, studies' folders, or a study's `results.json`.
        as_json: Print one JSON object instead of the tables.
        alpha: Weight of Acc in Score; default each result's own. Studies have no Score without.

    Raises:
        RunError: A folder holds no results.
    """
    files = {folder: find_results(folder) for folder in folders}
    studies = {folder: read_results_file(file) for folder, file in files.items() if file}
    runs = [folder for folder, file in files.items() if not file]
    comparison = compare_runs(runs, alpha) if runs else None
    if as_json:
        found = comparison_json(comparison) if comparison else {}
        if studies:
            found["studies"] = [_as_json(*study, alpha) for study in studies.items()]
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    if comparison:
        stdout_console().print(render(comparison))
    for folder, results in studies.items():
        print(report(results, pictures=None, title=str(folder), alpha=alpha), end="")


def _as_json(folder: Path, results: StudyResults, alpha: float | None) -> dict[str, Any]:
    data = results.model_dump(mode="json")
    if alpha is not None:
        for arm in data["arms"]:
            arm |= {"alpha": alpha, "score": score_of(arm["acc"], arm["fmt"], alpha)}
    return {"study": str(folder), **data}
