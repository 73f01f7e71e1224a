"""Train and evaluate a recipe: `sftkey train`, and `python -m sftkey.train` for launchers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sftkey.recipe.load import load_recipe

if TYPE_CHECKING:
    from sftkey.pipeline import TrainedRun


def train(
    recipe: Path, overrides: Sequence[str] = (), fresh: bool = False, yes: bool = False
) -> None:
    """Check the recipe's form, set the process up, train, and print the table.

    The form comes first: a wrong recipe must be told before torch is imported, which takes seconds.

    Raises:
        SFTKeyError: What the user can mend; the command line prints it.
    """
    checked = load_recipe(recipe, overrides)
    from sftkey.commands.terminal import quiet_libraries, use_all_cores

    use_all_cores()
    quiet_libraries()
    from accelerate import PartialState

    from sftkey.commands.evaluate import print_table
    from sftkey.commands.terminal import say
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
