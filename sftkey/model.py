"""Load what the recipe's `model` section names: the tokenizer, and the model on its device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sftkey.device import DTYPES, Device
from sftkey.errors import ModelError
from sftkey.recipe import ModelSection
from sftkey.source import Source, find_source, hub_error, model_source, weight_files


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with the recipe's chat template if it has one, and with a pad token.

    Which token pads makes no difference, since padding is masked by length; the end of text stays
    as it was published.

    Raises:
        ModelError: There is none, or none with the character offsets that masks are made from.
    """
    source = model_source(section)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, revision=source.commit or "main")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _load_error(section, source, "tokenizer", error) from error
    if not tokenizer.is_fast:
        raise ModelError(
            section.name_or_path,
            f"{type(tokenizer).__name__} gives no character offsets, which the masks are made from",
            "take a model that has a tokenizer.json",
        )
    if section.chat_template:
        try:
            tokenizer.chat_template = Path(section.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise ModelError(
                section.chat_template, f"model.chat_template can't be read: {error.strerror}"
            ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(
    section: ModelSection, device: Device, *, full: bool = False, folder: Path | None = None
) -> PreTrainedModel:
    """Load the model onto the device, quantized if the recipe says so.

    Args:
        section: `dtype` is the type of the weights: by default the device's compute type; the
            published one with `auto`; float32 when they are to be trained, since the small steps of
            fine-tuning round to nothing in 16 bits.
        device: From `choose_device`.
        full: The weights themselves are to be trained, not an adapter on them.
        folder: Take the weights that an earlier stage wrote there.

    Raises:
        ModelError: There are no weights, not all of them, or they can't be read.
    """
    source = find_source(str(folder)) if folder else model_source(section)
    if source.commit is None and not weight_files(source.folder):
        raise ModelError(
            source.path,
            "no weights there; expected *.safetensors or pytorch_model*.bin beside config.json",
        )
    dtype = device.compute_dtype if section.dtype is None else DTYPES.get(section.dtype, "auto")
    settings: dict[str, Any] = {
        "revision": source.commit or "main",
        "attn_implementation": section.attn_implementation,
        "dtype": torch.float32 if full and section.dtype is None else dtype,
    }
    if section.quantization == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=device.compute_dtype,
        )
        settings["device_map"] = {"": device.torch_device}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path, output_loading_info=True, **settings
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise _load_error(section, source, "model", error) from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            source.path,
            f"{len(missing)} of the model's weights are not there, such as {missing[0]}",
        )
    if section.quantization == "nf4":
        _keep_gradients(model)
        return model
    return model.to(device.torch_device)


def _keep_gradients(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking weights on a CPU with AVX512-BF16.

    The first evaluation without gradient would repack them for good, for a product that has no
    gradient: later training would get None below every quantized layer, and go on.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _load_error(
    section: ModelSection, source: Source, what: str, error: BaseException
) -> ModelError:
    of_the_hub = (hub.HfHubHTTPError, hub.LocalEntryNotFoundError)
    if source.commit and isinstance(error.__cause__, of_the_hub):
        return hub_error(section.name_or_path, section.revision, error.__cause__)
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return ModelError(section.name_or_path, f"its {what} can't be loaded: {reason}")
