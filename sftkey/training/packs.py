"""Whether a model keeps the rows of a pack apart."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel

from sftkey.errors import ModelError
from sftkey.training.detached import KEYS_AND_VALUES

PROBE = (9, 7)  # tokens of two rows
# How far, as a share, rounding moves what a row's tokens become; other rows move it much farther.
TOLERANCE, TOLERANCE_OF_HALF = 1e-3, 0.1


def refuse_mixed_rows(model: PreTrainedModel | PeftModel, probe: bool = True) -> None:
    """Refuse a model that lets a row of a pack see the rows before it.

    Args:
        model: The model as it was loaded, with adapters or without.
        probe: Try it with two short rows, packed and alone. It needs the whole weights.

    Raises:
        ModelError: Names the family and why.
    """
    if isinstance(model, PeftModel):
        whole: Any = model.get_base_model()  # its layers hold the adapters
        return refuse_mixed_rows(whole, probe)
    layers = {type(each) for each in DynamicCache(config=model.config).layers}
    others = sorted(each.__name__ for each in layers.difference(KEYS_AND_VALUES))
    if others or model._is_stateful:
        kept = ", ".join(others) or "a state of its own"
        raise _unfit(model, f"its layers carry more than keys and values on: {kept}")
    if probe:
        was_training = model.training
        moved, tolerance = _moved(model.eval())  # dropout would move them, too
        model.train(was_training)
        if not moved <= tolerance:  # NaN is none either
            attention = f"attn_implementation: {model.config._attn_implementation}"
            what = f"with {attention} a row's tokens see the row before it"
            raise _unfit(model, f"{what} (they move by {moved:.1%})")


@torch.no_grad()
def _moved(model: PreTrainedModel) -> tuple[float, float]:
    """Give the share by which packing moves a second row's hidden states, and how far it may."""
    vocabulary: Any = model.get_input_embeddings().num_embeddings
    places = [torch.arange(length, device=model.device)[None] for length in PROBE]
    rows = [(each * 7 + number + 3) % vocabulary for number, each in enumerate(places)]

    def states(ids: list[torch.Tensor], positions: list[torch.Tensor]) -> torch.Tensor:
        found = model.base_model(
            input_ids=torch.cat(ids, 1), position_ids=torch.cat(positions, 1), use_cache=False
        )
        last: torch.Tensor = found.last_hidden_state[:, -PROBE[1] :]
        return last

    alone, packed = states(rows[1:], places[1:]), states(rows, places)
    moved = ((packed - alone).float().norm() / alone.float().norm()).item()
    return moved, TOLERANCE if alone.dtype == torch.float32 else TOLERANCE_OF_HALF


def _unfit(model: PreTrainedModel, why: str) -> ModelError:
    family = model.config.model_type
    return ModelError(
        family, f"rows of this model can't be packed: {why}", "write data.packing: false"
    )
