"""What a token's loss weighs beside what `loss_on` says: by its probability, its entropy."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import torch

from sftkey.errors import RecipeError
from sftkey.recipe.schema import Recipe, StageSection

Weighting = Callable[..., torch.Tensor]
NUM_LIKELIEST = 20  # tokens that an entropy is taken over
MOST_ENTROPY = 3.0  # nats of 20 tokens: ln 20, rounded


def dft(segment_ids: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Return each token's probability, through which no gradient flows (arXiv 2508.05629)."""
    return torch.exp(-losses)


def eaft(segment_ids: torch.Tensor, losses: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
    """Return how unsure the model is of each token, from 0 to 1 (arXiv 2601.02151).

    Where it is sure of another token, the data's hardly counts. As in LLaMA-Factory's
    `use_eaft_loss`, with its default alpha of 1: the entropy of the 20 likeliest tokens, over 3.
    """
    return entropies / MOST_ENTROPY


def likeliest_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy among the 20 likeliest tokens of logits `(n, V)`: `(n,)` nats.

    >>> likeliest_entropy(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]).clamp(min=-1e9))
    tensor([0.6931, 0.0000])
    """
    top = logits.topk(min(NUM_LIKELIEST, logits.shape[-1])).values.log_softmax(-1)
    return -(top.exp() * top).sum(-1)


BUILT_IN: dict[str, Weighting | None] = {"nll": None, "dft": dft, "eaft": eaft}


def takes_entropies(weighting: Weighting | None) -> bool:
    """Tell whether a function has a parameter of the name `entropies`."""
    return weighting is not None and "entropies" in inspect.signature(weighting).parameters


def find_weighting(loss: str) -> Weighting | None:
    """Return the function of a stage's `loss`; None for `nll`, which weighs all alike.

    Args:
        loss: `nll`, `dft`, `eaft`, or `module:function`. The function takes the segment of each
            trained token, `(B, T - 1)`, -1 where none is trained, and the losses in nats,
            `(N, B, T - 1)`, without gradient; it returns factors of that shape, or of the
            segments'. A parameter `entropies` gets those of `likeliest_entropy`, shaped as the
            losses.

    Raises:
        RecipeError: There is no such function.

    >>> find_weighting("dft")(torch.tensor([[3]]), torch.tensor([[0.0]]))
    tensor([[1.]])
    """
    if loss in BUILT_IN:
        return BUILT_IN[loss]
    module, _, name = loss.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        hint = "its folder must be on PYTHONPATH, or be installed"
        raise RecipeError(f"loss: {loss}", f"expected a function; {error}", hint) from None
    if not callable(found):
        raise RecipeError(f"loss: {loss}", f"expected a function; got {type(found).__name__}")
    weighting: Weighting = found
    return weighting


def own_losses(recipe: Recipe) -> dict[str, str]:
    """Return the hash of each module that holds a function of a stage's `loss`, for the record.

    Raises:
        RecipeError: There is no such function.
    """
    found = {}
    for stage in recipe.stages:
        if stage.loss not in BUILT_IN:
            weighting = find_weighting(stage.loss)
            source = inspect.getsource(inspect.getmodule(weighting) or Any)
            found[stage.loss] = sha256(source.encode()).hexdigest()
    return found


def stage_settings(stage: StageSection) -> dict[str, Any]:
    """Return what a stage says of its loss, as `KeyTrainer` takes it."""
    return {name: getattr(stage, name) for name in ("loss_on", "loss", "anneal", "kl")}
