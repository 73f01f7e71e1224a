"""Write a run's report from its files."""

from __future__ import annotations

from pathlib import Path

from sftkey.pipeline import report_run
from sftkey.training.run_folder import run_recipe


def report(folder: Path) -> None:
    """Write `report.html` and `losses.png` into a run's folder, and print where they are.

    Raises:
        RunError: The folder is no run, or a file of it holds something else than it should.
    """
    run_recipe(folder)  # a wrong folder is told before torch is imported
    from sftkey.commands.terminal import quiet_libraries

    quiet_libraries()
    for file in report_run(folder):
        print(file)
