"""Let a run's stages answer the test questions, grade the answers, and print the table."""

from __future__ import annotations

import sys
from pathlib import Path

from sftkey.commands.terminal import stdout_console
from sftkey.errors import RunError
from sftkey.pipeline import TrainedRun, evaluate_run, evaluated_recipe
from sftkey.training.run_folder import run_recipe, trained_stage


def evaluate(
    folder: Path,
    generations: Path | None = None,
    stage: str | None = None,
    alpha: float | None = None,
) -> None:
    """Write and grade the answers that are missing, or grade a file of another engine's.

    Args:
        folder: A run folder.
        generations: JSONL with `index` and `text`, one row a question.
        stage: The stage that these generations are of, or `base`; the two go together.
        alpha: Weight of Acc in Score; default the recipe's.

    Raises:
        SFTKeyError: The folder is no run, or the file doesn't hold one answer a question.
        JudgeError: The judge can't be asked; raised after all is graded by the rule and printed.
    """
    evaluated_recipe(folder, generations, stage)  # a wrong call is told before torch is imported
    from sftkey.commands.terminal import quiet_libraries, use_all_cores

    use_all_cores()
    quiet_libraries()
    run, failures = evaluate_run(folder, generations, stage)
    print_table(run, alpha)
    if failures:
        raise failures[0]


def evaluate_folder(
    folder: Path, model: Path, generations: Path | None = None, stage: str | None = None
) -> None:
    """Grade a model folder on a run's questions, and print the difference to the run's own stage.

    Args:
        folder: A run folder.
        model: A model folder, as `sftkey merge` writes it.
        generations: Must be None: the folder answers itself.
        stage: The stage that the model is compared with; default the last one that is trained.

    Raises:
        SFTKeyError: The folder is no run, the stage has no graded answers, or the model can't be
            loaded.
    """
    if generations is not None:
        raise RunError("--generations", "expected --model or --generations; got both")
    recipe = run_recipe(folder)
    number = trained_stage(folder, recipe, stage)
    from sftkey.commands.terminal import quiet_libraries, use_all_cores
    from sftkey.evaluation.comparison import sentences, table

    use_all_cores()
    quiet_libraries()
    from sftkey.sharing.folder import grade_folder

    def report(done: int, total: int) -> None:
        print(f"{model}: {done} of {total} questions answered", file=sys.stderr, flush=True)

    found = grade_folder(folder, recipe, number, model, report)
    console = stdout_console()
    console.print(table(found.comparison))
    for line in sentences(found.comparison):
        console.print(line)
    console.print(f"Both wrote the same text to {found.num_equal} of {found.num_questions}.")


def print_table(run: TrainedRun, alpha: float | None = None) -> None:
    """Print the table of all graded stages on stdout, and what it shows (main process only)."""
    from accelerate import PartialState

    from sftkey.diagnosis.run import diagnosed
    from sftkey.evaluation.comparison import compare_runs, render

    if not PartialState().is_main_process:
        return
    if not list((run.folder / "evaluation").glob("*.json")):
        print(f"{run.folder}: nothing was evaluated, so there is no table", file=sys.stderr)
        return
    console = stdout_console()
    console.print(render(compare_runs([run.folder], alpha)))
    for line in diagnosed(run.folder, run.recipe):
        console.print(line)
