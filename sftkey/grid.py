"""The adapters that a frozen key stage trains side by side: one, or those of its grid."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftkey.recipe import Recipe, StageSection

# What peft does to rows of the vocabulary or to whole modules acts on all tokens.
ON_ALL_TOKENS = ("trainable_token_indices", "modules_to_save")


@dataclass(frozen=True)
class Member:
    """One adapter of a frozen stage.

    Args:
        name: peft's name of it.
        chosen: What the grid says of it: learning_rate, r, seed.
        lora: `peft.LoraConfig`'s fields.
        learning_rate: Its own; None: that of the trainer's settings.
        seed: Of its first weights.
    """

    name: str
    chosen: dict[str, Any]
    lora: dict[str, Any]
    learning_rate: float | None
    seed: int


def members(recipe: Recipe, stage: StageSection) -> list[Member]:
    """Give the adapters of a frozen stage; those of a grid are all combinations of its values."""
    own = stage.lora if stage.lora is not None else recipe.lora
    lora = {key: value for key, value in (own or {}).items() if key not in ON_ALL_TOKENS}
    grid = stage.grid or {}
    combined = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return [
        Member(
            "key" if len(combined) == 1 else f"key-{number}",
            chosen,
            lora | ({"r": chosen["r"]} if "r" in chosen else {}),
            chosen.get("learning_rate"),
            chosen.get("seed", recipe.seed),
        )
        for number, chosen in enumerate(combined)
    ]
