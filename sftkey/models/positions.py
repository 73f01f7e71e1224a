"""Positions that are scaled by a batch's longest row: which models have them, from where on."""

from __future__ import annotations

from typing import Any

SCALED = ("dynamic", "longrope")


def mixing_length(config: Any) -> int | None:
    """Return the tokens up to which a row's numbers don't depend on the rows beside it.

    Dynamic NTK scaling and longrope choose the frequencies of a whole batch by its longest row.
    None: this model does no such thing.

    Args:
        config: The model's.
    """
    text: Any = config.get_text_config()
    told = getattr(text, "rope_parameters", None) or {}
    lengths = [
        each.get("original_max_position_embeddings") or text.max_position_embeddings
        for each in (told, *told.values())  # one for all layers, or one for each kind of layer
        if isinstance(each, dict) and any(kind in str(each.get("rope_type")) for kind in SCALED)
    ]
    return min(lengths, default=None)
