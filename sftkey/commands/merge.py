"""Merge what a stage has trained into its base."""

from __future__ import annotations

import sys
from pathlib import Path

from sftkey.errors import RunError
from sftkey.recipe.schema import Recipe
from sftkey.training.run_folder import run_recipe, trained_stage


def merge(folder: Path, output: Path, stage: str | None = None) -> None:
    """Write a model folder that answers in other programs as the stage does in its run.

    The stage's adapter is merged into the unquantized base; a model that was trained whole is
    copied. The chat template and the generation config hold what the recipe says beside weights.

    Args:
        folder: A run folder.
        output: A new folder.
        stage: A trained stage; default the last one that is trained.

    Raises:
        SFTKeyError: The stage has no adapter that can be merged, or the merge failed.
    """
    recipe = run_recipe(folder)
    number = trained_stage(folder, recipe, stage)
    from sftkey.training.run_folder import Ledger

    ledger = Ledger(folder, recipe, main=False)
    if number == 0:
        raise RunError(str(folder), "--stage: the base has no adapter to merge")
    adapter = ledger.adapter(number - 1)
    _refuse_frozen(folder, recipe, number, adapter)
    from sftkey.commands.terminal import quiet_libraries, use_all_cores

    use_all_cores()
    quiet_libraries()
    from sftkey.sharing import merging

    if recipe.lora is None:
        merging.write_whole(recipe, adapter, output)
        print(output)
        return
    found = merging.merge(recipe, adapter, output)
    print(
        f"{output}: {adapter} merged into {recipe.model.name_or_path} in {found.dtype}; on a probe "
        f"the adapter changes logits by up to {found.effect:.3g}, the merged model is within "
        f"{found.distance:.3g} of it",
        file=sys.stderr,
    )
    print(output)


def _refuse_frozen(folder: Path, recipe: Recipe, number: int, adapter: Path) -> None:
    """Refuse an adapter that doesn't act on all tokens."""
    stage = recipe.stages[number - 1]
    if stage.context == "frozen":
        before = recipe.stages[number - 2].name if number > 1 else None
        context = f"merge what it stands on with --stage {before}" if before else "take the base"
        raise RunError(
            str(folder),
            f"{stage.name} was trained with `context: frozen`: its adapter acts from the "
            "thinking's last token on, merged weights would act on every token and change the "
            "thinking",
            f"{context}, and serve {adapter} beside it as activated LoRA, where a server has that; "
            "`sftkey generate` and the lines in docs/library.md switch by themselves",
        )
