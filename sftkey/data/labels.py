"""Which tokens are trained: the one place that decides it."""

from collections.abc import Mapping

import torch

from sftkey.data.response import Segment
from sftkey.recipe.loss_on import GROUPS, loss_weights

IGNORED = -100  # torch's cross-entropy skips labels of this value
PADDING = -1  # the segment of a token that only fills up a batch
COMPLETION, KEY = (
    tuple(Segment[name.upper()] for name in GROUPS[group]) for group in ("completion", "key")
)


def weights_by_segment(loss_on: str | Mapping[str, float]) -> tuple[float, ...]:
    """Return the weight of each segment in the loss, by `Segment`'s number.

    >>> weights_by_segment("key")
    (0.0, 0.0, 1.0, 1.0, 1.0)
    """
    weights = loss_weights(loss_on)
    return tuple(weights[segment.name.lower()] for segment in Segment)


def weights_at(segment_ids: torch.Tensor, by_segment: tuple[float, ...]) -> torch.Tensor:
    """Return the weight of each token in float32, by its segment; 0 where it is `PADDING`."""
    table = torch.tensor((*by_segment, 0.0), dtype=torch.float32, device=segment_ids.device)
    return table[segment_ids]  # -1 finds the last entry


def labels_for(
    input_ids: torch.Tensor, segment_ids: torch.Tensor, loss_on: str | Mapping[str, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the labels and loss weights of tokens, from nothing but the segments they belong to.

    A label stands at its own token's place; whoever computes the loss shifts labels and weights
    alike. Padding is told by its segment, never by its id: where a tokenizer pads with the end of
    turn, the end of turn is trained all the same.

    Args:
        input_ids: (…, T) token ids.
        segment_ids: (…, T) values of `Segment`, or `PADDING`.
        loss_on: `completion`, `key`, `answer`, or weights by segment or group.

    Returns:
        labels (…, T), the id where a token is trained, else -100; weights (…, T) in float32, 0
        exactly where the label is -100.

    >>> ids = torch.tensor([[11, 12, 13, 14, 2, 2]])
    >>> segments = torch.tensor([[0, 1, 2, 3, 4, PADDING]])
    >>> labels_for(ids, segments, "key")
    (tensor([[-100, -100,   13,   14,    2, -100]]), tensor([[0., 0., 1., 1., 1., 0.]]))
    >>> labels_for(ids, segments, {"thinking": 0.5, "answer": 1.0})[1]
    tensor([[0.0000, 0.5000, 0.0000, 1.0000, 0.0000, 0.0000]])
    """
    weights = weights_at(segment_ids, weights_by_segment(loss_on))
    return torch.where(weights > 0, input_ids, IGNORED), weights
