"""Recipes: what a run trains, on what, and how it is judged."""

from __future__ import annotations

import re
import string
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from sftkey.errors import did_you_mean, shown
from sftkey.recipe import yaml_io
from sftkey.recipe.upstream import as_number

SEGMENTS = ("prompt", "thinking", "answer_tag", "answer", "end")
GROUPS = ("completion", "key")
SPLIT_RULES = ("think_tags", "boxed", "hash_marks")


def _loss_on(value: Any) -> Any:
    words = ("completion", "key", "answer")
    if isinstance(value, str) and value in words:
        return value
    if not isinstance(value, dict):
        near = did_you_mean(value, words)
        raise ValueError(f"expected completion, key, answer or weights; got {shown(value)}{near}")
    known = (*SEGMENTS, *GROUPS)
    weights = {name: as_number(weight) for name, weight in value.items()}
    for name, weight in weights.items():
        if name not in known:
            near = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise ValueError(f"no segment or group has the name `{name}`{near}")
        if not isinstance(weight, int | float) or isinstance(weight, bool) or weight < 0:
            got = shown(value[name])
            raise ValueError(f"expected 0 or a number above as weight of `{name}`; got {got}")
    if not any(weights.values()):
        raise ValueError(f"expected a weight above 0, else nothing is trained; got {shown(value)}")
    return {name: float(weight) for name, weight in weights.items()}


def _rows(given: Any) -> Any:
    value = as_number(given)
    share = isinstance(value, float) and 0 < value < 1
    count = isinstance(value, int) and value > 0 and value is not True
    if value is None or share or count or (isinstance(value, str) and value):
        return value
    expected = "a number of rows, a share below 1, a split or a file"
    raise ValueError(f"expected {expected}; got {shown(given)}")


def _grid(value: Any) -> Any:
    """Check each list of values; `5e-5` is text to YAML."""
    wanted: dict[str, tuple[str, Any]] = {
        "learning_rate": ("numbers above 0", lambda x: isinstance(x, int | float) and x > 0),
        "r": ("whole numbers above 0", lambda x: isinstance(x, int) and x > 0),
        "seed": ("whole numbers from 0", lambda x: isinstance(x, int) and x >= 0),
    }
    if not isinstance(value, dict) or not value:
        names = ", ".join(wanted)
        raise ValueError(f"expected lists of values for {names}; got {shown(value)}")
    grid = {}
    for name, values in value.items():
        if name not in wanted:
            near = did_you_mean(name, wanted) or f"; there are {', '.join(wanted)}"
            raise ValueError(f"a grid has no `{name}`{near}")
        expected, holds = wanted[name]
        numbers = [as_number(x) for x in values] if isinstance(values, list) else []
        if not numbers or not all(holds(x) and x is not True for x in numbers):
            raise ValueError(f"expected a list of {expected} as {name}; got {shown(values)}")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"expected each {name} once; got {shown(values)}")
        grid[name] = numbers
    return grid


def _run_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value):
        expected = "letters, digits, `.`, `-` and `_`, since a folder gets this name"
        raise ValueError(f"expected {expected}; got {shown(value)}")
    return value


def _stage_name(value: str) -> str:
    if value.lower() == "base":
        raise ValueError("`base` is the model before all stages; write another name")
    if value.isdigit():
        raise ValueError(f"expected a name that isn't a number; got {shown(value)}")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", value):
        expected = "letters, digits, `-` and `_`, since files get this name"
        raise ValueError(f"expected {expected}; got {shown(value)}")
    return value


def _template(value: str) -> str:
    try:
        columns = [name for _, name, _, _ in string.Formatter().parse(value) if name is not None]
    except ValueError as error:
        hint = "a brace of the text itself is written twice"
        raise ValueError(f"expected a template; got {shown(value)}: {error} ({hint})") from None
    if "" in columns:
        raise ValueError(f"expected a column's name in each pair of braces; got {shown(value)}")
    return value


def _split_rule(value: str) -> str:
    if value in SPLIT_RULES:
        return value
    expected = f"{', '.join(SPLIT_RULES)} or a regular expression with groups thinking and answer"
    got = shown(value) + did_you_mean(value, SPLIT_RULES)
    try:
        groups = re.compile(value).groupindex
    except re.error as error:
        raise ValueError(f"expected {expected}; got {got}: {error}") from None
    if not {"thinking", "answer"} <= groups.keys():
        raise ValueError(f"expected {expected}; got {got}")
    return value


def _sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(f"expected 64 hexadecimal digits; got {shown(value)}")
    return value


def _model_name(value: str) -> str:
    if value.startswith("pypi:") and not re.fullmatch(r"pypi:[A-Za-z0-9._-]+==[^\s=]+", value):
        raise ValueError(f"expected pypi:PACKAGE==VERSION; got {shown(value)}")
    return value


def _base_url(value: str) -> str:
    """Take an address; one with a user, a password or a query isn't written into an error."""
    if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", value):
        expected = "http://… or https://…, without a user, a password or a query"
        got = "one with them" if re.search("[@?]", value) else shown(value)
        raise ValueError(f"expected {expected}; got {got}")
    return value


def _variable_name(value: str) -> str:
    """Take the name of an environment variable; a key that stands here is not shown."""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
        expected = "the name of an environment variable in capitals, OPENAI_API_KEY say"
        raise ValueError(f"expected {expected}: the key itself never stands in a recipe")
    return value


Text = Annotated[str, Field(min_length=1)]
Number = Annotated[float, BeforeValidator(as_number)]
Count = Annotated[int, Field(ge=1)]
# YAML has lists where we have pairs, which types that guess at nothing would refuse.
Tags = Annotated[tuple[str, str], Field(strict=False)]
RunName = Annotated[str, AfterValidator(_run_name)]
StageName = Annotated[str, AfterValidator(_stage_name)]
ModelName = Annotated[Text, AfterValidator(_model_name)]
Sha256 = Annotated[str, AfterValidator(_sha256)]
Template = Annotated[str, AfterValidator(_template)]
SplitRule = Annotated[Text, AfterValidator(_split_rule)]
BaseUrl = Annotated[str, AfterValidator(_base_url)]
VariableName = Annotated[str, AfterValidator(_variable_name)]
Rows = Annotated[int | float | str | None, PlainValidator(_rows)]
Grid = Annotated[dict[str, list[Any]], PlainValidator(_grid)]
LossOn = Annotated[
    Literal["completion", "key", "answer"] | dict[str, float], PlainValidator(_loss_on)
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
        return yaml_io.write(self.model_dump(mode="json"))
