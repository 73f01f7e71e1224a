"""What a stage's loss has beside `loss_on`: weights of tokens, and a divergence from its start."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from peft import PeftModel
from torch.func import functional_call
from torch.nn.functional import kl_div, pad
from transformers import PreTrainedModel

from sftkey.data.response import Segment
from sftkey.errors import RecipeError
from sftkey.generation.generate import inferring
from sftkey.models.adapters import without_adapters
from sftkey.recipe.schema import Recipe
from sftkey.training.losses import Beside, Logits, in_tiles

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


class _Calling(torch.nn.Module):
    """Calls a function; what it reads of the model can be replaced with `functional_call`."""

    def __init__(self, model: torch.nn.Module, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args: Any) -> torch.Tensor:
        return self.function(*args)


class StageStart:
    """A copy of what a stage trains, as the stage starts.

    Of a stage with adapters that is little; of one that trains all weights it is the whole model
    once more. Whatever isn't trained is read from the model itself, which isn't wrapped, and is
    before its first step and before a checkpoint is loaded.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, num_logits: int) -> None:
        self.model, self.num_logits = model, num_logits
        self.weights = {
            f"model.{name}": parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def call(self, function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        """Call a function while the model has the weights of the start, without dropout."""
        calling = _Calling(self.model, function)
        with inferring(self.model):
            found: torch.Tensor = functional_call(calling, self.weights, args)
        return found

    def divergence(self, inputs: Mapping[str, Any], segment_ids: torch.Tensor) -> Beside:
        """Return what computes KL(start ‖ now) where a token of the thinking is predicted, in nats.

        Over the whole vocabulary, a tile of positions at a time: of the start only hidden states
        are kept until then.

        Args:
            inputs: What the model takes; `labels` are left aside.
            segment_ids: `(B, T)`.
        """
        places = pad(thinking_targets(inputs, segment_ids), (0, 1))
        start = self.call(self._states, inputs, places)

        def compute(states: torch.Tensor, logits: Logits) -> torch.Tensor:
            return in_tiles(partial(self._divergence, logits), self.num_logits, states, start)

        return Beside(compute, places)

    def _states(self, inputs: Mapping[str, Any], places: torch.Tensor) -> torch.Tensor:
        base = without_adapters(self.model)
        read = {name: value for name, value in inputs.items() if name not in ("labels", "beside")}
        states: torch.Tensor = base.base_model(**read, use_cache=False).last_hidden_state
        return states[places.to(states.device)]

    def _divergence(self, logits: Logits, now: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Return `(n,)` from hidden states `(n, H)` of both."""
        before = self.call(logits, start).log_softmax(-1)
        after = logits(now).log_softmax(-1)
        return kl_div(after, before, reduction="none", log_target=True).sum(-1)


def thinking_targets(inputs: Mapping[str, Any], segment_ids: torch.Tensor) -> torch.Tensor:
    """Tell which tokens belong to the thinking and have one before them in their row.

    Args:
        inputs: With `position_ids` where rows are packed.
        segment_ids: `(B, T)`.

    Returns:
        `(B, T - 1)`: entry `t` is of the token at `t + 1`.

    >>> thinking_targets({}, torch.tensor([[0, 1, 1, 2, 3, 4]]))
    tensor([[ True,  True, False, False, False]])
    """
    found = segment_ids[:, 1:] == Segment.THINKING
    if "position_ids" in inputs:
        found &= inputs["position_ids"][:, 1:] > 0
    return found
