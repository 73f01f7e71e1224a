"""A study's file, and the arms that it compares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from sftkey.errors import RecipeError, did_you_mean, shown
from sftkey.recipe.load import load_recipe, read_as
from sftkey.recipe.schema import Count, Number, Recipe, RunName, Section, Text
from sftkey.recipe.stages import KEY_WEIGHT, trainer_setting
from sftkey.recipe.upstream import as_number
from sftkey.recipe.upstream_rules import Finding
from sftkey.recipe.yaml_io import Keys, RecipeSource
from sftkey.recipe.yaml_io import read as read_yaml

Stage = Mapping[str, Any]

COMPLETION: Stage = {"name": "completion", "loss_on": "completion"}
KEY: Stage = {"name": "key", "loss_on": "key"}
WEIGHTED: Stage = {"name": "weighted", "loss_on": {"completion": 1.0, "key": KEY_WEIGHT}}
BALANCED: Stage = {"name": "balanced", "loss_on": {"completion": 1.0, "key": 1.0}, "balanced": True}
ANNEALED: Stage = {
    "name": "annealed",
    "loss_on": {"completion": 1.0, "key": 1.0},
    "anneal": {"key": KEY_WEIGHT},
}
AGAIN: Stage = {"name": "again", "loss_on": "completion"}
KL = 1.0  # in `sftkey_kl`, where none is chosen


OWN_KEYS = ("long", "balanced", "fill")  # of a strategy's stage, beside those of a recipe's
MOST_EPOCHS = 20  # of a stage with `fill`, times those of the recipe's stage


@dataclass(frozen=True)
class Strategy:
    """Stages as a recipe has them; where one has no `trainer`, the recipe's at its place serves.

    Three of their keys are a study's own: `OwnStrategy` says what they do. `matched`: the last
    stage trains as many tokens as a key stage would in its place. `response` has the tags where
    they aren't the recipe's; `overrides` are laid over the recipe, as on the command line.
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
    "sft_twice": Strategy((COMPLETION, AGAIN)),
    "sft_long": Strategy(({**COMPLETION, "long": True},)),
    "sft_matched": Strategy(
        (COMPLETION, {"name": "matched", "loss_on": "completion"}), matched=True
    ),
    "weighted": Strategy((WEIGHTED,)),
    "weighted_long": Strategy(({**WEIGHTED, "long": True},)),
    "weighted_twice": Strategy((WEIGHTED, {**WEIGHTED, "name": "weighted-again"})),
    "weighted_then_sft": Strategy((WEIGHTED, AGAIN)),
    "balanced": Strategy((BALANCED,)),
    "annealed": Strategy((ANNEALED,)),
    "dft": Strategy(({**COMPLETION, "name": "dft", "loss": "dft"},)),
    "eaft": Strategy(({**COMPLETION, "name": "eaft", "loss": "eaft"},)),
    "rft": Strategy(
        (
            COMPLETION,
            {**COMPLETION, "name": "rft", "thinking": "own", "own": {"keep": "right"}},
        )
    ),
    "sftkey_detached": Strategy((COMPLETION, {**KEY, "context": "detached"})),
    "sftkey_own": Strategy((COMPLETION, {**KEY, "thinking": "own"})),
    "sftkey_anchored": Strategy((COMPLETION, {**KEY, "loss_on": {"thinking": 0.1, "key": 1.0}})),
    "sftkey_frozen_long": Strategy((COMPLETION, {**KEY, "context": "frozen", "fill": True})),
    "sftkey_kl": Strategy((COMPLETION, {**KEY, "kl": KL})),
    "sftkey_frozen": Strategy((COMPLETION, {**KEY, "context": "frozen"})),
}


def strategy_recipe(
    file: Path,
    strategy: Strategy,
    overrides: Sequence[str] = (),
    chosen: Sequence[Mapping[str, float]] = (),
) -> Recipe:
    """Return a recipe, its overrides laid over it, with a strategy's stages in place of its own.

    `chosen` is, for the first stages, what is laid over each: `weight`, of the key, `kl`, and
    settings of the trainer.
    """
    laid = [*overrides, *strategy.overrides]
    recipe = load_recipe(file, laid)
    needed = [
        number
        for number, stage in enumerate(strategy.stages, start=1)
        if "trainer" not in stage or stage.get("fill")
    ]
    needed += [2 for stage in strategy.stages if stage.get("long")]
    if len(recipe.stages) < max(needed, default=0):
        raise RecipeError(
            str(file),
            f"expected {max(needed)} stages, whose trainer settings the strategy's stages "
            f"take over; got {len(recipe.stages)}",
            "write a second stage into the recipe",
        )
    stages: list[dict[str, Any]] = []
    for number, stage in enumerate(strategy.stages):
        laid_out = {key: value for key, value in stage.items() if key not in OWN_KEYS}
        settings = stage["trainer"] if "trainer" in stage else recipe.stages[number].trainer
        if not isinstance(settings, Mapping):
            stages.append(laid_out)  # the recipe's check says what is wrong with it
            continue
        laid_out["trainer"] = dict(settings)
        if stage.get("long"):
            setting, lengths = _two_lengths(file, recipe)
            laid_out["trainer"][setting] = sum(lengths)
        if stage.get("fill"):
            laid_out["early_stop"], until_then = _filled(file, recipe, stages)
            laid_out["trainer"] |= until_then
        stages.append(_with_choice(laid_out, chosen[number] if number < len(chosen) else {}))
    replaced: dict[str, Any] = {"stages": stages}
    if strategy.response is not None:
        replaced["response"] = recipe.response.model_dump(mode="json") | dict(strategy.response)
    return load_recipe(file, laid, replaced)


def _filled(
    file: Path, recipe: Recipe, before: Sequence[Stage]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what ends a stage by time and answers, and its trainer's settings until then.

    A schedule that falls to 0 at the last epoch would leave the ones before it half-trained.
    """
    if not before:
        what = "a strategy's stage with `fill: true` goes by the time of an earlier one; got none"
        raise RecipeError(str(file), what, "put a stage on the whole completion before it")
    place = len(before)
    _, (one, this) = _two_lengths(file, recipe, place)
    epochs = trainer_setting(recipe.stage_trainer(recipe.stages[place]), "num_train_epochs")
    most = {"num_train_epochs": MOST_EPOCHS * epochs, "max_steps": -1}
    early_stop = {"as_long_as": before[0]["name"], "times": this / one}
    return early_stop, {**most, "lr_scheduler_type": "constant"}


def _two_lengths(file: Path, recipe: Recipe, place: int = 1) -> tuple[str, list[Any]]:
    """Return the lengths of the recipe's first stage and another, and the setting of them."""
    trainers = [recipe.stage_trainer(recipe.stages[number]) for number in (0, place)]
    steps = [trainer_setting(trainer, "max_steps") for trainer in trainers]
    if all(each > 0 for each in steps):
        return "max_steps", steps
    if any(each > 0 for each in steps):
        raise RecipeError(
            str(file),
            "a strategy with `long` or `fill` goes by the lengths of two stages; expected "
            f"max_steps in both or in none; got {steps}",
            "write num_train_epochs or max_steps into both stages' trainer",
        )
    name = "num_train_epochs"
    return name, [trainer_setting(trainer, name) for trainer in trainers]


def has_weight(stage: Stage) -> bool:
    """Tell whether the key of a stage has a weight of its own beside the completion's."""
    loss_on = stage.get("loss_on")
    weighted = isinstance(loss_on, Mapping) and {"completion", "key"} <= loss_on.keys()
    return weighted and not stage.get("balanced") and not stage.get("anneal")


def _with_choice(stage: dict[str, Any], picked: Mapping[str, float]) -> dict[str, Any]:
    for name, value in picked.items():
        if name == "weight":
            stage["loss_on"] = {**stage["loss_on"], "key": value}
        else:
            (stage if name == "kl" else stage["trainer"])[name] = value
    return stage


Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[Number, Field(gt=0)]


class OwnStrategy(Section):
    """A strategy that isn't built in; its stages stand as in a recipe."""

    stages: Annotated[tuple[dict[str, Any], ...], Field(strict=False, min_length=1)]
    """The arm's stages, as a recipe writes them; one without `trainer` takes the recipe's. With
    `long: true` one trains as long as the recipe's first two together, with `balanced: true` the
    key gets the weight that makes it half of all, with `fill: true` it trains as many epochs as fit
    the time of full SFT in its place."""
    overrides: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Changes to the recipe in this arm, as on the command line."""


class StudyRecipe(Section):
    """A task: a recipe, with changes where several tasks share its file."""

    recipe: Text
    """The recipe's file, relative to the study's."""
    name: RunName | None = None
    """The task's name, where it isn't that of the file."""
    overrides: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Changes to the recipe in this task, as on the command line; they go above the study's."""


def task_name(file: str, name: str | None) -> str:
    """Return the name of a task: its own, or its recipe's file's."""
    return name or Path(file).stem


class Choice(Section):
    """What is chosen on the validation rows, for every stage of every arm from the same values.

    There is one run a value. A loss is measured behind the reference's thinking, so it doesn't see
    what a stage does to the model's own.
    """

    learning_rate: Annotated[tuple[Positive, ...], Field(strict=False)] = ()
    """The learning rates to choose from."""
    weight: Annotated[tuple[Positive, ...], Field(strict=False)] = ()
    """The weights of the key to choose from, in stages whose `loss_on` weighs completion and
    key."""
    kl: Annotated[
        tuple[Positive, ...], Field(strict=False, exclude_if=lambda values: not values)
    ] = ()
    """The values of `kl` to choose from, in stages that have one."""
    seed: Seed = 1
    """The seed of these runs."""
    max_rounds: Annotated[int, Field(ge=0)] = 2
    """How often the values may be widened where the best one is the smallest or the largest: each
    time by one value more, as far from it as the next one is."""
    num_rows: Count = 500
    """How many training rows each of these runs reads."""
    by: Literal["accuracy", "key", "completion"] = "accuracy"
    """Take the value with the most right answers (of equal ones the lower loss of the key), or
    with the lowest validation loss of the `key` or of the `completion`."""


class Study(Section):
    """Arms times seeds over one or more recipes."""

    name: RunName
    """The study's name: it is kept in `runs/NAME`."""
    recipes: Annotated[tuple[StudyRecipe, ...], Field(strict=False, min_length=1)]
    """The tasks: each is a recipe's file, such as `gsm8k.yaml`, or a section."""
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)]
    """The seeds that every arm is trained with."""
    control: Text
    """The arm that every other arm is compared with."""
    primary: Text | None = None
    """The arm whose comparison with the control is tested first, uncorrected; the others are
    tested only if it is shown. Name it before the first result is there."""
    wish: Positive = 5.0
    """The difference in points for which `--plan` says how many seeds would show it."""
    screen: Seed | None = None
    """The seed of a screening before the study: every arm once, answering validation rows. It
    reads no test question and shows nothing; it says which arms are worth more seeds."""
    confirm: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """The arms that the screening lets through to the test questions, beside the control. Until
    some are named here, a study with `screen` ends with the screening."""
    arms: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    """What is compared: names of built-in strategies, or of those below `strategies`, or one of
    your own as it stands: `{name: mine, stages: [...]}`."""
    strategies: dict[RunName, OwnStrategy] = {}  # noqa: RUF012 (pydantic copies it)
    """Strategies of your own, by name."""
    overrides: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Changes to all recipes, as on the command line."""
    choose: Choice | None = None
    """Settings that are chosen on the validation rows before the arms are trained."""

    def screening(self) -> Study:
        """Return the screening as a study of its own: all arms with its seed."""
        assert self.screen is not None
        return self.model_copy(update={"seeds": (self.screen,), "primary": None})

    def confirming(self) -> Study | None:
        """Return what reads test questions; None where the screening must come first."""
        if self.screen is None:
            return self
        kept = tuple(arm for arm in self.arms if arm in (self.control, *self.confirm))
        return self.model_copy(update={"arms": kept}) if self.confirm else None

    def strategy(self, arm: str) -> Strategy:
        """Return the strategy of an arm."""
        own = self.strategies.get(arm)
        return Strategy(own.stages, overrides=own.overrides) if own else STRATEGIES[arm]


def load_study(path: Path) -> Study:
    """Read a study's file and check it; its recipes are read where their arms are made."""
    source = read_yaml(path)
    _name_arms(source)
    for number, recipe in enumerate(recipes := _listed(source.data, "recipes")):
        recipes[number] = {"recipe": recipe} if isinstance(recipe, str) else recipe
    return read_as(Study, source, path, list(_check(source.data)), _known_keys)


def _name_arms(source: RecipeSource) -> None:
    """Move arms that are written out under `arms` to `strategies`, where they have a name."""
    own = source.data.get("strategies", {})
    for number, arm in enumerate(_listed(source.data, "arms")):
        name = arm.get("name") if isinstance(arm, dict) else None
        if not isinstance(name, str) or not isinstance(own, dict) or name in own:
            continue
        own[name] = {key: value for key, value in arm.items() if key != "name"}
        source.data["arms"][number], source.data["strategies"] = name, own
        for keys, origin in list(source.origins.items()):
            if keys[:2] == ("arms", number):
                source.origins[("strategies", name, *keys[2:])] = origin


def _known_keys(keys: Keys) -> Iterable[str]:
    sections: dict[str | int, type[Section]]
    sections = {"recipes": StudyRecipe, "strategies": OwnStrategy, "choose": Choice}
    return (sections[keys[0]] if len(keys) > 1 else Study).model_fields


def _check(data: dict[str, Any]) -> Iterator[Finding]:
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
    yield from _same_tasks(recipes)
    control = data.get("control")
    if isinstance(control, str) and arms and control not in arms:
        yield ("control",), f"expected one of the arms; got '{control}'"
    yield from _check_phases(data, arms, seeds)
    yield from _check_overrides(data)
    primary = data.get("primary")
    if isinstance(primary, str) and arms and primary not in set(arms) - {control}:
        yield ("primary",), f"expected one of the arms beside the control; got '{primary}'"
    for name in own:
        if name in STRATEGIES:
            yield ("strategies", name), "this name is a built-in strategy's; write another"
        elif name not in arms:
            yield ("strategies", name), "no arm has this name"
        stages = _listed(own[name], "stages") if isinstance(own[name], dict) else []
        for number, stage in enumerate(stages):
            for key in OWN_KEYS if isinstance(stage, dict) else ():
                if not isinstance(stage.get(key, False), bool):
                    what = f"expected true or false; got {shown(stage[key])}"
                    yield ("strategies", name, "stages", number, key), what
    choose = data.get("choose")
    if isinstance(choose, dict):
        yield from _check_choice(choose, arms, own)


def _check_phases(
    data: dict[str, Any], arms: Sequence[Any], seeds: Sequence[Any]
) -> Iterator[Finding]:
    """Check that the study's phases fit together."""
    confirm, screen = _listed(data, "confirm"), data.get("screen")
    if screen is not None and screen in seeds:
        yield ("screen",), f"expected a seed that isn't among `seeds`; got {screen}"
    if confirm and screen is None:
        yield ("confirm",), "only after a screening: write `screen`, a seed"
    others = [arm for arm in arms if arm != data.get("control")]
    for number, arm in enumerate(confirm):
        if arm not in others:
            yield ("confirm", number), f"expected one of the arms beside the control; got {arm!r}"
    yield from _twice("confirm", confirm)
    if confirm and data.get("primary", confirm[0]) not in confirm:
        yield ("primary",), "expected one of the arms in `confirm`"


def _check_overrides(data: dict[str, Any]) -> Iterator[Finding]:
    """Refuse overrides of what the study itself gives each cell."""
    recipes, own = _listed(data, "recipes"), data.get("strategies")
    own = own if isinstance(own, dict) else {}
    places: list[tuple[Keys, Any]] = [((), data)]
    places += [(("recipes", number), each) for number, each in enumerate(recipes)]
    places += [(("strategies", name), each) for name, each in own.items()]
    for keys, section in places:
        overrides = _listed(section, "overrides") if isinstance(section, dict) else []
        for number, text in enumerate(overrides):
            key = text.partition("=")[0].strip() if isinstance(text, str) else ""
            if key in ("name", "seed"):
                what = f"the study gives each run its {key}, by its own `name` and `seeds`"
                yield (*keys, "overrides", number), what


def _check_choice(
    choose: dict[str, Any], arms: Sequence[Any], own: Mapping[Any, Any]
) -> Iterator[Finding]:
    if not any(choose.get(name) for name in ("learning_rate", "weight", "kl")):
        what = "expected values of learning_rate, weight or kl to choose from; got none"
        yield ("choose",), what
    for name in ("learning_rate", "weight", "kl"):
        values = [as_number(value) for value in _listed(choose, name)]
        yield from ((("choose", *keys), what) for keys, what in _twice(name, values))
    stages = [stage for arm in arms if arm in STRATEGIES for stage in STRATEGIES[arm].stages]
    for strategy in own.values():
        stages += _listed(strategy, "stages") if isinstance(strategy, dict) else []
    stages = [stage for stage in stages if isinstance(stage, Mapping)]
    if choose.get("weight") and not any(map(has_weight, stages)):
        what = "no stage of the arms weighs completion and key, as the arm `weighted` does"
        yield ("choose", "weight"), what
    if choose.get("kl") and not any(stage.get("kl") for stage in stages):
        yield ("choose", "kl"), "no stage of the arms has a `kl`, as the arm `sftkey_kl` does"


def _same_tasks(recipes: Sequence[Any]) -> Iterator[Finding]:
    """Check that each task has a name of its own: its folders and records have it."""
    names: list[str] = []
    for number, recipe in enumerate(recipes):
        file = recipe.get("recipe") if isinstance(recipe, dict) else None
        if not isinstance(file, str):
            continue
        name = task_name(file, recipe.get("name"))
        lower = str(name).lower()  # some file systems see no other
        if lower in names:
            what = f"another task has the name `{name}`; write {{recipe: {file}, name: OTHER}}"
            yield ("recipes", number), what
        names.append(lower)


def _listed(data: dict[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    return value if isinstance(value, list) else []


def _twice(key: str, values: Sequence[Any]) -> Iterator[Finding]:
    for number, value in enumerate(values):
        if value in values[:number]:
            yield (key, number), f"`{value}` stands twice"
