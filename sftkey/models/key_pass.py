"""Adapters that act on the key alone, and the second forward pass, over the key alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sftkey.errors import ModelError

KEY = "key"


def key_adapters(model: torch.nn.Module) -> list[str]:
    """Name the adapters that act on the key alone: one, or those of a grid."""
    return [name for name in _adapters(model) if name == KEY or name.startswith(f"{KEY}-")]


def context_adapters(model: torch.nn.Module) -> list[str]:
    """Name the adapters of the stages before; there is none on a model that was trained whole."""
    of_key = key_adapters(model)
    return [name for name in _adapters(model) if name not in of_key]


def _adapters(model: torch.nn.Module) -> Iterable[str]:
    return getattr(model, "peft_config", {})  # peft puts it onto the model inside, too


@contextmanager
def acting(model: torch.nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let these LoRA adapters act and no others; what requires gradients stays as it is.

    No names at all: the base model alone.
    """
    layers = _layers(model)
    before = [layer._active_adapter for layer in layers]
    act(model, names)
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def act(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Let these LoRA adapters act from now on."""
    for layer in _layers(model):
        layer._active_adapter = list(names)


def _layers(model: torch.nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def joining(
    model: torch.nn.Module, names: Sequence[str], within: torch.nn.Module | None = None
) -> Iterator[None]:
    """Let key adapters act in a pass beside those of the context.

    Args:
        model: With all its adapters.
        names: None; one, which acts on all rows; or several, of which each acts on its own copy
            of the batch: the first on the first rows, and so on.
        within: The part of the model that is run; by default all of it.
    """
    part = within or model
    if len(names) < 2:
        with acting(part, [*context_adapters(model), *names]):
            yield
        return
    hooks = [
        module.register_forward_hook(partial(_add, names))
        for module in part.modules()
        if isinstance(module, LoraLayer) and names[0] in module.lora_A
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(names: Sequence[str], layer: Any, args: tuple[torch.Tensor, ...], out: Any) -> Any:
    """Add to a layer's output what each adapter gives for its own rows.

    The input is `(N * B, T, in)`, the output `(N * B, T, out)`.
    """
    inputs = args[0]
    if inputs.dim() != 3:
        raise ModelError(
            "stages[].grid",
            f"{type(layer.get_base_layer()).__name__} gets other than (rows, tokens, features)",
            "leave such modules out of the stage's lora.target_modules, or train without a grid",
        )
    # Adapters of smaller rank are filled up with zeros: (N, r, in) and (N, r, out).
    down = pad_sequence([layer.lora_A[name].weight for name in names], batch_first=True)
    up = pad_sequence([layer.lora_B[name].weight.mT for name in names], batch_first=True)
    scaling = torch.tensor([layer.scaling[name] for name in names], device=up.device)
    dropped = layer.lora_dropout[names[0]](inputs.to(down.dtype))
    rows = dropped.reshape(len(names), -1, inputs.shape[-1])  # (N, B * T, in)
    found = rows @ down.mT @ (up * scaling.to(up.dtype)[:, None, None])
    return out + found.reshape(out.shape).to(out.dtype)


Again = Callable[[torch.nn.Module], AbstractContextManager[Any]]


class ConstantContext(DynamicLayer):
    """A layer's keys and values of a context; those of the key are put behind them, and not kept.

    So a layer that is computed anew in the backward pass finds what it found before.

    Args:
        read: The layer's cache, which has read the context.
        copies: How many copies of the rows attend to it, one behind another.
    """

    def __init__(self, read: Any, copies: int = 1) -> None:
        super().__init__()
        self.keys, self.values = read.keys, read.values
        self.is_initialized, self.is_sliding = read.is_initialized, read.is_sliding
        self._read, self._copies = read, copies

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the context's keys and values with those of the key behind them."""
        found: Any = self.keys, self.values
        keys, values = (
            each if self._copies == 1 else each.repeat(self._copies, 1, 1, 1) for each in found
        )
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return what the mask is made from, as the layer that has read the context."""
        sizes: tuple[int, int] = self._read.get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> int:
        """Return the number of context columns."""
        length: int = self._read.get_seq_length()
        return length


def cache_name(model: torch.nn.Module) -> str:
    """Return the argument of the cache, which transformers 5.24 renamed.

    The model is a language model or its decoder, without a wrapper of peft's.
    """
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def join(caches: Sequence[DynamicCache], copies: int = 1) -> DynamicCache:
    """Put the rows of several caches one behind another; shorter contexts are filled up in front.

    The contexts end in their caches' last column; caches are emptied, layer by layer. All rows are
    put so many `copies` of times.
    """
    first = caches[0]
    if len(caches) == 1 and copies == 1:
        return first
    num_context = max(cache.get_seq_length() for cache in caches)
    for number, each in enumerate(first.layers):
        layer: Any = each
        if not layer.is_initialized:
            continue
        parts: list[Any] = [cache.layers[number] for cache in caches]
        width = max(part.keys.shape[-2] for part in parts)
        for name in ("keys", "values"):
            rows = [getattr(part, name) for part in parts]
            rows = [pad(row, (0, 0, width - row.shape[-2], 0)) for row in rows]
            for part in parts:
                setattr(part, name, None)
            joined = torch.cat(rows) if len(rows) > 1 else rows[0]
            setattr(layer, name, joined.repeat(copies, 1, 1, 1) if copies > 1 else joined)
        if layer.is_sliding:
            layer.cumulative_length = num_context
    return first


def is_checkpointed(model: torch.nn.Module) -> bool:
    """Tell whether a pass over keys computes its layers anew in the backward pass."""
    return torch.is_grad_enabled() and any(
        isinstance(each, GradientCheckpointingLayer) and each.gradient_checkpointing
        for each in model.modules()
    )


@contextmanager
def checkpointed(model: torch.nn.Module, again: Again, **settings: Any) -> Iterator[None]:
    """Compute layers anew that are checkpointed, with the cache that upstream would drop for it.

    Args:
        model: Its layers are checkpointed if they are set to be, and gradients are recorded.
        again: Returns what a layer is computed in for the second time, when this context is left.
        settings: Of torch's `checkpoint`.
    """
    switched: list[Any] = [
        each for each in model.modules() if getattr(each, "gradient_checkpointing", False)
    ]
    before = {id(layer): vars(layer).get("forward") for layer in switched}
    for layer in switched:
        layer.gradient_checkpointing = False
        if isinstance(layer, GradientCheckpointingLayer) and torch.is_grad_enabled():
            contexts = partial(_contexts, again, layer)
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, context_fn=contexts, **settings
            )
    try:
        yield
    finally:
        for layer in switched:
            layer.gradient_checkpointing = True
            vars(layer).pop("forward", None)
            if (forward := before[id(layer)]) is not None:
                layer.forward = forward


def _contexts(again: Again, layer: torch.nn.Module) -> tuple[Any, Any]:
    return nullcontext(), _computed_anew(again, layer)


@contextmanager
def _computed_anew(again: Again, layer: Any) -> Iterator[None]:
    """Keep upstream, whose own checkpointing is on again by now, from dropping the cache."""
    layer.gradient_checkpointing = False
    try:
        with again(layer):
            yield
    finally:
        layer.gradient_checkpointing = True


@contextmanager
def shared_keys(attention: GroupedAttention | None = None) -> Iterator[None]:
    """Let the models that attend with SDPA do so without the copies.

    Of a pass that is gone through again `attention` has made the masks.
    """
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention or GroupedAttention()
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # transformers' own shows again


class GroupedAttention:
    """Attends as transformers' SDPA does, in one pass of a model."""

    def __init__(self) -> None:
        self._masks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend; the queries of a group's heads stand in one row, one head behind another.

        `query` is `(B, heads, T, D)`, `key` and `value` are `(B, groups, S, D)`, the mask is
        `(B, 1, T, S)` or none. Returns `(B, T, heads, D)`, and nothing in the place of weights.
        """
        rows, heads, length, _ = query.shape
        groups = key.shape[1]
        mask, biased = attention_mask, kwargs.get("position_bias") is not None
        if mask is None or mask.shape[1] != 1 or biased:
            return sdpa_attention_forward(
                module, query, key, value, mask, dropout, scaling, **kwargs
            )
        found = scaled_dot_product_attention(
            query.reshape(rows, groups, heads // groups * length, -1),
            key,
            value,
            attn_mask=self._grouped(mask, heads // groups, query.dtype),
            dropout_p=dropout,
            scale=scaling,
        )
        return found.reshape(rows, heads, length, -1).transpose(1, 2).contiguous(), None

    def _grouped(self, mask: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the mask of a group's queries as numbers; all layers share the tensor."""
        if id(mask) not in self._masks:
            numbers = mask
            if mask.dtype == torch.bool:
                numbers = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
                numbers = numbers.masked_fill_(~mask, float("-inf"))
            self._masks[id(mask)] = (mask, numbers.repeat(1, 1, size, 1))  # its id stays its own
        return self._masks[id(mask)][1]
