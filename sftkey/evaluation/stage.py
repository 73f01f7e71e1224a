"""Grade what a stage of a run answered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sftkey.recipe.schema import Recipe

if TYPE_CHECKING:
    from sftkey.evaluation.judge import Judge
    from sftkey.training.run import Run


def grade_stage(run: Run, stage: str, generations: Path | None = None) -> None:
    """Grade the answers of one stage, and write what was found (main process only).

    `evaluation/<stage>.json` has the figures, `<stage>.graded.jsonl` each answer and its verdict.

    Args:
        run: A started run.
        stage: A stage's name, or `base`.
        generations: The answers; default what the run itself wrote, if it did.

    Raises:
        JudgeError: The judge can't be asked. The file lies there nevertheless, with the rule's
            grades and what was judged; graded again, only what is left is asked.
    """
    from sftkey.evaluation.answers import graded_answers, read_generations, write_answers
    from sftkey.evaluation.results import score_stage, write_result

    file = generations or run.ledger.generations(stage)
    if not run.ledger.main or not file.exists() or not run.answers.questions:
        return
    questions, renderer = run.answers.questions, run.prepared.renderer
    judge = stage_judge(run, stage)
    written = read_generations(file, [example.key for example in questions])
    ends = {"assistant_prefix": renderer.assistant_prefix, "end": renderer.end}
    result = score_stage(
        run.recipe,
        renderer,
        stage,
        written,
        questions,
        settings={"judge": judge.section.model} if judge else None,
        tokenizer=run.tokenizer,
        thinking_loss=thinking_losses(run, stage),
        loss_name=run.prepared.loss_name,
        judge=judge.flags if judge else None,
    )
    answers = graded_answers(result, written, questions, renderer.response, **ends)
    folder = run.ledger.folder / "evaluation"
    run.ledger.finish(write_result(folder, result), write_answers(folder, stage, answers))
    if judge and judge.failure:
        raise judge.failure


def track_grades(run: Run, stage: str) -> None:
    """Log Acc and Fmt with their intervals to the run's trackers, where the stage ends."""
    from sftkey.evaluation.results import read_result

    file = run.ledger.folder / "evaluation" / f"{stage}.json"
    if not run.ledger.main or not file.exists():
        return
    result = read_result(file)
    values: dict[str, float] = {}
    for name in ("acc", "fmt"):
        low, high = getattr(result, f"{name}_interval")
        values |= {f"test/{name}": getattr(result, name)}
        values |= {f"test/{name}_low": low, f"test/{name}_high": high}
    number = result.position
    num_steps = run.ledger.stages[number - 1].num_steps if number else 0
    run.trackers.log(values, number, num_steps)


def stage_judge(run: Run, stage: str) -> Judge | None:
    """Return what asks the recipe's judge about a stage; without one nothing is imported."""
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
    """Return the thinking's loss before and after a stage; None of the base model."""
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
        change = ThinkingChange(stage, thinking_losses(run, stage), run.prepared.loss_name)
    for line in (change.line(), *change.warnings()):
        run.progress.note(line)
