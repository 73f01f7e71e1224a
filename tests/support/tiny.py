"""Tiny models, tokenizers, rows and recipes, made in-process."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.model_folders import write_rows

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "How many legs do 3 cats and 2 birds have together?",
    "<Thinking>\n3 cats: 12\n2 birds: 4\n</Thinking>\n<Answer>\n16\n</Answer>",
    "A pen costs 5 dollars, so 7 pens cost 35 dollars.",
]


def made_tokenizer() -> Any:
    """Train a byte-level BPE on three sentences; ChatML template, `<|im_end|>` ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def made_model(tokenizer: Any, seed: int = 0, **config: Any) -> Any:
    """Make a two-layer Llama of random float32 weights over the tokenizer's vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            **{**shape, **config},
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def made_rows(count: int) -> list[dict[str, str]]:
    """Make rows whose thinkings differ in length by more than five times."""
    rows = []
    for number in range(count):
        steps = [
            f"{number + step} + 1 = {number + step + 1}" for step in range(1 + (number % 5) * 3)
        ]
        rows.append(
            {
                "prompt": f"Count on from {number}.",
                "thinking": "\n".join(steps),
                "answer": str(number + len(steps)),
            }
        )
    return rows


def train_tiny(folder: Path, model: Path, test: int = 8, **settings: Any) -> None:
    """Train one step of the key on a tiny model: the run `folder/runs/tiny` of `tiny.yaml`.

    Four questions are asked; `settings` are others of the evaluation.
    """
    from sftkey.commands.train import train

    rows = folder / "rows.jsonl"
    write_rows(rows, made_rows(20))
    recipe = {
        "name": "tiny",
        "model": {"name_or_path": str(model), "quantization": "none"},
        "lora": {"r": 4, "target_modules": "all-linear"},
        "data": {"source": str(rows), "validation": 4, "test": test, "max_length": 512},
        "trainer": {"per_device_train_batch_size": 2, "max_steps": 1},
        "stages": [{"name": "key", "loss_on": "key"}],
        "eval": {"num_questions": 4, "max_new_tokens": 8, **settings},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(Path("tiny.yaml"))


def write_recipe(folder: Path, model: Path, /, rows: int = 40, **sections: Any) -> Path:
    """Write forty rows and a recipe over them: LoRA on a tiny model, both stages."""
    data_file = folder / "rows.jsonl"
    write_rows(data_file, made_rows(rows))
    recipe: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "model": {"name_or_path": str(model), "quantization": "none"},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"},
        "data": {"source": str(data_file), "validation": 8, "test": 8, "max_length": 512},
        "trainer": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "max_steps": 4,
            "logging_steps": 1,
            "save_steps": 2,
        },
        "stages": [
            {"name": "completion", "loss_on": "completion"},
            {"name": "key", "loss_on": "key", "trainer": {"learning_rate": 5e-4}},
        ],
        "eval": {"num_questions": 4, "max_new_tokens": 8, "grader": "number"},
    }
    recipe.update(sections)
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file
