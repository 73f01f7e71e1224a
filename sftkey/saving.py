"""What a stage has trained, saved with the base that it belongs to; a folder appears when whole."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

BASE_FILE = "base.json"
DEFAULT = "default"  # peft's name of the one adapter that acts on all tokens
Base = dict[str, str | None]


def save_adapter(
    model: PeftModel,
    folder: Path,
    base: Base,
    state: dict[str, torch.Tensor] | None = None,
    name: str = DEFAULT,
) -> None:
    """Save the adapter and the identity of its base; the folder appears when it is whole.

    Asks the hub for nothing (peft's own save asks for the base's config), and records the base's
    name, not the path in a cache.

    Args:
        model: With the adapter.
        folder: Replaced if it exists.
        base: From `base_identity`.
        state: The model's state where it is sharded, gathered from all processes.
        name: peft's name of the adapter; it isn't saved.
    """
    with _saving(folder) as temporary:
        saving = Path(temporary) / "adapter"
        saving.mkdir()
        tensors = get_peft_model_state_dict(
            model, state, adapter_name=name, save_embedding_layers=False
        )
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        save_file(tensors, saving / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.deepcopy(model.peft_config[name])
        config.base_model_name_or_path = base["name_or_path"]
        config.revision = base["revision"]
        config.inference_mode = True
        config.save_pretrained(str(saving))
        _finish(saving, folder, base)


def save_model(
    model: PreTrainedModel, folder: Path, base: Base, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Save a whole model that was trained itself, as `save_adapter` saves an adapter."""
    with _saving(folder) as temporary:
        saving = Path(temporary) / "model"
        model.save_pretrained(saving, state_dict=state)
        _finish(saving, folder, base)


def _saving(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """Make a folder beside the one that is to be written; remove what a killed save left."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-"
    for killed in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(killed)
    return tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix)


def _finish(saving: Path, folder: Path, base: Base) -> None:
    (saving / BASE_FILE).write_text(json.dumps(base, indent=2) + "\n")
    if folder.exists():
        shutil.move(folder, saving.parent / "old")
    saving.rename(folder)
