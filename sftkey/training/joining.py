"""Key adapters beside the ones that act already: a single one, or a grid of them in one pass.

The rows of a grid stand one copy of the batch behind another. The frozen weights and the previous
adapters see them as one large batch; only the small products differ from copy to copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import pad

from sftkey.errors import ModelError
from sftkey.key_adapter import acting, context_adapters


@contextmanager
def joining(model: torch.nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let key adapters act in a pass beside those of the context.

    Args:
        model: With all its adapters.
        names: None; one, which acts on all rows; or several, of which each acts on its own copy
            of the batch: the first on the first rows, and so on.
    """
    if len(names) < 2:
        with acting(model, [*context_adapters(model), *names]):
            yield
        return
    hooks = [
        module.register_forward_hook(partial(_add, names))
        for module in model.modules()
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
    down = _stacked([layer.lora_A[name].weight for name in names], dim=0)  # (N, r, in)
    up = _stacked([layer.lora_B[name].weight for name in names], dim=1)  # (N, out, r)
    scaling = torch.tensor([layer.scaling[name] for name in names], device=up.device)
    dropped = layer.lora_dropout[names[0]](inputs.to(down.dtype))
    rows = dropped.reshape(len(names), -1, inputs.shape[-1])  # (N, B * T, in)
    found = rows @ down.mT @ (up * scaling.to(up.dtype)[:, None, None]).mT
    return out + found.reshape(out.shape).to(out.dtype)


def _stacked(weights: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Stack matrices, those of smaller rank (along `dim`) filled up with zeros."""
    rank = max(weight.shape[dim] for weight in weights)
    filled: Callable[[int], tuple[int, ...]] = (
        (lambda lacking: (0, 0, 0, lacking)) if dim == 0 else (lambda lacking: (0, lacking))
    )
    return torch.stack([pad(each, filled(rank - each.shape[dim])) for each in weights])
