"""Tell what limits a model's answers, before any training: thinking, answer, or neither."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftkey.console import stdout_console
from sftkey.errors import DataError, RecipeError, RunError
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe

if TYPE_CHECKING:
    from sftkey.data.prepare import Prepared
    from sftkey.data.renderer import Frame
    from sftkey.evaluation.asking import Asked, Report, Settings
    from sftkey.evaluation.conditions import Figures
    from sftkey.evaluation.diagnosis import Recommendation

SEED = 42
NUM_ROWS = 200


@dataclass(frozen=True)
class Subject:
    """A model, and what it is asked.

    Args:
        name: Of the model, the recipe or the run.
        stage: That the model comes from, or `base`.
        model: On its device.
        frame: What stands around its responses.
        asked: The questions.
        settings: How it answers.
    """

    name: str
    stage: str
    model: Any
    frame: Frame
    asked: Sequence[Asked]
    settings: Settings


def diagnose(
    target: str,
    overrides: Sequence[str] = (),
    *,
    data: str | None = None,
    stage: str | None = None,
    num_rows: int = NUM_ROWS,
    as_json: bool = False,
) -> None:
    """Print the three conditions, their differences, and what they speak for.

    Args:
        target: A recipe, a run's folder, or with `data` a model.
        overrides: Changes to a recipe.
        data: Rows for a model without a recipe: a file, a folder, a hub id or a built-in name.
        stage: Of a run, or `base`; default the last one that is trained.
        num_rows: Validation rows that are asked at most.
        as_json: Print JSON instead of tables.

    Raises:
        SFTKeyError: The model, its rows or the run can't be used.
    """
    load = _chosen(target, overrides, data, stage, num_rows)
    from sftkey.evaluation.diagnosis_table import as_json as plain
    from sftkey.evaluation.diagnosis_table import render
    from sftkey.process import quiet_libraries, use_all_cores

    use_all_cores()
    quiet_libraries()
    subject = load()
    start = time.monotonic()
    figures, recommendation = look(subject, _say)
    seconds = time.monotonic() - start
    what = f"{subject.name}, {subject.stage}: {figures.num_rows} rows, {seconds:.0f} s"
    if as_json:
        names = {"name": subject.name, "stage": subject.stage, "seconds": round(seconds, 1)}
        print(json.dumps({**names, **plain(figures, recommendation)}, ensure_ascii=False))
    else:
        print(what, file=sys.stderr)
        stdout_console().print(render(figures, recommendation))


def look(subject: Subject, report: Report | None = None) -> tuple[Figures, Recommendation]:
    """Ask the model in all three conditions."""
    from sftkey.evaluation.asking import ask
    from sftkey.evaluation.conditions import figures
    from sftkey.evaluation.diagnosis import recommend

    outcomes = ask(subject.model, subject.frame, subject.asked, subject.settings, report)
    found = figures(outcomes, [each.answer for each in subject.asked])
    return found, recommend(found)


def _say(thinking: str, num_done: int, num_all: int) -> None:
    if num_done == num_all:
        print(f"{num_all} answers after {thinking} thinking", file=sys.stderr)


def _chosen(
    target: str, overrides: Sequence[str], data: str | None, stage: str | None, num_rows: int
) -> Callable[[], Subject]:
    """Tell a run, a recipe and a model apart; their form is checked before torch is imported."""
    folder = Path(target)
    is_run = (folder / "recipe.yaml").is_file()
    if overrides and (is_run or data is not None):
        what = f"expected changes to a recipe only; got {' '.join(overrides)}"
        raise RecipeError(target, what, "give the recipe's file, not a run or a model")
    if stage is not None and (data is not None or not is_run):
        raise RecipeError(target, f"--stage: expected a run's folder; got the stage {stage!r}")
    if data is not None:
        return lambda: _foreign(target, data, num_rows)
    if is_run:
        recipe = load_recipe(folder / "recipe.yaml")
        number = _stage_number(folder, recipe, stage)
    elif folder.is_file():
        recipe, number = load_recipe(folder, overrides), 0
    else:
        raise RecipeError(
            target,
            "expected a recipe or a run's folder; it is neither",
            "a model is diagnosed with rows: --data my.jsonl",
        )
    return lambda: _of_recipe(target, recipe, folder, number, num_rows)


def _stage_number(folder: Path, recipe: Recipe, stage: str | None) -> int:
    """Give the place of a trained stage, the first being 1 and the base model 0."""
    from sftkey.training.run_folder import Ledger

    trained = [each.status == "trained" for each in Ledger(folder, recipe, main=False).stages]
    names = [
        "base",
        *(each.name for each, done in zip(recipe.stages, trained, strict=True) if done),
    ]
    if stage is not None and stage not in names:
        raise RunError(
            str(folder), f"--stage: expected one that is trained, {', '.join(names)}; got {stage!r}"
        )
    return ["base", *(each.name for each in recipe.stages)].index(stage or names[-1])


def _of_recipe(target: str, recipe: Recipe, folder: Path, number: int, num_rows: int) -> Subject:
    """Load the model of a recipe before its stages, or as one of a run's left it."""
    from sftkey.data.prepare import prepare
    from sftkey.models.device import choose_device
    from sftkey.models.loading import load_tokenizer
    from sftkey.training.run_folder import Ledger
    from sftkey.training.stage_model import load_stage

    prepared = prepare(recipe, load_tokenizer(recipe.model), need_test=False)
    if prepared.validation is None:
        raise DataError(
            target,
            "data.validation: expected rows to diagnose on; got none",
            "data.validation=200 takes so many rows of train",
        )
    device = choose_device(recipe.model, use_cpu=bool(recipe.trainer.get("use_cpu")))
    ledger = Ledger(folder, recipe, main=False)
    model = load_stage(recipe, ledger, device, prepared.frame, number)
    name = recipe.stages[number - 1].name if number else "base"
    return validation_subject(target, name, model, recipe, prepared, num_rows)


def validation_subject(
    target: str, stage: str, model: Any, recipe: Recipe, prepared: Prepared, num_rows: int
) -> Subject:
    """Ask a model some of a recipe's validation rows, always the same ones."""
    from sftkey.data.renderer import stop_ids
    from sftkey.evaluation.asking import Settings, asked_rows

    assert prepared.validation is not None
    chosen = drawn(len(prepared.validation), num_rows, recipe.seed)
    frame, settings = prepared.frame, recipe.eval
    return Subject(
        target,
        stage,
        model,
        frame,
        asked_rows(
            [prepared.validation_examples[n] for n in chosen],
            [prepared.validation[n] for n in chosen],
            frame,
        ),
        Settings(
            settings.grader,
            settings.max_new_tokens,
            settings.batch_size,
            stop_ids(frame, model.generation_config.eos_token_id),
        ),
    )


def drawn(num_all: int, num_rows: int, seed: int) -> list[int]:
    """Draw so many rows, or take all of fewer; in their order."""
    return sorted(random.Random(seed).sample(range(num_all), min(num_rows, num_all)))


def _foreign(target: str, data: str, num_rows: int) -> Subject:
    """Load a model that no recipe describes; what is chosen for it is said."""
    from sftkey.data.renderer import stop_ids
    from sftkey.evaluation.asking import Settings, asked_rows
    from sftkey.models.device import choose_device
    from sftkey.models.loading import load_model
    from sftkey.planning.foreign import read_foreign
    from sftkey.recipe.schema import EvalSection

    foreign = read_foreign(target, data, SEED)
    for line in foreign.chosen:
        print(f"{target}: {line}", file=sys.stderr)
    model = load_model(foreign.section, choose_device(foreign.section))
    chosen = drawn(len(foreign.rows), num_rows, SEED)
    frame, stops = foreign.frame, model.generation_config.eos_token_id
    asked = asked_rows(
        [foreign.examples[n] for n in chosen], [vars(foreign.rows[n]) for n in chosen], frame
    )
    batch = EvalSection().batch_size
    settings = Settings(foreign.grader, foreign.max_new_tokens, batch, stop_ids(frame, stops))
    return Subject(target, "as it is", model, frame, asked, settings)
