"""Train a recipe, or evaluate a run: all that the commands of these names compute.

Nothing heavy is imported with this module, so that the form of what is asked is checked at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sftkey.errors import JudgeError, RunError
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe

if TYPE_CHECKING:
    from sftkey.training.run import Run


def train_recipe(
    recipe: Recipe, folder: str | Path | None = None, fresh: bool = False, yes: bool = False
) -> Run:
    """Pass the gate, train the stages that are still to be trained, and grade their answers.

    A judge that can't be asked stops no training: the rule grades, a line in the log says so, and
    `evaluate_run`, or the same call again, asks for the judge's flags that are missing.

    Args:
        recipe: What is asked.
        folder: The run folder; default `runs/<name of the recipe>`. A run in it goes on.
        fresh: Move a run that lies there aside, under a new name.
        yes: Go on to a stage over own thinking that shows no use.

    Returns:
        The run, all of whose stages are trained.

    Raises:
        SFTKeyError: The recipe, its rows, the device or the folder can't be used.
    """
    from sftkey.checks.gate import require_trainable
    from sftkey.diagnosis.run import StageDiagnosis, refuse_empty_thinking
    from sftkey.evaluation.grading import grade
    from sftkey.evaluation.stage import grade_stage, note_thinking
    from sftkey.training.run import start

    place = Path("runs") / recipe.name if folder is None else Path(folder)
    run = start(
        recipe, place, fresh, read=require_trainable, grade=grade, reports=(StageDiagnosis,)
    )
    with run.progress:
        for stage in run.stages():
            try:
                grade_stage(run, stage)
            except JudgeError as error:
                run.progress.note(f"{stage}: graded by the rule; {error}")
            note_thinking(run, stage)
            if not yes:
                refuse_empty_thinking(run, stage)
    return run


def evaluated_recipe(folder: Path, generations: Path | None, stage: str | None) -> Recipe:
    """Read the recipe of a run that is to be evaluated.

    Raises:
        RunError: The folder is no run, or `generations` and `stage` don't fit it or each other.
    """
    if not (folder / "recipe.yaml").is_file():
        raise RunError(
            str(folder), "expected a run folder; it holds no recipe.yaml", "runs lie in runs/<name>"
        )
    recipe = load_recipe(folder / "recipe.yaml")
    names = ["base", *(each.name for each in recipe.stages)]
    if stage is not None and stage not in names:
        raise RunError(str(folder), f"--stage: expected one of {', '.join(names)}; got {stage!r}")
    if (generations is None) != (stage is None):
        raise RunError(
            str(folder),
            "expected --generations and --stage together; got one without the other",
            f"the stages are {', '.join(names)}",
        )
    return recipe


def evaluate_run(
    folder: str | Path, generations: Path | None = None, stage: str | None = None
) -> tuple[Run, list[JudgeError]]:
    """Write and grade the answers that are missing, or grade a file of another engine's.

    Args:
        folder: A run folder.
        generations: JSONL with `index` and `text`, one row a question.
        stage: The stage that these generations are of, or `base`; the two go together.

    Returns:
        The run, and why the judge couldn't be asked, for each such stage: the rule has graded it.

    Raises:
        SFTKeyError: The folder is no run, or the file doesn't hold one answer a question.
    """
    from sftkey.evaluation.stage import grade_stage, refuse_unready_judge

    recipe = evaluated_recipe(Path(folder), generations, stage)
    refuse_unready_judge(recipe)
    from sftkey.evaluation.grading import grade
    from sftkey.training.run import start

    run = start(recipe, Path(folder), grade=grade)
    failures = []
    with run.progress:
        for name in run.stages(train=False) if stage is None else [stage]:
            try:
                grade_stage(run, name, generations)
            except JudgeError as error:
                failures.append(error)
    return run, failures
