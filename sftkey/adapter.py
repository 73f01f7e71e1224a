"""LoRA adapters: made, saved with the base that they belong to, loaded onto that base alone."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import save_file
from transformers import PreTrainedModel

from sftkey.errors import ModelError
from sftkey.source import ADAPTER_CONFIG, Source, find_source

BASE_FILE = "base.json"
Base = dict[str, str | None]


def add_lora(model: PreTrainedModel, lora: dict[str, Any], seed: int) -> PeftModel:
    """Put a new adapter with float32 weights on the model, the same one for the same seed.

    Args:
        model: Quantized or not; its own weights are frozen.
        lora: `peft.LoraConfig`'s fields.
        seed: Of the adapter's first weights; the process's random state stays as it was.

    Raises:
        ModelError: The target modules don't exist, or the settings can't be.
    """
    _check_initialization(lora.get("init_lora_weights", True))
    _check_targets(model, lora.get("target_modules"))
    try:
        config = LoraConfig(**lora, task_type=TaskType.CAUSAL_LM)
        with torch.random.fork_rng(devices=[]):
            # peft draws on the CPU whatever the device; torch.manual_seed would reseed GPUs too.
            torch.default_generator.manual_seed(seed)
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ModelError("lora", str(error).splitlines()[0]) from error
    return _in_float32(adapted)


def _check_initialization(value: Any) -> None:
    if value not in (True, False, "gaussian", "orthogonal"):
        raise ModelError(
            "lora.init_lora_weights",
            f"expected true, false, gaussian or orthogonal; got {value!r}",
            "the others change the base's own weights, which are not saved with an adapter",
        )


def _check_targets(model: PreTrainedModel, targets: Any) -> None:
    """Refuse targets that match nothing (peft goes on if others do), and the output head."""
    names = [targets] if isinstance(targets, str) else sorted(targets or ())
    linear = sorted({name.rpartition(".")[2] for name in linear_modules(model)})
    absent = [
        name for name in names if not target_names(model, name if name is targets else [name])
    ]
    if absent:
        raise ModelError(
            "lora.target_modules",
            f"the model has no {', '.join(absent)}",
            f"its linear modules are {', '.join(linear)}; all-linear takes them all",
        )
    head = _head_name(model)
    if targets and head in target_names(model, targets):
        raise ModelError(
            "lora.target_modules",
            f"{head} can't carry an adapter: the loss multiplies by its weights themselves",
            f"take from {', '.join(linear)}, or all-linear, which leaves it out",
        )


def target_names(model: torch.nn.Module, targets: str | list[str] | set[str]) -> set[str]:
    """Give the full names of the modules that peft would put an adapter on."""
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return linear_modules(model)
    names = {name for name, _ in model.named_modules() if name}
    if isinstance(targets, str):
        return {name for name in names if re.fullmatch(targets, name)}
    return {
        name
        for name in names
        if any(name == target or name.endswith(f".{target}") for target in targets)
    }


def linear_modules(model: torch.nn.Module) -> set[str]:
    """Give the full names of all linear modules but the output head."""
    linear = {name for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    return linear - {_head_name(model)}


def _head_name(model: Any) -> str:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "")


def _in_float32(model: PeftModel) -> PeftModel:
    """Make all that is trained float32; peft leaves copies of whole modules in the base's type."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return model


def load_adapter(
    model: PreTrainedModel,
    adapter: str | Path,
    base: Base,
    *,
    lora: dict[str, Any] | None = None,
    trainable: bool = True,
) -> PeftModel:
    """Put a saved adapter on the model: one of ours, or anybody's LoRA adapter in peft's form.

    Args:
        model: The base, without an adapter.
        adapter: A folder or a hub id.
        base: What `base_identity` says of the model.
        lora: The recipe's; what it says must be what the adapter has.
        trainable: Go on with training; otherwise the adapter is frozen. float32 either way.

    Raises:
        ModelError: It can't be found or read, is no LoRA adapter, belongs to another base, or
            contradicts `lora`.
    """
    source = find_source(str(adapter), config_file=ADAPTER_CONFIG)
    try:
        config = PeftConfig.from_pretrained(source.path, revision=source.commit)
        if not isinstance(config, LoraConfig):
            raise ModelError(source.path, f"expected a LoRA adapter; got {config.peft_type}")
        _check_base(source, config, base)
        _check_lora(model, source, config, lora or {})
        config.inference_mode = not trainable
        weights = load_peft_weights(source.path, device="cpu", revision=source.commit)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(source.path, f"can't be read: {str(error).splitlines()[0]}") from error
    adapted = get_peft_model(model, config)
    try:
        result: Any = set_peft_model_state_dict(adapted, weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ModelError(source.path, f"its weights don't fit the model: {reason}") from error
    unmatched = [*result.unexpected_keys, *(key for key in result.missing_keys if "lora_" in key)]
    if unmatched:
        raise ModelError(
            source.path,
            f"{len(unmatched)} of its weights don't match the model's, such as {unmatched[0]}",
        )
    return _in_float32(adapted)


def _check_base(source: Source, config: LoraConfig, base: Base) -> None:
    """Refuse an adapter of another base; peft doesn't look."""
    record = source.folder / BASE_FILE
    trained: Base = json.loads(record.read_text()) if record.is_file() else {}
    name = trained.get("name_or_path") or config.base_model_name_or_path
    if not name:
        raise ModelError(
            source.path,
            "doesn't say which base it was trained for",
            f"write it as base_model_name_or_path into its {ADAPTER_CONFIG}",
        )
    for key in ("sha256", "fingerprint"):
        if trained.get(key) and base.get(key):
            if trained[key] == base[key]:
                return
            if name != base["name_or_path"]:
                break
            revision = trained.get("revision")
            raise ModelError(
                source.path,
                f"trained for other weights of {name}: {key} {trained[key]}; got {base[key]}",
                f"write model.revision={revision}" if revision else None,
            )
    else:
        if _last_part(name) == _last_part(str(base["name_or_path"])):
            return
    raise ModelError(
        source.path,
        f"trained for {name}; model.name_or_path is {base['name_or_path']}",
        f"write model.name_or_path={name}",
    )


def _last_part(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _check_lora(
    model: PreTrainedModel, source: Source, config: LoraConfig, lora: dict[str, Any]
) -> None:
    """Refuse a recipe that says something else than the adapter has; the adapter's holds."""
    contradictions = []
    for key, wanted in lora.items():
        has = getattr(config, key)
        if key == "target_modules" and wanted and has:
            same = target_names(model, wanted) == target_names(model, has)
            has = sorted(has) if isinstance(has, set) else has
        else:
            same = key in ("init_lora_weights", "target_modules") or wanted == has
        if not same:
            contradictions.append(f"lora.{key} is {wanted} in the recipe and {has} in the adapter")
    if contradictions:
        raise ModelError(
            source.path,
            "; ".join(contradictions),
            "write what the adapter has, or leave the key out",
        )


def save_adapter(model: PeftModel, folder: Path, base: Base) -> None:
    """Save the adapter and the identity of its base; the folder appears when it is whole.

    Asks the hub for nothing (peft's own save asks for the base's config), and records the base's
    name, not the path in a cache.
    """
    with tempfile.TemporaryDirectory(dir=_parent(folder), prefix=f".{folder.name}-") as temporary:
        saving = Path(temporary) / "adapter"
        saving.mkdir()
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        save_file(tensors, saving / "adapter_model.safetensors", metadata={"format": "pt"})
        config = model.peft_config["default"]
        config.base_model_name_or_path = base["name_or_path"]
        config.revision = base["revision"]
        inference_mode, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(saving))
        config.inference_mode = inference_mode
        _finish(saving, folder, base)


def save_model(model: PreTrainedModel, folder: Path, base: Base) -> None:
    """Save a whole model that was trained itself; the folder appears when it is whole."""
    with tempfile.TemporaryDirectory(dir=_parent(folder), prefix=f".{folder.name}-") as temporary:
        saving = Path(temporary) / "model"
        model.save_pretrained(saving)
        _finish(saving, folder, base)


def _parent(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.parent


def _finish(saving: Path, folder: Path, base: Base) -> None:
    (saving / BASE_FILE).write_text(json.dumps(base, indent=2) + "\n")
    if folder.exists():
        shutil.move(folder, saving.parent / "old")
    saving.rename(folder)
