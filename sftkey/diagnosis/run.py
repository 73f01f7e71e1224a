"""Diagnose a recipe's model, a run's stage, or a model without a recipe."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftkey.errors import DataError, RecipeError, RunError, did_you_mean
from sftkey.files import read_json, write_json
from sftkey.recipe.load import find_recipe, load_recipe, short_names
from sftkey.recipe.schema import EvalSection, Recipe
from sftkey.recipe.stages import BASE, stage_names
from sftkey.training.run_folder import RECIPE, Ledger, run_recipe, trained_stage

if TYPE_CHECKING:
    from sftkey.data.prepare import Prepared
    from sftkey.data.renderer import Renderer
    from sftkey.diagnosis.ask import AskedRow, OnAnswered
    from sftkey.diagnosis.rule import ConditionFigures, Recommendation
    from sftkey.training.run import Run


SEED = 42
NUM_ROWS = 200


@dataclass(frozen=True)
class Subject:
    """A model on its device, and what it is asked; `stage` is what it comes from, or `base`."""

    name: str
    stage: str
    model: Any
    renderer: Renderer
    asked: Sequence[AskedRow]
    settings: EvalSection


def look(
    subject: Subject, report: OnAnswered | None = None
) -> tuple[ConditionFigures, Recommendation]:
    """Ask the model in all three conditions."""
    from sftkey.diagnosis.ask import ask
    from sftkey.diagnosis.rule import figures, recommend

    outcomes = ask(subject.model, subject.renderer, subject.asked, subject.settings, report)
    found = figures(outcomes, [each.answer for each in subject.asked])
    return found, recommend(found)


def diagnose_model(
    model: str, data: str, num_rows: int = NUM_ROWS
) -> tuple[ConditionFigures, Recommendation]:
    """Tell what limits a model's answers, without a recipe, as `sftkey diagnose MODEL` does.

    Args:
        model: A hub id, a folder, or `pypi:PACKAGE==VERSION`.
        data: Rows: a file, a folder, a hub id or a built-in name.
        num_rows: Rows that are asked at most.

    Returns:
        The figures of the three conditions, and what they speak for.

    Raises:
        SFTKeyError: The model or its rows can't be used.

    >>> figures, verdict = diagnose_model("my-sft", "rows.jsonl", num_rows=2)
    >>> figures.num_rows
    2
    """
    return look(_foreign(model, data, num_rows))


def choose_subject(
    target: str, overrides: Sequence[str], data: str | None, stage: str | None, num_rows: int
) -> Callable[[], Subject]:
    """Tell a run, a recipe and a model apart, and return what loads it, with its rows.

    Their form is checked here, before torch is imported.

    Raises:
        RecipeError: The target is none of them, or the other arguments don't go with it.
        RunError: The run has no such stage, or hasn't trained it.
    """
    names = short_names()
    folder = find_recipe(Path(target)) if target in names and data is None else Path(target)
    is_run = (folder / RECIPE).is_file()
    if overrides and (is_run or data is not None):
        what = f"expected changes to a recipe only; got {' '.join(overrides)}"
        raise RecipeError(target, what, "give the recipe's file, not a run or a model")
    if stage is not None and (data is not None or not is_run):
        raise RecipeError(target, f"--stage: expected a run's folder; got the stage {stage!r}")
    if data is not None:
        return lambda: _foreign(target, data, num_rows)
    if is_run:
        recipe = run_recipe(folder)
        stages = Ledger(folder, recipe, main=False).stages
        begun = any(each.status == "trained" for each in stages)
        number = trained_stage(folder, recipe, stage if stage or begun else BASE)
    elif folder.is_file():
        recipe, number = load_recipe(folder, overrides), 0
    else:
        raise RecipeError(
            target,
            "expected a recipe or a run's folder; it is neither" + did_you_mean(target, names),
            "a model is diagnosed with rows: --data my.jsonl",
        )
    return lambda: _of_recipe(target, recipe, folder, number, num_rows)


def _of_recipe(target: str, recipe: Recipe, folder: Path, number: int, num_rows: int) -> Subject:
    """Load the model of a recipe before its stages, or as one of a run's left it."""
    from sftkey.data.prepare import prepare
    from sftkey.models.loading import load_tokenizer
    from sftkey.training.stage_model import load_left

    prepared = prepare(recipe, load_tokenizer(recipe.model))
    if prepared.validation is None:
        raise DataError(
            target,
            "data.validation: expected rows to diagnose on; got none",
            "data.validation=200 takes so many rows of train",
        )
    if prepared.answers_only:
        raise DataError(
            target,
            "expected rows with a reasoning, which the model's own is compared with; got answers",
            "`sftkey evaluate` says how many thinkings are valid and how many answers are right",
        )
    model, name = load_left(recipe, folder, prepared.renderer, number), stage_names(recipe)[number]
    return validation_subject(target, name, model, recipe, prepared, num_rows)


def validation_subject(
    target: str, stage: str, model: Any, recipe: Recipe, prepared: Prepared, num_rows: int
) -> Subject:
    """Ask a model some of a recipe's validation rows, always the same ones."""
    from sftkey.data.prepare import drawn
    from sftkey.diagnosis.ask import asked_rows

    examples, rows = prepared.validation_examples, prepared.validation
    assert rows is not None
    asked = drawn(len(rows), num_rows, recipe.seed)
    renderer, chosen = prepared.renderer, [examples[n] for n in asked]
    cut = asked_rows(chosen, [rows[n] for n in asked], renderer)
    return Subject(target, stage, model, renderer, cut, recipe.eval)


def _foreign(target: str, data: str, num_rows: int) -> Subject:
    """Load a model that no recipe describes; what is chosen for it is said."""
    from sftkey.adapt.frame import read_foreign
    from sftkey.data.prepare import drawn
    from sftkey.diagnosis.ask import asked_rows
    from sftkey.models.device import choose_device
    from sftkey.models.loading import load_model

    foreign = read_foreign(target, data, SEED)
    for line in foreign.chosen:
        logging.getLogger("sftkey").info("%s: %s", target, line)
    model = load_model(foreign.section, choose_device(foreign.section))
    asked = drawn(len(foreign.rows), num_rows, SEED)
    renderer, examples = foreign.renderer, [foreign.examples[n] for n in asked]
    cut = asked_rows(examples, [vars(foreign.rows[n]) for n in asked], renderer)
    answers = {"grader": foreign.grader, "max_new_tokens": foreign.max_new_tokens}
    settings = EvalSection.model_validate(answers)
    return Subject(target, "as it is", model, renderer, cut, settings)


NUM_STAGE_ROWS = 32  # validation rows: half a minute of the demo on two cores


@dataclass(frozen=True)
class StageDiagnosis:
    """Writes `diagnosis/<stage>.json` of a run after each stage, once."""

    run: Run

    def missing(self, name: str) -> bool:
        """Tell whether a stage is still to be diagnosed.

        No run is without validation rows, where these have no reasoning to compare with, or where
        no tag tells where a thinking ends.
        """
        from accelerate import PartialState

        from sftkey.models.device import sharded

        prepared = self.run.prepared
        told = prepared.renderer.response.ends_thinking and not prepared.answers_only
        if prepared.validation is None or not told or sharded():
            return False
        missing = not _file(self.run.ledger.folder, name).exists()
        PartialState().wait_for_everyone()  # before the main process may write it
        return missing

    def write(self, name: str, model: Any) -> None:
        """Ask the model and say what follows; the main process does, the others wait for it."""
        from accelerate import PartialState

        from sftkey.diagnosis.rule import as_json

        run, start = self.run, time.monotonic()
        if run.ledger.main:
            folder, file = str(run.ledger.folder), _file(run.ledger.folder, name)
            subject = validation_subject(
                folder, name, model, run.recipe, run.prepared, NUM_STAGE_ROWS
            )
            verdict = as_json(*look(subject))
            found = {"stage": name, "seconds": round(time.monotonic() - start, 1), **verdict}
            write_json(file, found)
            run.ledger.finish(file)
            run.progress.note(_line(found))
        PartialState().wait_for_everyone()


def diagnosed(folder: Path, recipe: Recipe) -> list[str]:
    """Return the sentences of a run's diagnosed stages, in their order."""
    files = [_file(folder, stage.name) for stage in recipe.stages]
    return [_line(read_json(file)) for file in files if file.exists()]


def refuse_empty_thinking(run: Run, stage: str) -> None:
    """Refuse to begin a stage over own thinking that shows no use after the stage before."""
    names = [each.name for each in run.recipe.stages]
    following = run.recipe.stages[names.index(stage) + 1 :][:1] if stage in names else ()
    file = _file(run.ledger.folder, stage)
    begun = any(run.ledger.stages[names.index(each.name)].status != "open" for each in following)
    if begun or not file.exists() or not any(each.thinking == "own" for each in following):
        return
    found = read_json(file)
    if found["own_thinking_is_empty"]:
        raise RunError(
            f"stages.{following[0].name}",
            f"thinking: own asks for thinkings that carry something; by {found['num_rows']} "
            f"validation rows after {stage}, the answers are no better for them",
            f"`sftkey train` with --yes goes on; {file} has the figures",
        )


def _line(found: dict[str, Any]) -> str:
    recommended = found["recommendation"]["sentence"]
    return f"After {found['stage']}, by {found['num_rows']} validation rows: {recommended}"


def _file(folder: Path, name: str) -> Path:
    return folder / "diagnosis" / f"{name}.json"
