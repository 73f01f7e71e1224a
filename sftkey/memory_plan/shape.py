"""The shape of a decoder: how large every weight is, and what its layers are made of."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftkey.errors import ModelError
from sftkey.models.source import model_source
from sftkey.recipe.schema import ModelSection


@dataclass(frozen=True)
class Traits:
    """What the layers of a family have beside attention and a gated MLP.

    Args:
        norms: `before` attention and MLP, `after` both, or `around` them.
        head_norms: Of queries and keys: for each `head`, over the `whole` width, or `none`.
        qkv_bias: Queries, keys and values have a bias, whatever the config says.
        fused: Queries, keys and values are one matrix, and so are the MLP's gate and up.
    """

    norms: str = "before"
    head_norms: str = "none"
    qkv_bias: bool = False
    fused: bool = False


FAMILIES = {
    "llama": Traits(),
    "mistral": Traits(),
    "granite": Traits(),
    "smollm3": Traits(),
    "gemma": Traits(),
    "qwen2": Traits(qkv_bias=True),
    "qwen3": Traits(head_norms="head"),
    "gemma2": Traits(norms="around"),
    "gemma3_text": Traits(norms="around", head_norms="head"),
    "olmo2": Traits(norms="after", head_norms="whole"),
    "phi3": Traits(fused=True),
}


@dataclass(frozen=True)
class Linear:
    """A linear module of a layer; its name is that below `model.layers.N`."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def numel(self) -> int:
        """Give the number of its weights, without the bias."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder whose layers are alike.

    Args:
        family: The config's `model_type`.
        config: The config's fields, with the defaults of the family.
        linears: Of one layer.
    """

    family: str
    config: dict[str, Any]
    linears: tuple[Linear, ...]

    @property
    def traits(self) -> Traits:
        """What is special in the family."""
        return FAMILIES[self.family]

    @property
    def hidden(self) -> int:
        """The width of what goes from layer to layer."""
        return int(self.config["hidden_size"])

    @property
    def wide(self) -> int:
        """The width inside the MLP."""
        return int(self.config["intermediate_size"])

    @property
    def layers(self) -> int:
        """The number of layers."""
        return int(self.config["num_hidden_layers"])

    @property
    def vocabulary(self) -> int:
        """The number of tokens."""
        return int(self.config["vocab_size"])

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return int(self.config["num_attention_heads"])

    @property
    def groups(self) -> int:
        """The number of heads of keys, and of values."""
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head(self) -> int:
        """The width of a head."""
        return int(self.config.get("head_dim") or self.hidden // self.heads)

    @property
    def queries(self) -> int:
        """The width of all queries."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """The width of all keys, and that of all values."""
        return self.groups * self.head

    @property
    def tied(self) -> bool:
        """The output head is the embeddings."""
        return bool(self.config["tie_word_embeddings"])

    @property
    def most_tokens(self) -> int:
        """The longest row that its positions reach."""
        return int(self.config.get("max_position_embeddings") or 2**20)

    @property
    def norms(self) -> tuple[int, ...]:
        """The widths of a layer's norms of the whole width: each keeps its input."""
        return (self.hidden,) * (4 if self.traits.norms == "around" else 2)

    @property
    def head_norms(self) -> tuple[int, ...]:
        """The sizes of the weights that queries and keys are normalized with."""
        return {
            "none": (),
            "head": (self.head, self.head),
            "whole": (self.queries, self.keys),
        }[self.traits.head_norms]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens each layer's attention looks back at; None: at all."""
        window = self.config.get("sliding_window")
        types = self.config.get("layer_types") or [
            "sliding_attention" if self._slides(layer) else "" for layer in range(self.layers)
        ]
        return tuple(window if each == "sliding_attention" else None for each in types)

    def _slides(self, layer: int) -> bool:
        """Tell it of a layer where the config doesn't list them: as transformers' class does."""
        config = self.config
        if "use_sliding_window" in config:
            return bool(config["use_sliding_window"]) and layer >= config.get(
                "max_window_layers", 0
            )
        if self.family == "gemma2":
            return (layer + 1) % 2 > 0
        if self.family == "gemma3_text":
            return (layer + 1) % int(config.get("sliding_window_pattern", 6)) > 0
        return config.get("sliding_window") is not None

    @property
    def numel_embeddings(self) -> int:
        """Count the weights of the embeddings, and of a head of its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def numel_linear(self) -> int:
        """Count the weights of all linear modules but the head; biases aside."""
        return self.layers * sum(each.numel for each in self.linears)

    @property
    def numel_small(self) -> int:
        """Count the weights of the norms, and the biases."""
        biases = sum(each.outputs for each in self.linears if each.bias)
        return self.layers * (sum(self.norms) + sum(self.head_norms) + biases) + self.hidden

    @property
    def numel(self) -> int:
        """Count all weights."""
        return self.numel_embeddings + self.numel_linear + self.numel_small


def read_shape(section: ModelSection) -> ModelShape:
    """Read the shape of a recipe's model from its config.

    Raises:
        ModelError: There is no such model or config, or its layers aren't of a kind known here.
    """
    file = model_source(section).folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(section.name_or_path, f"its config.json can't be read: {error}") from error
    return shape_of(config, section.name_or_path)


def shape_of(config: dict[str, Any], name: str) -> ModelShape:
    """Give the shape that a config describes.

    Raises:
        ModelError: Its layers aren't of a kind known here, or its weights come quantized.
    """
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise ModelError(
            name,
            f"its memory can't be planned: the layers of {family} aren't known here",
            f"leave --gpu out; known are {', '.join(FAMILIES)}",
        )
    if "quantization_config" in config:
        raise ModelError(
            name,
            "its memory can't be planned: the weights come quantized",
            "leave --gpu out, or take the unquantized model",
        )
    whole = {**_defaults(family), **config}
    shape = ModelShape(family, whole, ())
    return ModelShape(family, whole, tuple(_linears(shape)))


def _linears(shape: ModelShape) -> Iterator[Linear]:
    """Give the linear modules of one layer."""
    hidden, wide, queries, keys = shape.hidden, shape.wide, shape.queries, shape.keys
    known = _defaults(shape.family)  # a field that the class doesn't know changes nothing
    bias = bool("attention_bias" in known and shape.config["attention_bias"])
    mlp_bias = bool("mlp_bias" in known and shape.config["mlp_bias"])
    of_qkv = bias or shape.traits.qkv_bias
    if shape.traits.fused:
        yield Linear("self_attn.qkv_proj", hidden, queries + 2 * keys)
        yield Linear("self_attn.o_proj", queries, hidden)
        yield Linear("mlp.gate_up_proj", hidden, 2 * wide)
        yield Linear("mlp.down_proj", wide, hidden)
        return
    yield Linear("self_attn.q_proj", hidden, queries, of_qkv)
    yield Linear("self_attn.k_proj", hidden, keys, of_qkv)
    yield Linear("self_attn.v_proj", hidden, keys, of_qkv)
    yield Linear("self_attn.o_proj", queries, hidden, bias)
    yield Linear("mlp.gate_proj", hidden, wide, mlp_bias)
    yield Linear("mlp.up_proj", hidden, wide, mlp_bias)
    yield Linear("mlp.down_proj", wide, hidden, mlp_bias)


@functools.cache
def _defaults(family: str) -> dict[str, Any]:
    """Read the defaults of the family's config class from the installed transformers."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    folder = family.removesuffix("_text")
    file = Path(spec.origin).parent / "models" / folder / f"configuration_{folder}.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for body in (each.body for each in tree.body if isinstance(each, ast.ClassDef)):
        fields: dict[str, Any] = {}
        for statement in body:
            match statement:
                case ast.Assign(targets=[ast.Name(id="model_type")], value=ast.Constant() as value):
                    fields["model_type"] = value.value
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant() as value):
                    fields[name] = value.value
        if fields.pop("model_type", None) == family:
            return fields
    raise LookupError(f"{file.name} has no config of {family}")
