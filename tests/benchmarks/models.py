"""Models of published shapes with random weights: nothing is downloaded."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """A model's shape, and how it is held.

    Args:
        name: Whose shape it is.
        config: The fields of its configuration.
        quantized: NF4 with bfloat16 between; otherwise float32.
        checkpointing: Whether gradients are checkpointed, on all sides.
        dropout: Of the adapters.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    quantized: bool = False
    checkpointing: bool = False
    dropout: float = 0.0

    @property
    def vocabulary(self) -> int:
        """Return the number of tokens."""
        size: int = self.config["vocab_size"]
        return size


SHAPES = {
    "toy": Shape(
        "toy",
        {
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "135m": Shape(
        "SmolLM2-135M",
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "0.5b": Shape(
        "Qwen2.5-0.5B",
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
    "1b": Shape(
        "Llama-3.2-1B",
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
    "7b": Shape(
        "Qwen2.5-7B",
        {
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
        },
        quantized=True,
        checkpointing=True,
    ),
    "8b": Shape(
        "Qwen3-8B",
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
        },
        quantized=True,
        checkpointing=True,
    ),
}


def made_model(shape: Shape, device: str) -> PreTrainedModel:
    """Make the model on the device; the same weights each time."""
    fields = dict(shape.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    if not shape.quantized:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        return model.to(device)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = {
        name: (torch.randn(each.shape, device=device, dtype=torch.bfloat16) * 0.02).cpu()
        if each.dim() > 1
        else torch.ones(each.shape, dtype=torch.bfloat16)
        for name, each in empty.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    return type(empty).from_pretrained(
        None,
        config=config,
        state_dict=weights,
        attn_implementation="sdpa",
        dtype=torch.bfloat16,
        device_map={"": device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )


def adapted_model(shape: Shape, device: str) -> PeftModel:
    """Make the model with an adapter on all linear modules; the same weights each time."""
    model = made_model(shape, device)
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=shape.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,  # else one of the two factors is 0, and the other's gradient, too
    )
    torch.manual_seed(0)
    return get_peft_model(model, config)
