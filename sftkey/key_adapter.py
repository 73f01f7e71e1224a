"""A second adapter that acts on the key alone, beside what wrote the thinking.

After a stage with `context: frozen` a model has two kinds of adapters: those of the stage before,
which act on all tokens, and the key's, which acts from the last token of the thinking on. peft
holds both; which of them act in a pass is said here, without a change to what is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

KEY = "key"


def key_adapters(model: torch.nn.Module) -> list[str]:
    """Name the adapters that act on the key alone: one, or those of a grid."""
    return [name for name in _adapters(model) if _is_of_key(name)]


def context_adapters(model: torch.nn.Module) -> list[str]:
    """Name the adapters of the stages before; there is none on a model that was trained whole."""
    return [name for name in _adapters(model) if not _is_of_key(name)]


def has_key_adapter(model: torch.nn.Module) -> bool:
    """Tell whether a frozen key stage wrote one."""
    return bool(key_adapters(model))


def _is_of_key(name: str) -> bool:
    return name == KEY or name.startswith(f"{KEY}-")


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
