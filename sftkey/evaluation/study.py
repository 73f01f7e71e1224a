"""The file of a study: arms and seeds over one or more recipes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sftkey.errors import Problem, RecipeError, did_you_mean
from sftkey.recipe import yaml_io as yaml_source
from sftkey.recipe.messages import found_by_models
from sftkey.recipe.schema import Count, Number, Recipe, RunName, Text
from sftkey.recipe.yaml_io import Keys
from sftkey.strategies import STRATEGIES, WEIGHTED, Strategy, strategy_recipe

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[Number, Field(gt=0)]


class Section(BaseModel):
    """A part of the file, as strict as a recipe's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class OwnStrategy(Section):
    """A strategy that isn't built in; its stages stand as in a recipe."""

    stages: Annotated[tuple[dict[str, Any], ...], Field(strict=False, min_length=1)]
    overrides: Annotated[tuple[Text, ...], Field(strict=False)] = ()


class Choice(Section):
    """What is chosen on the validation rows: for every stage of every arm from the same grid.

    One run a value, on one seed and a part of the training rows. The value is taken whose stage
    ends with the best `by`: Acc of the answers after the model's own thinking (of equal ones that
    with the lower loss of the key), or the validation loss of the key or of the whole completion.
    A loss reads the reference's thinking, so that it doesn't see what a stage does to the model's.
    """

    learning_rate: Annotated[tuple[Positive, ...], Field(strict=False)] = ()
    weight: Annotated[tuple[Positive, ...], Field(strict=False)] = ()  # of the key in `weighted`
    seed: Seed = 1
    num_rows: Count = 500
    by: Literal["accuracy", "key", "completion"] = "accuracy"


class Study(Section):
    """Arms times seeds over one or more recipes."""

    name: RunName
    recipes: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)]
    control: Text
    arms: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    strategies: dict[RunName, OwnStrategy] = {}
    overrides: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    choose: Choice | None = None

    def strategy(self, arm: str) -> Strategy:
        """Give the strategy of an arm."""
        own = self.strategies.get(arm)
        return Strategy(own.stages, overrides=own.overrides) if own else STRATEGIES[arm]


_SECTIONS: dict[str | int, type[Section]] = {"strategies": OwnStrategy, "choose": Choice}


def load_study(path: Path) -> Study:
    """Read a study's file and check it; its recipes are read where their arms are made.

    Raises:
        RecipeError: With every problem of the file.
    """
    source = yaml_source.read(path)
    study, findings = None, list(_check(source.data))
    try:
        study = Study.model_validate(source.data)
    except ValidationError as error:
        findings += found_by_models(error, _known_keys)
    problems = source.problems + [source.problem(*each) for each in findings]
    if study is None or problems:
        raise RecipeError(str(path), sorted(problems, key=lambda each: each.line or math.inf))
    return study


def _known_keys(keys: Keys) -> Iterable[str]:
    return (_SECTIONS[keys[0]] if len(keys) > 1 else Study).model_fields


def _check(data: dict[str, Any]) -> Iterator[tuple[Keys, str]]:
    """Check what no field can tell alone; what has the wrong type is left to the models."""
    arms, seeds, recipes = (_listed(data, key) for key in ("arms", "seeds", "recipes"))
    own = data.get("strategies")
    own = own if isinstance(own, dict) else {}
    known = [*STRATEGIES, *own]
    for number, arm in enumerate(arms):
        if isinstance(arm, str) and arm not in known:
            near = did_you_mean(arm, known) or f"; there are {', '.join(known)}"
            yield ("arms", number), f"no strategy has the name `{arm}`{near}"
    yield from _twice("arms", arms)
    yield from _twice("seeds", seeds)
    yield from _twice("recipes", [Path(each).stem for each in recipes if isinstance(each, str)])
    control = data.get("control")
    if isinstance(control, str) and arms and control not in arms:
        yield ("control",), f"expected one of the arms; got '{control}'"
    for name in own:
        if name in STRATEGIES:
            yield ("strategies", name), "this name is a built-in strategy's; write another"
        elif name not in arms:
            yield ("strategies", name), "no arm has this name"
    choose = data.get("choose")
    if isinstance(choose, dict):
        yield from _check_choice(choose, arms)


def _check_choice(choose: dict[str, Any], arms: Sequence[Any]) -> Iterator[tuple[Keys, str]]:
    if not choose.get("learning_rate") and not choose.get("weight"):
        yield ("choose",), "expected values of learning_rate or weight to choose from; got none"
    if choose.get("weight") and WEIGHTED not in arms:
        yield ("choose", "weight"), f"only the arm `{WEIGHTED}` has a weight to choose"


def _listed(data: dict[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    return value if isinstance(value, list) else []


def _twice(key: str, values: Sequence[Any]) -> Iterator[tuple[Keys, str]]:
    for number, value in enumerate(values):
        if value in values[:number]:
            yield (key, number), f"`{value}` stands twice"


def arm_recipe(
    study: Study,
    file: Path,
    arm: str,
    seed: int,
    chosen: Sequence[Mapping[str, float]] = (),
    num_stages: int | None = None,
) -> Recipe:
    """Give the recipe of an arm's cell.

    Args:
        study: The study.
        file: The recipe of the task.
        arm: One of the study's.
        seed: One of the study's.
        chosen: What was chosen for the arm's stages, in their order.
        num_stages: Take the first ones alone.

    Raises:
        RecipeError: The recipe is wrong, or can't do what the arm wants.
    """
    strategy = study.strategy(arm)
    strategy = replace(strategy, stages=strategy.stages[:num_stages])
    name = f"{study.name}-{file.stem}-{arm}-seed{seed}"
    overrides = [*study.overrides, f"name={name}", f"seed={seed}"]
    try:
        return strategy_recipe(file, strategy, overrides, chosen)
    except RecipeError as error:
        problems = [
            Problem("", each.what, each.line) if "stages=[" in each.where else each
            for each in error.problems
        ]
        raise RecipeError(f"{file}, arm {arm}", problems, error.hint) from None
