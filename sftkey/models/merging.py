"""A stage's adapter merged into its base, so that the model needs nothing beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sftkey.activity import activity
from sftkey.data.renderer import probe_renderer, stop_ids
from sftkey.errors import RunError
from sftkey.files import appearing
from sftkey.models.adapters import load_adapter, peft_warnings_logged
from sftkey.models.device import Device
from sftkey.models.loading import load_model, load_tokenizer
from sftkey.models.source import base_identity
from sftkey.recipe.schema import Recipe

# How far the merged model's logits may lie from base and adapter, as a share of what the adapter
# changes: in 16 bits the merged weights are rounded.
TOLERANCE, TOLERANCE_16_BITS = 0.05, 0.5


@dataclass(frozen=True)
class Merged:
    """What a merge did to the logits of a probe: the largest differences.

    Args:
        effect: Of base and adapter from the base.
        distance: Of the merged model from base and adapter.
        dtype: Of the merged weights.
    """

    effect: float
    distance: float
    dtype: str


@activity("merging")
def merge(recipe: Recipe, adapter: Path, output: Path) -> Merged:
    """Write the base with an adapter merged into it, its tokenizer and its generation config.

    The base is loaded without quantization, in the type it was published in, on the CPU: merged
    into quantized weights, the adapter would be quantized with them.

    Args:
        recipe: The run's.
        adapter: What one of its stages wrote.
        output: A new folder; it appears when it is whole.

    Raises:
        RunError: The folder exists, or the merged model isn't base and adapter.
        ModelError: The base or the adapter can't be loaded.
    """
    if output.exists():
        raise RunError(str(output), "expected a new folder; it exists already")
    tokenizer = load_tokenizer(recipe.model)
    renderer = probe_renderer(tokenizer, recipe.response, recipe.model.chat_template_kwargs)
    section = recipe.model.model_copy(update={"quantization": "none", "dtype": "auto"})
    base = load_model(section, Device("cpu", 0, torch.float32)).eval()
    published = base.generation_config.eos_token_id
    base.generation_config.eos_token_id = stop_ids(renderer, published)
    probe = torch.tensor([renderer.encode([renderer.response.render("2 + 2 = 4", "4")])[0].ids])
    plain = _logits(base, probe)
    model: Any = load_adapter(base, adapter, base_identity(recipe.model), trainable=False)
    adapted = _logits(model.eval(), probe)
    with peft_warnings_logged():
        merged = model.merge_and_unload()
    found = Merged(
        effect=float((adapted - plain).abs().max()),
        distance=float((_logits(merged, probe) - adapted).abs().max()),
        dtype=str(merged.dtype).removeprefix("torch."),
    )
    _check(found, adapter)
    _save(merged, tokenizer, output)
    return found


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits.float()
    return logits


def _check(found: Merged, adapter: Path) -> None:
    """Refuse a merge that did nothing, or something else."""
    if found.effect == 0:
        raise RunError(
            str(adapter),
            "this adapter changes no logit of its base, so a merge would do nothing",
            "was it trained? its stage's log.jsonl has the losses",
        )
    tolerance = TOLERANCE if found.dtype == "float32" else TOLERANCE_16_BITS
    if not found.distance <= tolerance * found.effect:
        raise RunError(
            str(adapter),
            f"merged into {found.dtype} weights the model isn't base and adapter: its logits are "
            f"off by up to {found.distance:.3g}, where the adapter changes up to "
            f"{found.effect:.3g}",
            "serve the adapter beside its base; nothing was written",
        )


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write the folder; it appears when it is whole."""
    with appearing(output, model.get_memory_footprint()) as saving:
        model.save_pretrained(saving)
        tokenizer.save_pretrained(saving)
