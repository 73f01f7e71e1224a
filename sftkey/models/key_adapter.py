"""Adapters that act on the key alone: which layers hold them, where they act, several at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.utils.rnn import pad_sequence

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

    Args:
        model: With its adapters, or the model below them.
        names: None at all: the base model alone.
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
