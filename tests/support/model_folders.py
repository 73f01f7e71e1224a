"""Folders with a model's config and tokenizer, and no weights: what `sftkey adapt` needs."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def model_folder(
    folder: Path, tokenizer: Any, stops: Sequence[str] | None = None, **config: Any
) -> str:
    """Write a small model's config, its tokenizer and, with `stops`, its generation config."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SMALL | config))
    if stops is not None:
        ids = tokenizer.convert_tokens_to_ids(list(stops))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return str(folder)


def write_rows(file: Path, rows: Iterable[Any]) -> str:
    """Write rows into a file, a line each."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def sums(count: int) -> list[dict[str, Any]]:
    """Make rows of a question, its reasoning and its answer."""
    return [
        {
            "question": f"What is {n} + {n}?",
            "cot": f"{n} and {n} make {2 * n}.",
            "answer": str(2 * n),
        }
        for n in range(count)
    ]
