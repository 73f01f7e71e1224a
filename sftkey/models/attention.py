"""Attention to a long context that copies no keys and values for the sake of the query heads.

Under a mask, transformers' SDPA repeats the keys and values of grouped-query attention once for
each head of a group, and autograd keeps the copies: four times the cache on a Qwen3-8B. SDPA itself
makes numbers of a mask of truth values, which autograd keeps, too, once for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def shared_keys(attention: GroupedAttention | None = None) -> Iterator[None]:
    """Let the models that attend with SDPA do so without the copies.

    Args:
        attention: Of a pass that is gone through again, whose masks it has made.
    """
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention or GroupedAttention()
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # transformers' own shows again


class GroupedAttention:
    """Attends as transformers' SDPA does, in one pass of a model."""

    def __init__(self) -> None:
        self._masks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend; the queries of a group's heads stand in one row, one head behind another.

        Args:
            module: The attention layer.
            query: `(B, heads, T, D)`.
            key: `(B, groups, S, D)`.
            value: `(B, groups, S, D)`.
            attention_mask: `(B, 1, T, S)`, or none.
            dropout: As in transformers.
            scaling: As in transformers.
            kwargs: As in transformers.

        Returns:
            `(B, T, heads, D)`, and nothing in the place of weights.
        """
        rows, heads, length, _ = query.shape
        groups = key.shape[1]
        of_all_heads = attention_mask is not None and attention_mask.shape[1] == 1
        if not of_all_heads or kwargs.get("position_bias") is not None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, **kwargs
            )
        assert attention_mask is not None
        found = scaled_dot_product_attention(
            query.reshape(rows, groups, heads // groups * length, -1),
            key,
            value,
            attn_mask=self._grouped(attention_mask, heads // groups, query.dtype),
            dropout_p=dropout,
            scale=scaling,
        )
        return found.reshape(rows, heads, length, -1).transpose(1, 2).contiguous(), None

    def _grouped(self, mask: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the mask of a group's queries as numbers; all layers share the tensor."""
        if id(mask) not in self._masks:
            numbers = mask
            if mask.dtype == torch.bool:
                numbers = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
                numbers = numbers.masked_fill_(~mask, float("-inf"))
            self._masks[id(mask)] = (mask, numbers.repeat(1, 1, size, 1))  # its id stays its own
        return self._masks[id(mask)][1]
