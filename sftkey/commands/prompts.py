"""Write the prompts of a recipe's or a run's rows, for engines that generate elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sftkey.errors import RecipeError
from sftkey.recipe.load import load_recipe
from sftkey.training.run_folder import run_recipe

SPLITS = ("train", "validation", "test")


def prompts(
    target: Path, overrides: Sequence[str] = (), split: str | None = None, stage: str | None = None
) -> None:
    """Print one JSON object a question: `index`, `turn`, `prompt` (text) and `prompt_ids`.

    Args:
        target: A recipe's file, or a run's folder.
        overrides: Changes to a recipe.
        split: `train`, `validation` or `test`; default train for a recipe, and for a run the test
            questions that its stages are asked.
        stage: One over own thinking: its `own.hint` stands in the prompts.

    Raises:
        SFTKeyError: Whatever of the recipe, its tokenizer or its data can't be used.
    """
    run = target.is_dir()
    if split not in (None, *SPLITS):
        raise RecipeError("--split", f"expected one of {', '.join(SPLITS)}; got {split!r}")
    if run and overrides:
        raise RecipeError(str(target), "a run's recipe can't be changed", "give a recipe's file")
    recipe = run_recipe(target) if run else load_recipe(target, overrides)
    named = {each.name: each for each in recipe.stages}
    if stage is not None and stage not in named:
        expected = ", ".join(named)
        raise RecipeError("--stage", f"expected one of {expected}; got {stage!r}")
    from sftkey.data.prepare import prepare
    from sftkey.models.loading import load_tokenizer
    from sftkey.training.own_thinking import with_hint

    prepared = prepare(recipe, load_tokenizer(recipe.model), need_test=False)
    rows = {
        "train": prepared.train_examples,
        "validation": prepared.validation_examples,
        "test": prepared.questions(recipe) if run else prepared.test,
    }[split or ("test" if run else "train")]
    hinted = stage is not None and named[stage].own_thinking.hint
    for example in rows:
        asked = (with_hint(example) if hinted else example).prompt
        row = {
            "index": example.index,
            "turn": example.turn,
            "prompt": prepared.renderer.prompt_text(asked),
            "prompt_ids": prepared.renderer.prompt_ids(asked),
        }
        print(json.dumps(row, ensure_ascii=False))
