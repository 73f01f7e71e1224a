"""How far a stage has moved from its start: a divergence from the weights that it began with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch.func import functional_call
from torch.nn.functional import kl_div, pad
from transformers import PreTrainedModel

from sftkey.data.response import Segment
from sftkey.training.detached import without_dropout
from sftkey.training.losses import Beside, Logits, in_tiles


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
    once more. Whatever isn't trained is read from the model itself.

    Args:
        model: Not wrapped, before the first step and before a checkpoint is loaded.
        num_logits: The size of the vocabulary.
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
        with without_dropout(self.model):
            found: torch.Tensor = functional_call(
                _Calling(self.model, function), self.weights, args
            )
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
        model = self.model
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
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
