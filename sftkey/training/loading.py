"""The model as a stage starts from it, or as the last one leaves it: read from what was saved."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from sftkey.data.renderer import Frame, stop_ids
from sftkey.errors import ModelError
from sftkey.models.adapters import BASE_FILE, Base, add_lora, load_adapter
from sftkey.models.device import Device
from sftkey.models.key_adapter import KEY, act, context_adapters
from sftkey.models.loading import load_model
from sftkey.models.source import ADAPTER_CONFIG, base_identity, find_source, fingerprint
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import members
from sftkey.training.detached import refuse_other_caches
from sftkey.training.ledger import Ledger


def load_stage(
    recipe: Recipe, ledger: Ledger, device: Device, frame: Frame, number: int
) -> PreTrainedModel | PeftModel:
    """Load the model as the stage at `number` starts: base, and what the stage before wrote.

    Args:
        recipe: The run's.
        ledger: Knows where the stages wrote.
        device: Where the model goes.
        frame: Its end of turn must stop the model wherever it goes.
        number: From 0; the number of stages for the model that the last one leaves.

    Raises:
        ModelError: What was saved can't be read, or doesn't belong together; or a stage would need
            of the model what it can't do.
    """
    stages = recipe.stages
    frozen = number < len(stages) and stages[number].context == "frozen"
    left_frozen = number > 0 and stages[number - 1].context == "frozen"
    at = number - 1 if left_frozen else number  # whose start the context is
    before = ledger.adapter(at - 1) if at else recipe.model.adapter
    full = recipe.lora is None
    base = ledger.facts["base"] = base_identity(recipe.model)
    weights = Path(before) if full and before else None
    model: PreTrainedModel | PeftModel
    model = load_model(recipe.model, device, full=full, folder=weights)
    if any(stage.context != "exact" for stage in stages):
        refuse_other_caches(model)  # before hours of training, not after
    # What is trained to stop must stop wherever the model goes: it is saved with the weights.
    published = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = stop_ids(frame, published)
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


def _with_key(
    model: PreTrainedModel | PeftModel, recipe: Recipe, ledger: Ledger, number: int, new: bool
) -> PreTrainedModel | PeftModel:
    """Put the key's adapters on the model: new ones to train, or the one that a stage has kept."""
    if new:
        for member in members(recipe, recipe.stages[number]):
            model = add_lora(model, member.lora, member.seed, member.name)
            for name, parameter in model.named_parameters():
                if f".{member.name}." in name:
                    parameter.requires_grad = True
    else:
        folder = ledger.adapter(number - 1)
        base = ledger.facts["base"]
        refuse_other_context(folder, stands_on(recipe, ledger, number - 1))
        model = load_adapter(model, folder, base, trainable=False, name=KEY)
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
    """Refuse a key adapter beside another context than the one that it was trained on.

    Raises:
        ModelError: Names both.
    """
    record = json.loads((folder / BASE_FILE).read_text())
    was, now = (each["context_fingerprint"] for each in (record, context))
    if was != now:
        raise ModelError(
            str(folder),
            f"trained on the context of {record['context']} with weights {was}; they are {now} now",
            "was that folder changed? `--fresh` begins anew",
        )
