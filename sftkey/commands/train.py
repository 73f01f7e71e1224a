"""Train and evaluate a recipe: `sftkey train`, and `python -m sftkey.train` for launchers."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from sftkey.commands.arguments import Overrides, RecipeArgument
from sftkey.commands.results import print_table
from sftkey.commands.terminal import say, set_up
from sftkey.recipe.load import load_recipe

if TYPE_CHECKING:
    from sftkey.pipeline import TrainedRun


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move an old run of this name aside and start anew.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Go on to own thinking that shows no use.")
    ] = False,
) -> None:
    """Train and evaluate a recipe's stages, or go on with them."""
    # The form comes first: a wrong recipe is told before torch is imported, which takes seconds.
    checked = load_recipe(recipe, overrides or ())
    set_up()
    from accelerate import PartialState

    from sftkey.pipeline import train_recipe

    run = train_recipe(checked, fresh=fresh, yes=yes)
    print_table(run)
    for stage in run.stages.values():
        if stage.worse:
            say(f"WARNING: {stage.name}: {stage.worse}")
    if PartialState().is_main_process:
        for line in what_next(run):
            say(line)


def what_next(run: TrainedRun) -> list[str]:
    """Return where the last stage's adapter lies, and the three commands that come next.

    A frozen stage can't be merged: its adapter doesn't act on all tokens.
    """
    folder = shlex.quote(str(run.folder))
    last, merged = run.recipe.stages[-1], shlex.quote(f"{run.recipe.name}-merged")
    what = "model" if run.recipe.lora is None else "adapter"
    following = [f"merge {folder} -o {merged}", f"evaluate {folder} --model {merged}"]
    if last.context == "frozen":
        following = [f"card {folder}", f"push {folder} OWNER/NAME"]
    return [
        f"{last.name}: its {what} is {run.stages[last.name].adapter}",
        "next:",
        *(f"  sftkey {each}" for each in [f'generate {folder} "a question"', *following]),
    ]
