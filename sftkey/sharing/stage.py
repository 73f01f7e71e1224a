"""Which stage of a run is shared, and whether its weights can stand alone; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sftkey.errors import RunError
from sftkey.recipe.schema import Recipe
from sftkey.training.run_folder import Ledger, run_recipe, trained_stage

if TYPE_CHECKING:
    from sftkey.data.prepare import Prepared
    from sftkey.data.response import Example


@dataclass(frozen=True)
class SharedStage:
    """A trained stage of a run."""

    run: Path  # the run's folder
    recipe: Recipe  # the run's
    name: str  # the stage's
    number: int  # its place, the first being 1
    weights: Path  # the folder of its adapter, or of its whole model


def shared_stage(run: Path, name: str | None, what: str = "merge") -> SharedStage:
    """Find a trained stage.

    Without a name it is the last one that is trained; `what` is done with its adapter, for the
    error.
    """
    recipe = run_recipe(run)
    number = trained_stage(run, recipe, name)
    if number == 0:
        raise RunError(str(run), f"--stage: the base has no adapter to {what}")
    ledger = Ledger(run, recipe, main=False)
    for each in range(number):  # a frozen stage stands on the one before
        ledger.require(ledger.adapter(each))
    weights = ledger.adapter(number - 1)
    return SharedStage(run, recipe, recipe.stages[number - 1].name, number, weights)


def asked_questions(run: Path, recipe: Recipe) -> tuple[Prepared, list[Example]]:
    """Return a run's rows and the test questions that its stages are asked; none is an error."""
    from sftkey.data.prepare import prepare
    from sftkey.models.loading import load_tokenizer

    prepared = prepare(recipe, load_tokenizer(recipe.model))
    questions = list(prepared.questions(recipe))
    if not questions:
        raise RunError(str(run), "expected test rows; its recipe has none", "write data.test")
    return prepared, questions


def refuse_frozen(stage: SharedStage) -> None:
    """Refuse a stage whose adapter doesn't act on all tokens, where weights are to be merged."""
    recipe = stage.recipe
    if recipe.stages[stage.number - 1].context != "frozen":
        return
    before = recipe.stages[stage.number - 2].name if stage.number > 1 else None
    context = f"merge what it stands on with --stage {before}" if before else "take the base"
    raise RunError(
        str(stage.run),
        f"{stage.name} was trained with `context: frozen`: its adapter acts from the "
        "thinking's last token on, merged weights would act on every token and change the "
        "thinking",
        f"{context}, and serve {stage.weights} beside it as activated LoRA, where a server has "
        "that; `sftkey generate` and the lines in docs/library.md switch by themselves",
    )
