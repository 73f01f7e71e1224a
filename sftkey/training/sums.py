"""Losses by segment: their sums, and the means that logs and results show."""

from __future__ import annotations

import torch

from sftkey.data.response import Segment


def segment_sums(losses: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Sum losses and count tokens by segment.

    Args:
        losses: `(B, T)`, nats.
        segment_ids: `(B, T)`; `PADDING` where a token doesn't count.

    Returns:
        `(2, 5)`: for each `Segment` the sum of its losses, and its number of tokens.

    >>> segment_sums(torch.tensor([[0.5, 1.5, 9.0]]), torch.tensor([[3, 3, -1]]))[:, Segment.ANSWER]
    tensor([2., 2.])
    """
    return row_sums(losses, segment_ids).sum(0)


def row_sums(losses: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Sum losses and count tokens by segment, as `segment_sums`, of each row: `(B, 2, 5)`."""
    member = torch.nn.functional.one_hot((segment_ids + 1).long(), len(Segment) + 1)[..., 1:]
    member = member.to(losses.dtype if losses.dtype == torch.float64 else torch.float32)
    return torch.stack([(losses[..., None] * member).sum(1), member.sum(1)], dim=1)


def segment_means(sums: torch.Tensor) -> dict[str, float]:
    """Name the mean loss of each segment that has tokens, from `segment_sums`."""
    return {
        segment.name.lower(): (sums[0, segment] / sums[1, segment]).item()
        for segment in Segment
        if sums[1, segment] > 0
    }
