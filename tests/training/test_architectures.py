"""Recipes run through on tiny random models of their families' architectures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from sftkey.evaluation.grading import grade
from sftkey.training.run import start
from tests.support.families import FAMILIES
from tests.support.recipe_rows import loaded

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": None,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-r1-distill-qwen-1.5b/openr1-math-220k": ("Qwen2", {}),
    "falcon3-1b-instruct/gsm8k": ("Llama", {}),
    "gemma-3-1b-it/gsm8k": ("Gemma3Text", {"head_dim": 8}),
    "gpt-oss-20b/gsm8k": (
        "GptOss",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "granite-3.3-2b-instruct/gsm8k": ("Granite", {"logits_scaling": 8.0}),
    "lfm2-1.2b/gsm8k": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "mistral-7b-instruct-v0.3/gsm8k": ("Mistral", {}),
    "olmo-2-1b-instruct/gsm8k": ("Olmo2", {}),
    "phi-4-mini-instruct/gsm8k": ("Phi3", {}),
    "qwen2.5-1.5b/openbookqa": ("Qwen2", {}),
    "qwen2.5-1.5b/paper": ("Qwen2", {}),
    "qwen3-4b/gsm8k": ("Qwen3", {"head_dim": 8}),
    "smollm3-3b-base/gsm8k": ("SmolLM3", {}),
}
FEW_STEPS = [
    "trainer.max_steps=2",
    "trainer.per_device_train_batch_size=2",
    "trainer.gradient_accumulation_steps=1",
    "trainer.use_cpu=true",
    "eval.num_questions=2",
    "eval.max_new_tokens=8",
]


def save_tiny_model(name: str, folder: Path) -> None:
    """Write a random model of two layers, over the vocabulary that stands in for the family's."""
    family = FAMILIES[Path(name).parts[0]]
    tokenizer = family.standing_in()
    kind, more = CONFIGS[name]
    settings = {**TINY, **more, "vocab_size": len(tokenizer)}
    config = getattr(transformers, f"{kind}Config")(eos_token_id=tokenizer.eos_token_id, **settings)
    family.save(tokenizer, folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_recipe_runs_on_its_architecture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized or not, as the recipe says, both stages train and every stage answers."""
    save_tiny_model(name, tmp_path)
    recipe = loaded(f"{name}.yaml", tmp_path, monkeypatch, FEW_STEPS)
    run = start(recipe, tmp_path / "run", grade=grade)
    assert list(run.stages()) == ["base", "completion", "key"]
    for record in run.ledger.stages:
        (log,) = run.ledger.folder.glob(f"stages/*-{record.name}/log.jsonl")
        losses = [json.loads(line).get("loss") for line in log.read_text().splitlines()]
        assert all(loss > 0 for loss in losses if loss is not None)
        assert any(loss is not None for loss in losses)
