"""Let a run's stages answer the test questions, grade the answers, and print the table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sftkey.console import stdout_console
from sftkey.errors import JudgeError, RunError
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe

if TYPE_CHECKING:
    from sftkey.evaluation.judge import Judge
    from sftkey.training.run import Run


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
    refuse_unready_judge(recipe)
    from sftkey.process import quiet_libraries, use_all_cores

    use_all_cores()
    quiet_libraries()
    from sftkey.training.run import start

    run = start(recipe, folder)
    failures = []
    with run.progress:
        for name in run.stages(train=False) if stage is None else [stage]:
            try:
                grade_stage(run, name, generations)
            except JudgeError as error:
                failures.append(error)
    print_table(run, alpha)
    if failures:
        raise failures[0]


def grade_stage(run: Run, stage: str, generations: Path | None = None) -> None:
    """Grade the answers of one stage, and write `evaluation/<stage>.json` (main process only).

    Args:
        run: A started run.
        stage: A stage's name, or `base`.
        generations: The answers; default what the run itself wrote, if it did.

    Raises:
        JudgeError: The judge can't be asked. The file lies there nevertheless, with the rule's
            grades and what was judged; graded again, only what is left is asked.
    """
    from sftkey.data.sources import MADE
    from sftkey.evaluation.generations import read_generations
    from sftkey.evaluation.results import score, write_result

    file = generations or run.ledger.generations(stage)
    if not run.ledger.main or not file.exists() or not run.answers.questions:
        return
    questions, frame, settings = run.answers.questions, run.prepared.frame, run.recipe.eval
    names = ["base", *(each.name for each in run.recipe.stages)]
    judge = stage_judge(run, stage)
    about = {"max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature}
    result = score(
        read_generations(file, [example.index for example in questions]),
        questions,
        frame.response,
        stage=stage,
        position=names.index(stage),
        grader=settings.grader,
        alpha=settings.alpha,
        bridge=frame.bridge,
        end=frame.end,
        tokenizer=run.tokenizer,
        settings=about | ({"judge": judge.section.model} if judge else {}),
        made=run.recipe.data.source in MADE,
        thinking_loss=thinking_losses(run, stage),
        judge=judge.flags if judge else None,
    )
    write_result(run.ledger.folder / "evaluation", result)
    if judge and judge.failure:
        raise judge.failure


def stage_judge(run: Run, stage: str) -> Judge | None:
    """Give what asks the recipe's judge about a stage; without one nothing is imported."""
    section = run.recipe.eval.judge
    if section is None:
        return None
    from sftkey.evaluation.judge import Judge

    return Judge(section, lambda text: run.progress.note(f"{stage}: {text}"))


def refuse_unready_judge(recipe: Recipe) -> None:
    """Refuse a judge whose package or key is missing, before anything else is done.

    Raises:
        RecipeError: Says what to install or to set.
    """
    if recipe.eval.judge is not None:
        from sftkey.evaluation.judge import open_client

        open_client(recipe.eval.judge).close()


def thinking_losses(run: Run, stage: str) -> tuple[float, float] | None:
    """Give the thinking's validation loss before and after a stage; None of the base model."""
    for record in run.ledger.stages:
        losses = [record.validation.get(at, {}).get("thinking") for at in ("start", "end")]
        if record.name == stage and losses[0] is not None and losses[1] is not None:
            return losses[0], losses[1]
    return None


def note_thinking(run: Run, stage: str) -> None:
    """Say in the log what a stage did to the thinking, and how to mend what it harmed."""
    from sftkey.evaluation.results import read_result
    from sftkey.evaluation.thinking_change import ThinkingChange, thinking_change

    names = ["base", *(each.name for each in run.recipe.stages)]
    if stage == "base" or not run.ledger.main:
        return
    folder = run.ledger.folder / "evaluation"
    files = [folder / f"{name}.json" for name in (names[names.index(stage) - 1], stage)]
    before, after = (read_result(file) if file.exists() else None for file in files)
    if after:
        change = thinking_change(before, after)
    else:  # nothing was asked, or will be later
        change = ThinkingChange(stage, thinking_losses(run, stage))
    for line in (change.line(), *change.warnings()):
        run.progress.note(line)


def print_table(run: Run, alpha: float | None = None) -> None:
    """Print the table of all graded stages on stdout, and what it shows (main process only)."""
    from sftkey.evaluation.comparison import compare_runs, render
    from sftkey.stage_diagnosis import diagnosed

    if not run.ledger.main:
        return
    if not list((run.ledger.folder / "evaluation").glob("*.json")):
        run.progress.note(f"{run.ledger.folder}: nothing was evaluated, so there is no table")
        return
    console = stdout_console()
    console.print(render(compare_runs([run.ledger.folder], alpha)))
    for line in diagnosed(run):
        console.print(line)
