"""Recipes: what a run trains, on what, and how it is judged.

`load_recipe` is the one way in: what it gives has every key known, every value of its type, and
every default filled in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sftkey import yaml_source
from sftkey.errors import RecipeError
from sftkey.recipe_checks import check_together, check_upstream
from sftkey.recipe_errors import found_by_models
from sftkey.recipe_fields import (
    GROUPS,
    SEGMENTS,
    BaseUrl,
    Count,
    Grid,
    LossOn,
    ModelName,
    Number,
    Rows,
    RunName,
    Sha256,
    SplitRule,
    StageName,
    Tags,
    Template,
    Text,
    VariableName,
)
from sftkey.yaml_source import Keys

__all__ = [
    "GROUPS",
    "SEGMENTS",
    "DataSection",
    "EvalSection",
    "JudgeSection",
    "LossOn",
    "ModelSection",
    "Recipe",
    "ResponseSection",
    "StageSection",
    "changed_keys",
    "load_recipe",
]


class Section(BaseModel):
    """A part of a recipe: it doesn't change, knows all its keys, and guesses at no types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The model to start from, and how its weights are held."""

    name_or_path: ModelName
    file: Text | None = None
    sha256: Sha256 | None = None
    revision: Text | None = None
    quantization: Literal["nf4", "none"] = "nf4"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = None
    attn_implementation: Text = "sdpa"
    chat_template: Text | None = None
    chat_template_kwargs: dict[str, Any] = {}
    adapter: Text | None = None


class DataSection(Section):
    """Where the examples come from, how they are split, and how long they may be."""

    source: Text
    config: Text | None = None
    task: Text | None = None
    task_options: dict[str, Any] = {}
    num_rows: Count | None = None
    prompt: Template | None = None
    thinking: Template | None = None
    answer: Template | None = None
    response: Text | None = None
    split_rule: SplitRule | None = None
    system: str | None = None
    train: Text = "train"
    validation: Rows = None
    test: Rows = None
    unsplit_rows: Literal["error", "drop"] = "error"
    overlap: Literal["error", "drop"] = "error"
    max_length: Count = 1024
    too_long: Literal["drop", "trim_thinking", "error"] = "drop"
    packing: bool = False


class ResponseSection(Section):
    """What stands around thinking and answer."""

    frame: Literal["chat", "plain"] = "chat"
    thinking: Tags = ("<Thinking>\n", "\n</Thinking>")
    answer: Tags = ("\n<Answer>\n", "\n</Answer>")
    turns: Literal["last", "all"] = "last"
    end: Text | None = None


class OwnThinking(Section):
    """How a stage's model writes the thinkings that the stage then reads."""

    samples: Count = 1
    temperature: Annotated[Number, Field(ge=0)] = 0.7
    keep: Literal["all", "wrong", "mixed"] = "all"


class StageSection(Section):
    """One training stage: which tokens its loss is on, and what its trainer does otherwise.

    `context: detached` lets no gradient through prompt and thinking. `frozen` trains an adapter of
    its own that acts on the key alone: `lora` is its shape (default the recipe's), and `grid` has
    lists of values, of which every combination is trained beside the others. `thinking: own` puts
    what the model writes itself before the reference's answer (`own` says how). `loss: dft` weighs
    every token's loss with its probability (arXiv 2508.05629).
    """

    name: StageName
    loss_on: LossOn
    context: Literal["exact", "detached", "frozen"] = "exact"
    lora: dict[str, Any] | None = None
    grid: Grid | None = None
    thinking: Literal["reference", "own"] = "reference"
    own: OwnThinking | None = None
    loss: Literal["nll", "dft"] = "nll"
    trainer: dict[str, Any] = {}

    @property
    def own_thinking(self) -> OwnThinking:
        """How own thinkings are written: what the recipe says, or the defaults."""
        return self.own or OwnThinking()

    @property
    def rows_each(self) -> int:
        """How many rows one training row becomes; fewer where own thinkings aren't kept."""
        return self.own_thinking.samples if self.thinking == "own" else 1


class JudgeSection(Section):
    """A second grader: a model behind an OpenAI-compatible endpoint.

    `api_key_env` names the environment variable that holds the key; null: the server needs none.
    `timeout_seconds` is of one request.
    """

    base_url: BaseUrl
    model: Text
    api_key_env: VariableName | None = "OPENAI_API_KEY"
    max_concurrent: Count = 4
    timeout_seconds: Annotated[Number, Field(gt=0)] = 60.0


class EvalSection(Section):
    """How the model is judged before the stages and after each.

    Without a judge the key isn't written, so that a resolved recipe is as it was before judges.
    """

    num_questions: Count = 200
    max_new_tokens: Count = 512
    grader: Literal["number", "choice", "exact", "math"] = "exact"
    batch_size: Count = 16
    temperature: Annotated[Number, Field(ge=0)] = 0.0
    alpha: Annotated[Number, Field(ge=0, le=1)] = 0.7
    judge: Annotated[JudgeSection | None, Field(exclude_if=lambda judge: judge is None)] = None


class Recipe(Section):
    """A whole recipe: `trainer` and `lora` hold upstream's own fields."""

    name: RunName
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    model: ModelSection
    lora: dict[str, Any] | None
    data: DataSection
    response: ResponseSection = ResponseSection()
    trainer: dict[str, Any] = {}
    stages: Annotated[tuple[StageSection, ...], Field(strict=False, min_length=1)]
    eval: EvalSection = EvalSection()

    def stage_trainer(self, stage: StageSection) -> dict[str, Any]:
        """Give the shared trainer settings with the stage's own laid over."""
        return {**self.trainer, **stage.trainer}

    def to_yaml(self) -> str:
        """Write the resolved recipe, defaults included: a valid recipe that gives the same run."""
        return yaml_source.write(self.model_dump(mode="json"))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, lay the overrides (`stages.key.trainer.max_steps=9`) over it, check it.

    Raises:
        RecipeError: With every problem of the file and the overrides.
    """
    source = yaml_source.read(Path(path))
    for text in overrides:
        yaml_source.override(source, text)
    findings = [*check_upstream(source.data), *check_together(source.data)]
    recipe = None
    try:
        recipe = Recipe.model_validate(source.data)
    except ValidationError as error:
        findings += found_by_models(error, _known_keys)
    problems = source.problems + [source.problem(*finding) for finding in findings]
    if recipe is None or problems:
        raise RecipeError(str(path), sorted(problems, key=lambda each: each.line or math.inf))
    return recipe


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """Give the keys, as overrides write them, whose values differ between two recipes."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    if [stage.name for stage in old.stages] == [stage.name for stage in new.stages]:
        for plain in (before, after):
            plain["stages"] = {stage["name"]: stage for stage in plain["stages"]}
    return list(_changed(before, after))


def _changed(old: dict[str, Any], new: dict[str, Any], path: str = "") -> Iterator[str]:
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changed(before, after, f"{path}{key}.")
        elif before != after or (key in old) != (key in new):
            yield path + key


_SECTIONS: dict[str | int, type[Section]] = {
    "model": ModelSection,
    "data": DataSection,
    "response": ResponseSection,
    "stages": StageSection,
    "eval": EvalSection,
}


def _known_keys(keys: Keys) -> Iterable[str]:
    if keys[0] == "stages" and "own" in keys[:-1]:
        return OwnThinking.model_fields
    if keys[:2] == ("eval", "judge") and len(keys) > 2:
        return JudgeSection.model_fields
    return (_SECTIONS[keys[0]] if len(keys) > 1 else Recipe).model_fields
