"""What a token's loss weighs beside what `loss_on` says: by its probability, by a function."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import torch

from sftkey.errors import RecipeError
from sftkey.recipe.schema import Recipe, StageSection

Weighting = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def dft(segment_ids: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Return each token's probability, through which no gradient flows (arXiv 2508.05629)."""
    return torch.exp(-losses)


def find_weighting(loss: str) -> Weighting | None:
    """Return the function of a stage's `loss`; None for `nll`, which weighs all alike.

    Args:
        loss: `nll`, `dft`, or `module:function`. The function takes the segment of each trained
            token, `(B, T - 1)`, -1 where none is trained, and the losses in nats, `(N, B, T - 1)`,
            without gradient; it returns factors of that shape, or of the segments'.

    Raises:
        RecipeError: There is no such function.

    >>> find_weighting("dft")(torch.tensor([[3]]), torch.tensor([[0.0]]))
    tensor([[1.]])
    """
    if loss in ("nll", "dft"):
        return dft if loss == "dft" else None
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
        if (weighting := find_weighting(stage.loss)) not in (None, dft):
            source = inspect.getsource(inspect.getmodule(weighting) or Any)
            found[stage.loss] = sha256(source.encode()).hexdigest()
    return found


def stage_settings(stage: StageSection) -> dict[str, Any]:
    """Return what a stage says of its loss, as `KeyTrainer` takes it."""
    return {"loss_on": stage.loss_on, "loss": stage.loss, "anneal": stage.anneal}
