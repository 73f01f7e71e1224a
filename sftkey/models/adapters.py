"""LoRA adapters: added, saved, loaded onto the base that they were trained on."""

import copy
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
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
from peft.utils.other import TrainableTokensWrapper
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from sftkey.errors import SMALLER_STEPS, ModelError, first_line
from sftkey.files import appearing, read_json
from sftkey.models.loading import refuse_not_finite
from sftkey.models.lora_names import (
    check_targets,
    refuse_unmatched,
    short_names,
    target_names,
    weights_of,
)
from sftkey.models.source import ADAPTER_CONFIG, UNREADABLE, Source, find_source
from sftkey.recipe.stages import lora_setting

LOGGER = logging.getLogger("sftkey")
BASE_FILE, WEIGHTS_FILE = "base.json", "adapter_model.safetensors"
DEFAULT = "default"  # peft's name of the one adapter that acts on all tokens
Base = dict[str, str | None]
LISTS = (list, set, tuple, type(None))


def save_adapter(
    model: PeftModel,
    folder: Path,
    base: Base,
    state: dict[str, torch.Tensor] | None = None,
    name: str = DEFAULT,
) -> None:
    """Save the adapter and the identity of its base; the folder appears when it is whole.

    Asks the hub for nothing (peft's own save asks for the base's config), and records the base's
    name, not the path in a cache. A `state` is the model's where it is sharded, gathered from all
    processes; peft's `name` of the adapter isn't saved.
    """
    with appearing(folder) as saving:
        saving.mkdir()
        tensors = get_peft_model_state_dict(
            model, state, adapter_name=name, save_embedding_layers=False
        )
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        refuse_not_finite(tensors, str(folder), SMALLER_STEPS)
        save_file(tensors, saving / WEIGHTS_FILE, metadata={"format": "pt"})
        config = copy.deepcopy(model.peft_config[name])
        config.base_model_name_or_path = base["name_or_path"]
        config.revision = base["revision"]
        config.inference_mode = True
        config.save_pretrained(str(saving))
        (saving / BASE_FILE).write_text(json.dumps(base, indent=2) + "\n")


def save_model(
    model: PreTrainedModel, folder: Path, base: Base, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Save a whole model that was trained itself, as `save_adapter` saves an adapter."""
    weights = model.state_dict() if state is None else state
    refuse_not_finite(weights, str(folder), SMALLER_STEPS)
    with appearing(folder) as saving:
        model.save_pretrained(saving, state_dict=state)
        (saving / BASE_FILE).write_text(json.dumps(base, indent=2) + "\n")


def add_lora(
    model: PreTrainedModel | PeftModel, lora: dict[str, Any], seed: int, name: str = DEFAULT
) -> PeftModel:
    """Put a new adapter with float32 weights on the model, the same one for the same seed.

    The base's own weights are frozen, and the process's random state stays as it was.
    """
    _check_initialization("lora", lora_setting(lora, "init_lora_weights"))
    refuse_unmatched(without_adapters(model), lora)
    try:
        with torch.random.fork_rng(devices=[]), peft_warnings_logged():
            # peft adds to its lists, and a recipe doesn't change.
            config = LoraConfig(**copy.deepcopy(lora), task_type=TaskType.CAUSAL_LM)
            # peft draws on the CPU whatever the device; torch.manual_seed would reseed GPUs too.
            torch.default_generator.manual_seed(seed)
            return _put(config, name, model)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise ModelError("lora", first_line(error)) from error


@contextmanager
def peft_warnings_logged() -> Iterator[None]:
    """Log the first sentence of each of peft's warnings once, without the file it came from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    kinds = UserWarning | RuntimeWarning
    texts = [str(each.message).strip() for each in caught if issubclass(each.category, kinds)]
    # One for each module would say the same.
    for text in dict.fromkeys(text.partition("\n")[0].split(". ")[0] for text in texts):
        LOGGER.info("peft: %s", text)


def without_adapters(model: PreTrainedModel | PeftModel) -> Any:
    """Return the model below its adapters, if it has any."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_initialization(where: str, value: Any) -> None:
    if value not in (True, False, "gaussian", "orthogonal"):
        raise ModelError(
            where,
            f"init_lora_weights: expected true, false, gaussian or orthogonal; got {value!r}",
            "the others change the base's own weights, which are not saved with an adapter",
        )


def _put(config: LoraConfig, name: str, model: PreTrainedModel | PeftModel) -> PeftModel:
    """Put an adapter on a model, all that is trained in float32; no save asks the hub for anything.

    peft makes copies of whole modules in the base's type, and looks the base up by its name. Its
    head with trained rows hides its bias, which TRL's loss asks for beside the weights.
    """
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        adapted = model
    else:
        adapted = get_peft_model(model, config, adapter_name=name)
    dtype = adapted.get_input_embeddings().weight.dtype
    if config.modules_to_save and dtype != torch.float32:
        raise ModelError(
            "lora.modules_to_save",
            f"float32 copies can't compute beside {str(dtype).removeprefix('torch.')} weights",
            "train single tokens with trainable_token_indices, or write model.dtype=float32",
        )
    for key, parameter in adapted.named_parameters():
        if f".{name}." in key:
            parameter.requires_grad = True  # peft freezes a second adapter
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    config.base_model_name_or_path = ""
    head = without_adapters(adapted).get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        object.__setattr__(head, "bias", head.original_module.bias)  # not registered once more
    return adapted


def load_adapter(
    model: PreTrainedModel | PeftModel,
    adapter: str | Path,
    base: Base,
    *,
    lora: dict[str, Any] | None = None,
    trainable: bool = True,
    name: str = DEFAULT,
) -> PeftModel:
    """Put a saved adapter on the model: one of ours, or anybody's LoRA adapter in peft's form.

    Args:
        model: The base, without an adapter of this name.
        adapter: A folder or a hub id.
        base: What `base_identity` says of the model.
        lora: The recipe's; what it says must be what the adapter has.
        trainable: Go on with training; otherwise all is frozen. float32 either way.
        name: peft's name of it.

    Raises:
        ModelError: It can't be found or read, is no LoRA adapter, isn't finite, belongs to another
            base, or contradicts `lora`.
    """
    source, config = read_adapter_config(model, adapter, lora or {}, base)
    config.inference_mode = False  # so that float32 comes before the weights
    config.base_model_name_or_path = None  # compared; peft warns if a cache's path differs
    weights = _read_weights(source)
    try:
        with peft_warnings_logged():
            adapted = _put(config, name, model)
    except (*UNREADABLE, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        what = f"its {ADAPTER_CONFIG} doesn't fit the model: {first_line(error)}"
        raise ModelError(source.path, what) from error
    try:
        result: Any = set_peft_model_state_dict(adapted, weights, adapter_name=name)
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ModelError(source.path, f"its weights don't fit the model: {reason}") from error
    missing = [key for key in result.missing_keys if "lora_" in key and f".{name}" in key]
    if unmatched := [*result.unexpected_keys, *missing]:
        what = f"{len(unmatched)} of its weights don't match the model's, such as {unmatched[0]}"
        raise ModelError(source.path, what)
    if not trainable:
        adapted.requires_grad_(False)
    return adapted


def _read_weights(source: Source) -> dict[str, torch.Tensor]:
    """Read an adapter's weights, which must be finite."""
    try:
        weights: dict[str, torch.Tensor]
        weights = load_peft_weights(str(weights_folder(source)), device="cpu")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(source.path, f"can't be read: {first_line(error)}") from error
    refuse_not_finite(weights, source.path)
    return weights


def weights_folder(source: Source) -> Path:
    """Return the folder of an adapter's safetensors; refuses pickle, which may run code."""
    if source.commit is not None:
        with suppress(EntryNotFoundError):
            hf_hub_download(source.path, WEIGHTS_FILE, revision=source.commit)
    if not (source.folder / WEIGHTS_FILE).is_file():
        pickled = ", ".join(sorted(each.name for each in source.folder.glob("adapter_model.*")))
        raise ModelError(
            source.path,
            f"expected {WEIGHTS_FILE}; got {pickled or 'no such file'}",
            "if you trust who wrote it, convert it: load it with peft and call save_pretrained",
        )
    return source.folder


def read_adapter_config(
    model: PreTrainedModel | PeftModel,
    adapter: str | Path,
    lora: dict[str, Any],
    base: Base | None = None,
) -> tuple[Source, LoraConfig]:
    """Read what a saved adapter is, and refuse what can't be gone on from, as `load_adapter` does.

    The model may be on the meta device; without `base`, another base isn't looked for.
    """
    source = find_source(str(adapter), config_file=ADAPTER_CONFIG)
    try:
        with peft_warnings_logged():
            config = PeftConfig.from_pretrained(source.path, revision=source.commit)
        if not isinstance(config, LoraConfig):
            raise ModelError(source.path, f"expected a LoRA adapter; got {type(config).__name__}")
        if base is not None:
            _check_base(source, config, base)
        _check_initialization(source.path, config.init_lora_weights)
        _check_lora(without_adapters(model), source, config, lora)
        _check_carried(without_adapters(model), source, config)
    except ModelError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:  # KeyError: of an unknown kind
        raise ModelError(source.path, f"can't be read: {first_line(error)}") from error
    return source, config


def _check_base(source: Source, config: LoraConfig, base: Base) -> None:
    """Refuse an adapter of another base; peft doesn't look."""
    record = source.folder / BASE_FILE
    trained: Base = read_json(record) if record.is_file() else {}
    name = trained.get("name_or_path") or config.base_model_name_or_path
    if not name:
        hint = f"write it as base_model_name_or_path into its {ADAPTER_CONFIG}"
        raise ModelError(source.path, "doesn't say which base it was trained for", hint)
    given = str(base["name_or_path"])
    hashes = [key for key in ("sha256", "fingerprint") if trained.get(key) and base.get(key)]
    if hashes:
        same = trained[hashes[0]] == base[hashes[0]]
    else:
        last, own = (re.split(r"[/\\]", each.rstrip("/\\"))[-1] for each in (name, given))
        same = last == own
    if same:
        return
    if name != given:
        what = f"trained for {name}; model.name_or_path is {given}"
        raise ModelError(source.path, what, f"write model.name_or_path={name}")
    key, revision = hashes[0], trained.get("revision")
    raise ModelError(
        source.path,
        f"trained for other weights of {name}: expected {key} {trained[key]}; got {base[key]}",
        f"write model.revision={revision}" if revision else None,
    )


def _check_carried(model: PreTrainedModel, source: Source, config: LoraConfig) -> None:
    """Refuse an adapter on what the loss reads itself, or that no merge could undo."""
    for key in ("alora_invocation_tokens", "layer_replication"):
        if getattr(config, key, None):
            raise ModelError(source.path, f"{key}: adapters of this kind can't be trained on here")
    try:
        check_targets(model, config.target_modules)
    except ModelError as error:
        what = error.problems[0].what
        raise ModelError(source.path, f"target_modules: {what}", error.hint) from error


def _check_lora(
    model: PreTrainedModel, source: Source, config: LoraConfig, lora: dict[str, Any]
) -> None:
    """Refuse a recipe that says something else than the adapter has; the adapter's holds."""
    contradictions = []
    for key, wanted in lora.items():
        has = getattr(config, key)
        if key == "init_lora_weights":
            continue
        # peft keeps some lists as sets, whose order is the process's own.
        here, there = (set(v or ()) if isinstance(v, LISTS) else v for v in (wanted, has))
        if key == "target_modules" and wanted and has:
            here, there = target_names(model, wanted), target_names(model, has)
            wanted, has = f"{wanted} ({len(here)} modules)", f"{short_names(there)} ({len(there)})"
        if key == "modules_to_save" and wanted and has:  # peft writes a tied one by another name
            here, there = weights_of(model, wanted), weights_of(model, has)
        if here != there:
            contradictions.append(f"lora.{key} is {wanted} in the recipe and {has} in the adapter")
    if contradictions:
        what, hint = "; ".join(contradictions), "write what the adapter has, or leave the key out"
        raise ModelError(source.path, what, hint)
