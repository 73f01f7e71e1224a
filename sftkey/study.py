"""Run a study: arms times seeds over one or more recipes, in one command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sftkey.errors import RunError
from sftkey.evaluation.study import Study, load_study

if TYPE_CHECKING:
    from sftkey.evaluation.study_run import StudyRun


def study(file: Path, plan_only: bool = False) -> None:
    """Run what isn't finished of a study, or print what that would be.

    Args:
        file: The study's YAML file; its recipes lie relative to it.
        plan_only: Print cells, steps, tokens and time, and train nothing.

    Raises:
        SFTKeyError: What the user can mend; the command line prints it.
    """
    checked = load_study(file)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        what = f"expected one process; got {os.environ['WORLD_SIZE']}"
        raise RunError(str(file), what, "start it as `sftkey study`, without a launcher")
    from sftkey.process import quiet_libraries, use_all_cores

    use_all_cores()
    quiet_libraries()
    run = study_run(checked, file)
    if plan_only:
        from sftkey.console import stdout_console
        from sftkey.evaluation.study_plan import plan, rendered

        stdout_console().print(rendered(plan(run)))
        return
    run.run()


def study_run(checked: Study, file: Path) -> StudyRun:
    """Put a study together: its recipes, the gate, and what grades."""
    from sftkey.check import passed
    from sftkey.evaluate import grade_stage
    from sftkey.evaluation.study_cells import StudyFolder
    from sftkey.evaluation.study_run import StudyRun

    return StudyRun(
        checked,
        tuple(file.parent / recipe for recipe in checked.recipes),
        StudyFolder(Path("runs") / checked.name),
        read=passed,
        grade=grade_stage,
        note=lambda text: print(text, file=sys.stderr, flush=True),
        command=f"sftkey study {file.name}",
    )
