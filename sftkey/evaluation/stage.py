"""Grade what a stage of a run answered, and say what it did to the thinking."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sftkey.evaluation.answers import (
    grade_texts,
    graded_answers,
    read_generations,
    write_answers,
)
from sftkey.evaluation.judge import Judge, open_client
from sftkey.evaluation.results import StageResult, read_result, score, write_result
from sftkey.evaluation.thinking_change import ThinkingChange, thinking_change
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import BASE, stage_names

if TYPE_CHECKING:
    from sftkey.training.run import Run


def grade_stage(run: Run, stage: str, generations: Path | None = None) -> None:
    """Grade the answers of one stage, and write what was found (main process only).

    `evaluation/<stage>.json` has the figures, `<stage>.graded.jsonl` each answer and its verdict.
    The answers are those of `generations`, by default what the run itself wrote, if it did.

    Raises:
        JudgeError: The judge can't be asked. The file lies there nevertheless, with the rule's
            grades and what was judged; graded again, only what is left is asked.
    """
    file = generations or run.ledger.generations(stage)
    wanted = generations or file.exists()  # an absent file that was named is an error
    if not run.ledger.main or not wanted or not run.answers.questions:
        return
    questions, renderer = run.answers.questions, run.prepared.renderer
    section = run.recipe.eval.judge
    judge = Judge(section, lambda text: run.progress.note(f"{stage}: {text}")) if section else None
    written = read_generations(file, [example.key for example in questions])
    texts = grade_texts(run.recipe, renderer, written, questions)
    result = score(
        run.recipe,
        renderer,
        stage,
        texts,
        settings={"judge": judge.section.model} if judge else None,
        thinking_loss=thinking_losses(run, stage),
        loss_name=run.prepared.loss_name,
        judge=judge.flags if judge else None,
    )
    folder = _result_file(run, stage).parent
    answers = graded_answers(texts)
    run.ledger.finish(write_result(folder, result), write_answers(folder, stage, answers))
    if judge and judge.failure:
        raise judge.failure


def _result_file(run: Run, stage: str) -> Path:
    return run.ledger.folder / "evaluation" / f"{stage}.json"


def _result(run: Run, stage: str) -> StageResult | None:
    """Return the figures of a stage; None where it isn't graded."""
    file = _result_file(run, stage)
    return read_result(file) if file.exists() else None


def track_grades(run: Run, stage: str) -> None:
    """Log Acc and Fmt with their intervals to the run's trackers, where the stage ends."""
    result = _result(run, stage) if run.ledger.main else None
    if result is None:
        return
    values: dict[str, float] = {}
    for name in ("acc", "fmt"):
        low, high = getattr(result, f"{name}_interval")
        values |= {f"test/{name}": getattr(result, name)}
        values |= {f"test/{name}_low": low, f"test/{name}_high": high}
    number = result.position
    num_steps = run.ledger.stages[number - 1].num_steps if number else 0
    run.trackers.log(values, number, num_steps)


def refuse_unready_judge(recipe: Recipe) -> None:
    """Refuse a judge whose package or key is missing, before anything else is done.

    Raises:
        RecipeError: Says what to install or to set.
    """
    if recipe.eval.judge is not None:
        open_client(recipe.eval.judge).close()


def thinking_losses(run: Run, stage: str) -> tuple[float, float] | None:
    """Return the thinking's loss before and after a stage; None of the base model."""
    for record in run.ledger.stages:
        start, end = (record.validation.get(at, {}).get("thinking") for at in ("start", "end"))
        if record.name == stage and start is not None and end is not None:
            return start, end
    return None


def note_thinking(run: Run, stage: str) -> None:
    """Say in the log what a stage did to the thinking, and how to mend what it harmed."""
    if stage == BASE or not run.ledger.main:
        return
    names = stage_names(run.recipe)
    if after := _result(run, stage):
        change = thinking_change(_result(run, names[names.index(stage) - 1]), after)
    else:  # nothing was asked, or will be later
        change = ThinkingChange(stage, thinking_losses(run, stage), run.prepared.loss_name)
    for line in (change.line(), *change.warnings()):
        run.progress.note(line)
