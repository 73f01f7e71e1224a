"""The model of a stage: base, the adapters of the stages before, its own."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sftkey.data.renderer import Renderer, stop_ids
from sftkey.errors import ModelError, RunError
from sftkey.files import read_json
from sftkey.generation.generate import inferring
from sftkey.models.adapters import BASE_FILE, Base, add_lora, load_adapter, without_adapters
from sftkey.models.device import Device, choose_device
from sftkey.models.key_pass import KEY, act, context_adapters
from sftkey.models.loading import load_model
from sftkey.models.source import ADAPTER_CONFIG, base_identity, find_source, fingerprint
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import key_adapter_specs
from sftkey.training.detached import other_caches, refuse_other_caches
from sftkey.training.run_folder import Ledger, put_back

PROBE = (9, 7)  # tokens of two rows
# How far, as a share, rounding moves what a row's tokens become; other rows move it much farther.
TOLERANCE, TOLERANCE_OF_HALF = 1e-3, 0.1


def refuse_mixed_rows(model: PreTrainedModel | PeftModel, probe: bool = True) -> None:
    """Refuse a model, with adapters or without, that lets a row of a pack see those before it.

    A probe with two short rows, packed and alone, needs the whole weights.
    """
    whole = without_adapters(model)  # its layers hold them
    if kept := other_caches(whole):
        raise _unfit(whole, f"its layers carry more than keys and values on: {kept}")
    if probe:
        with inferring(whole):  # dropout would move them, too
            moved, tolerance = _moved(whole)
        if not moved <= tolerance:  # NaN is none either
            attention = f"attn_implementation: {whole.config._attn_implementation}"
            what = f"with {attention} a row's tokens see the row before it"
            raise _unfit(whole, f"{what} (they move by {moved:.1%})")


@torch.no_grad()
def _moved(model: PreTrainedModel) -> tuple[float, float]:
    """Return the share by which packing moves a second row's hidden states, and how far it may."""
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
    what = f"rows of this model can't be packed: {why}"
    return ModelError(model.config.model_type, what, "write data.packing: false")


def load_stage(
    recipe: Recipe, ledger: Ledger, device: Device, renderer: Renderer, number: int
) -> PreTrainedModel | PeftModel:
    """Load the model as the stage at `number` starts: base, and what the stage before wrote.

    The number of stages stands for the model that the last one leaves. The renderer's end of turn
    must stop the model wherever it goes.

    Raises:
        RunError: What the stage before wrote, or the base model, has changed since.
        ModelError: What was saved can't be read, or doesn't belong together; or a stage would need
            of the model what it can't do.
    """
    stages = recipe.stages
    frozen = number < len(stages) and stages[number].context == "frozen"
    left_frozen = number > 0 and stages[number - 1].context == "frozen"
    at = number - 1 if left_frozen else number  # whose start the context is
    before = ledger.adapter(at - 1) if at else recipe.model.adapter
    for written in range(max(at - 1, 0), number):  # one, or two where a key stands on a context
        ledger.require(ledger.adapter(written))
    full = recipe.lora is None
    base = base_identity(recipe.model)
    require_same_base(ledger, base)
    ledger.facts["base"] = base
    weights = Path(before) if full and before else None
    model: PreTrainedModel | PeftModel = load_model(recipe.model, device, full=full, folder=weights)
    _refuse_half_on_cpu(model, device)
    if any(stage.context != "exact" for stage in stages):
        refuse_other_caches(model)  # before hours of training, not after
    # What is trained to stop must stop wherever the model goes: it is saved with the weights.
    published = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = stop_ids(renderer, published)
    if frozen or left_frozen:
        if before and not full:
            model = load_adapter(model, before, base, trainable=False)
        model.requires_grad_(False)
        return _with_key(model, recipe, ledger, number, frozen)
    if full:
        return model
    if before is None:
        return add_lora(model, recipe.lora or {}, recipe.seed)
    return load_adapter(model, before, base, lora=recipe.lora)


def _refuse_half_on_cpu(model: PreTrainedModel | PeftModel, device: Device) -> None:
    if device.kind == "cpu" and model.dtype == torch.float16:
        raise ModelError(
            "model.dtype",
            "auto is float16 for this model, which can't be trained on a CPU",
            "write model.dtype=float32, or bfloat16",
        )


def load_left(
    recipe: Recipe, folder: Path, renderer: Renderer, number: int
) -> PreTrainedModel | PeftModel:
    """Load the model that so many stages of a run have left, where its recipe computes."""
    device = choose_device(recipe.model, use_cpu=bool(recipe.trainer.get("use_cpu")))
    return load_stage(recipe, Ledger(folder, recipe, main=False), device, renderer, number)


def require_same_base(ledger: Ledger, base: Base) -> None:
    """Refuse to go on with a run on other weights than those that it began with."""
    began = ledger.facts.get("base") or {}
    if None in (began.get("fingerprint"), base["fingerprint"]):
        return
    was, now = (
        f"{each.get('revision') or 'fingerprint'} {str(each['fingerprint'])[:12]}"
        for each in (began, base)
    )
    if began["fingerprint"] != base["fingerprint"]:
        raise RunError(
            str(ledger.folder),
            f"expected the weights of {base['name_or_path']} that this run began with, {was}; "
            f"got {now}",
            put_back(ledger.folder),
        )


def _with_key(
    model: PreTrainedModel | PeftModel, recipe: Recipe, ledger: Ledger, number: int, new: bool
) -> PreTrainedModel | PeftModel:
    """Put the key's adapters on the model: new ones to train, or the one that a stage has kept."""
    if new:
        for member in key_adapter_specs(recipe, recipe.stages[number]):
            model = add_lora(model, member.lora, member.seed, member.name)
    else:
        folder = ledger.adapter(number - 1)
        refuse_other_context(folder, stands_on(recipe, ledger, number - 1))
        model = load_adapter(model, folder, ledger.facts["base"], trainable=False, name=KEY)
    act(model, context_adapters(model))
    return model


def stands_on(recipe: Recipe, ledger: Ledger, number: int) -> Base:
    """Say what the key adapter of the frozen stage at `number` stands on: where, and which weights.

    The folder is that of a stage of the run, or the recipe's own adapter; None: the base alone.
    """
    before = ledger.adapter(number - 1) if number else recipe.model.adapter
    if before is None:
        return {"context": None, "context_fingerprint": None}
    if isinstance(before, Path):
        name, folder = str(before.relative_to(ledger.folder)), before
    else:
        name, folder = before, find_source(before, config_file=ADAPTER_CONFIG).folder
    return {"context": name, "context_fingerprint": fingerprint(folder)}


def refuse_other_context(folder: Path, context: Base) -> None:
    """Refuse a key adapter beside another context than the one that it was trained on."""
    record = read_json(folder / BASE_FILE)
    was, now = (each["context_fingerprint"] for each in (record, context))
    if was != now:
        raise ModelError(
            str(folder),
            f"trained on the context of {record['context']} with weights {was}; they are {now} now",
            "was that folder changed? `--fresh` begins anew",
        )
