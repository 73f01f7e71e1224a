"""The shape of a decoder: how large every weight is, and what its layers are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
