"""The paper's strategies, and the controls that it lacks: lists of stages, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftkey.errors import RecipeError
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe

Stage = Mapping[str, Any]

COMPLETION: Stage = {"name": "completion", "loss_on": "completion"}
KEY: Stage = {"name": "key", "loss_on": "key"}
WEIGHT = 5.0  # of the key in `weighted`, where none is chosen
WEIGHTED = "weighted"


@dataclass(frozen=True)
class Strategy:
    """Stages as a recipe has them; where one has no `trainer`, the recipe's at its place serves.

    Args:
        stages: In their order.
        response: The tags, where they aren't the recipe's.
        matched: Whether the last stage trains as many tokens as a key stage would in its place.
        overrides: Laid over the recipe, as on the command line.
    """

    stages: tuple[Stage, ...]
    response: Mapping[str, Any] | None = None
    matched: bool = False
    overrides: tuple[str, ...] = ()


# Table 1 of arXiv 2512.21017 has the first four. In the second place all have the key stage's
# steps and schedule, since its trainer serves them; `sft_twice` differs from it in the loss alone.
STRATEGIES: dict[str, Strategy] = {
    # Without tags thinking and answer are lines, and the answer is the last one.
    "sft": Strategy((COMPLETION,), response={"thinking": ["", ""], "answer": ["\n", ""]}),
    "sft_tag": Strategy((COMPLETION,)),
    "key_tag": Strategy((KEY,)),
    "sftkey": Strategy((COMPLETION, KEY)),
    "sft_twice": Strategy((COMPLETION, {"name": "again", "loss_on": "completion"})),
    "sft_matched": Strategy(
        (COMPLETION, {"name": "matched", "loss_on": "completion"}), matched=True
    ),
    WEIGHTED: Strategy(({"name": "weighted", "loss_on": {"completion": 1.0, "key": WEIGHT}},)),
    "dft": Strategy(({"name": "dft", "loss_on": "completion", "loss": "dft"},)),
    "sftkey_detached": Strategy((COMPLETION, {**KEY, "context": "detached"})),
    "sftkey_own": Strategy((COMPLETION, {**KEY, "thinking": "own"})),
    "sftkey_anchored": Strategy((COMPLETION, {**KEY, "loss_on": {"thinking": 0.1, "key": 1.0}})),
    "sftkey_frozen": Strategy((COMPLETION, {**KEY, "context": "frozen"})),
}


def strategy_recipe(
    file: Path,
    strategy: Strategy,
    overrides: Sequence[str] = (),
    chosen: Sequence[Mapping[str, float]] = (),
) -> Recipe:
    """Give a recipe with a strategy's stages in place of its own.

    Args:
        file: The recipe.
        strategy: Its stages.
        overrides: Laid over the recipe before the strategy is.
        chosen: For the first stages what is laid over each: `weight`, of the key, and settings of
            the trainer.

    Raises:
        RecipeError: The recipe is wrong, has no stage at a strategy's place, or can't do it.
    """
    laid = [*overrides, *strategy.overrides]
    recipe = load_recipe(file, laid)
    if len(recipe.stages) < len(strategy.stages) and any(
        "trainer" not in stage for stage in strategy.stages[len(recipe.stages) :]
    ):
        raise RecipeError(
            str(file),
            f"expected {len(strategy.stages)} stages, whose trainer settings the strategy's stages "
            f"take over; got {len(recipe.stages)}",
            "write a second stage into the recipe",
        )
    stages = []
    for number, stage in enumerate(strategy.stages):
        settings = stage["trainer"] if "trainer" in stage else recipe.stages[number].trainer
        picked = chosen[number] if number < len(chosen) else {}
        stages.append(_with_choice({**stage, "trainer": dict(settings)}, picked))
    laid.append(f"stages={json.dumps(stages)}")
    if strategy.response is not None:
        response = {**recipe.response.model_dump(mode="json"), **strategy.response}
        laid.append(f"response={json.dumps(response)}")
    return load_recipe(file, laid)


def _with_choice(stage: dict[str, Any], picked: Mapping[str, float]) -> dict[str, Any]:
    for name, value in picked.items():
        if name == "weight":
            stage["loss_on"] = {**stage["loss_on"], "key": value}
        else:
            stage["trainer"][name] = value
    return stage
