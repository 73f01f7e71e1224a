"""Tiny models of several families, batches for them, and losses computed from whole logits."""

import functools
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

VOCABULARY = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
WINDOW: dict[str, Any] = {
    "sliding_window": 8,  # shorter than the rows' contexts
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "gemma3": {"model_type": "gemma3_text", **WINDOW},
    "gemma2": {  # soft-capping of the logits, and of the attention, which needs `eager`
        "model_type": "gemma2",
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 20.0,
        "attn_implementation": "eager",
        **WINDOW,
    },
    "granite": {"model_type": "granite", "logits_scaling": 4.0},
    "cohere": {"model_type": "cohere", "logit_scale": 2.0},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "output_router_logits": True,
        "experts_implementation": "eager",  # torch's grouped products have no float64
    },
}
LENGTHS, KEYS = (40, 23, 31), (10, 11, 2)  # tokens of each row, and how many of them are its key
STARTS = torch.tensor(LENGTHS) - torch.tensor(KEYS) - 1  # the token before the key


# Two orders of the same sums differ by some hundred roundings in these models: 4e-5 was seen in
# float32 (and another CPU orders its sums in another way), which is 1e-13 in float64.
EQUAL = 1e-10
# Where float32 must stay (4-bit weights have no other): a sum of n terms in another order moves by
# up to n eps of its terms' size; a gradient comes through 2 x 3 layers x 7 sums of some 64 terms.
ROUNDED = 4096 * torch.finfo(torch.float32).eps  # 5e-4


@functools.cache
def _remember_types() -> None:
    """Let what keeps a table of types make it while `torch.float32` is itself."""
    import bitsandbytes  # noqa: F401
    import peft.tuners.lora  # noqa: F401
    import safetensors.torch  # noqa: F401

    file = io.BytesIO()
    torch.save(torch.zeros(1), file)
    file.seek(0)
    torch.load(file)


@contextmanager
def float64() -> Iterator[None]:
    """Make and run models in float64: two ways to one number then agree to `EQUAL`, or are two.

    Upstream takes norms and losses in float32 whatever the weights are. It asks for `torch.float32`
    by that name when it runs, forward and backward; so here the name means float64.
    """
    _remember_types()
    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("float32", "float"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def made_family(name: str, **fields: Any) -> Any:
    """Make a three-layer model of a family; its weights are large, so that attention matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**SHAPE, **FAMILIES[name], **fields}
    experts = config.pop("experts_implementation", None)
    attention = config.pop("attn_implementation", "sdpa")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config),
        attn_implementation=attention,
        experts_implementation=experts,
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def made_batch() -> dict[str, torch.Tensor]:
    """Make three rows of unequal lengths and keys, filled up on the right."""
    dice = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=dice)
    places = torch.arange(max(LENGTHS))
    lengths = torch.tensor(LENGTHS)[:, None]
    key = (places > STARTS[:, None]) & (places < lengths)
    return {
        "input_ids": ids,
        "attention_mask": (places < lengths).long(),
        "labels": ids.masked_fill(~key, -100),
    }


def plain_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the `(B, T - 1)` losses as the model's own forward has them, from all logits."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )


def gradients(model: Any, losses: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return all gradients of a weighted sum of losses, zeros for none; weights differ."""
    model.zero_grad()
    found = losses()
    weights = torch.linspace(0.5, 1.5, found.numel()).view_as(found)
    (found * weights).sum().backward()
    return {
        name: torch.zeros_like(each) if each.grad is None else each.grad.clone()
        for name, each in model.named_parameters()
        if each.requires_grad
    }


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest distance of two gradients, as a share of the expected one's length."""
    assert found.keys() == expected.keys()
    return max(
        ((found[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-9)).item()
        for name in expected
    )


def with_lora(name: str, folder: Path, model: Any = None) -> Any:
    """Put an adapter on a model; both of its factors are random."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    return get_peft_model(model or made_family(name), config)


def nf4(name: str, folder: Path, **fields: Any) -> Any:
    """Put an adapter on a model whose weights are NF4 and stay packed, as a run has it on CUDA."""
    from sftkey.models.device import Device
    from sftkey.models.loading import load_model
    from sftkey.recipe.schema import ModelSection

    made_family(name, hidden_size=64, intermediate_size=64, **fields).save_pretrained(folder)
    section = ModelSection(name_or_path=str(folder), unpack="never")
    return with_lora(name, folder, load_model(section, Device("cpu", 0, torch.float32)))
