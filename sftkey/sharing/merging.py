"""A stage's model as a folder that needs nothing beside it: no adapter, no recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sftkey.activity import activity
from sftkey.data.renderer import Renderer
from sftkey.errors import RunError
from sftkey.files import appearing
from sftkey.models.adapters import load_adapter, peft_warnings_logged
from sftkey.models.device import Device
from sftkey.models.loading import load_model, load_renderer
from sftkey.models.source import base_identity
from sftkey.recipe.schema import Recipe
from sftkey.sharing.baking import baked_generation_config, baked_template, with_template
from sftkey.sharing.stage import refuse_existing

# How far the merged model's logits may lie from base and adapter, as a share of what the adapter
# changes: in 16 bits the merged weights are rounded.
TOLERANCE, TOLERANCE_16_BITS = 0.05, 0.5


@dataclass(frozen=True)
class Merged:
    """What a merge did to the logits of a probe: the largest differences."""

    effect: float  # of base and adapter from the base
    distance: float  # of the merged model from base and adapter
    dtype: str  # of the merged weights


@activity("writing the model")
def write_model(recipe: Recipe, weights: Path, output: Path) -> Merged | None:
    """Write a stage's model as a folder that answers as the run measured it.

    An adapter is merged into its base; a model that was trained whole is copied. The folder's chat
    template and generation config say what the recipe said beside the weights: system message, the
    text around a question, variables of the template, stop tokens, longest response.

    The base is loaded without quantization, in the type it was published in, on the CPU: merged
    into quantized weights, the adapter would be quantized with them.

    Args:
        recipe: The run's.
        weights: What the stage wrote.
        output: A new folder; it appears when it is whole.

    Returns:
        What the merge did; None where there was none.

    Raises:
        RunError: The folder exists, or the merged model isn't base and adapter.
        ModelError: The weights can't be loaded.
    """
    refuse_existing(output)  # what may refuse comes before any weights are loaded
    renderer = load_renderer(recipe)
    template = baked_template(renderer, recipe.data)
    section = recipe.model.model_copy(update={"quantization": "none", "dtype": "auto"})
    device, found = Device("cpu", 0, torch.float32), None
    if recipe.lora is None:
        model: Any = load_model(section, device, folder=weights)
    else:
        model, found = _merged(load_model(section, device).eval(), weights, recipe, renderer)
    config = baked_generation_config(model.generation_config, renderer, recipe)
    model.generation_config = config
    with appearing(output, model.get_memory_footprint()) as saving:
        model.save_pretrained(saving)
        with_template(renderer.tokenizer, template).save_pretrained(saving)
    return found


@activity("merging")
def _merged(base: Any, adapter: Path, recipe: Recipe, renderer: Renderer) -> tuple[Any, Merged]:
    """Merge an adapter into its base, and compare what that does to the logits of a probe."""
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
    return merged, found


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return logits that are computed in float32, whatever the type of the weights.

    In 16 bits rounding alone would move them as far as a light adapter does.
    """
    with torch.no_grad(), _computing_in_float32(model):
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


@contextmanager
def _computing_in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Hold each module's own weights in float32 while it runs: never the whole model's."""
    kept: dict[tuple[torch.nn.Module, str], torch.Tensor] = {}

    def widen(module: torch.nn.Module, _: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            kept[module, name] = parameter.data
            parameter.data = parameter.data.float()

    def put_back(module: torch.nn.Module, *_: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = kept.pop((module, name))

    with ExitStack() as hooks:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                hooks.callback(module.register_forward_pre_hook(widen).remove)
                hooks.callback(module.register_forward_hook(put_back).remove)
        yield


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
