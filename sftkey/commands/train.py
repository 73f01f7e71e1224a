"""Train and evaluate a recipe: `sftkey train`, and `python -m sftkey.train` for launchers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sftkey.errors import JudgeError
from sftkey.recipe.load import load_recipe


def train(
    recipe: Path, overrides: Sequence[str] = (), fresh: bool = False, yes: bool = False
) -> None:
    """Check the recipe's form, set the process up, pass the gate, and run the stages.

    The form comes first: a wrong recipe must be told before torch is imported, which takes seconds.

    A judge that can't be asked stops no training: the rule grades, a line in the log says so, and
    `sftkey evaluate`, or the same command again, asks for the judge's flags that are missing.

    Raises:
        SFTKeyError: What the user can mend; the command line prints it.
    """
    checked = load_recipe(recipe, overrides)
    from sftkey.commands.terminal import quiet_libraries, use_all_cores

    use_all_cores()
    quiet_libraries()
    from sftkey.checks.gate import require_trainable
    from sftkey.commands.evaluate import print_table
    from sftkey.diagnosis.run import StageDiagnosis, refuse_empty_thinking
    from sftkey.evaluation.grading import grade
    from sftkey.evaluation.stage import grade_stage, note_thinking
    from sftkey.training.run import start

    run = start(checked, Path("runs") / checked.name, fresh, read=require_trainable)
    run.reports = (StageDiagnosis(run),)
    run.grade = grade
    with run.progress:
        for stage in run.stages():
            try:
                grade_stage(run, stage)
            except JudgeError as error:
                run.progress.note(f"{stage}: graded by the rule; {error}")
            note_thinking(run, stage)
            if not yes:
                refuse_empty_thinking(run, stage)
    print_table(run)
