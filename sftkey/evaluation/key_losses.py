"""The loss of a key behind a given context: one forward pass, and of its tokens alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import DynamicCache

from sftkey.generation.generate import inferring
from sftkey.generation.key_switch import cache_name
from sftkey.models.key_adapter import KEY, acting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sftkey.generation.key_switch import Switch

BATCH_TOKENS = 4096  # padding counted
IGNORED = -100


@dataclass(frozen=True)
class Context:
    """Token ids up to the last one of a thinking, and those of the key that is scored behind it."""

    before: list[int]
    key: list[int]


def key_losses(
    model: PreTrainedModel | PeftModel, contexts: Sequence[Context], switch: Switch | None = None
) -> list[float]:
    """Give the loss of each key in nats, summed over its tokens; nothing before it counts.

    Args:
        model: On its device.
        contexts: None of them empty before its key.
        switch: From `find_switch`: which adapters read a context; its last token and the key are
            read with the key adapter, too.
    """
    losses = [0.0] * len(contexts)
    with inferring(model), torch.no_grad():
        for batch in _batches(contexts):
            found = _batch_losses(model, [contexts[n] for n in batch], switch)
            for position, loss in zip(batch, found.tolist(), strict=True):
                losses[position] = loss
    return losses


def _batches(contexts: Sequence[Context]) -> Iterator[list[int]]:
    """Put contexts of similar lengths together, so many as their tokens allow."""
    lengths = [len(context.before) + len(context.key) for context in contexts]
    batch: list[int] = []
    for position in sorted(range(len(contexts)), key=lambda n: lengths[n]):
        if batch and lengths[position] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def _batch_losses(model: Any, contexts: Sequence[Context], switch: Switch | None) -> torch.Tensor:
    """Score one batch: `(B,)`.

    Contexts end in one column, filled up on the left, and keys begin there, filled up on the right.
    """
    heads = [context.before[:-1] for context in contexts]
    tails = [[context.before[-1], *context.key] for context in contexts]
    length, width = max(map(len, heads)), max(map(len, tails))
    head = torch.tensor([[0] * (length - len(ids)) + ids for ids in heads]).long()
    tail = torch.tensor([ids + [0] * (width - len(ids)) for ids in tails])
    mask = torch.tensor(
        [
            [0] * (length - len(before))
            + [1] * (len(before) + len(after))
            + [0] * (width - len(after))
            for before, after in zip(heads, tails, strict=True)
        ]
    )
    labels = [context.key + [IGNORED] * (width - 1 - len(context.key)) for context in contexts]
    head, tail, mask = (each.to(model.device) for each in (head, tail, mask))
    logits = (
        _logits(model, torch.cat([head, tail], dim=1), mask, width)
        if switch is None
        else _switching_logits(model, head, tail, mask, switch)
    )
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2),
        torch.tensor(labels, device=logits.device),
        ignore_index=IGNORED,
        reduction="none",
    ).sum(1)


def _switching_logits(
    model: Any, head: torch.Tensor, tail: torch.Tensor, mask: torch.Tensor, switch: Switch
) -> torch.Tensor:
    """Read the context with the adapters that wrote it, then the key with the key's as well."""
    cache = DynamicCache(config=model.config)
    length = head.shape[1]
    if length:
        with acting(model, switch.context):
            _logits(model, head, mask[:, :length], 1, cache)
    with acting(model, [*switch.context, KEY]):
        return _logits(model, tail, mask, tail.shape[1], cache)


def _logits(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, width: int, cache: DynamicCache | None = None
) -> torch.Tensor:
    """Give the logits of the last columns: `(B, width, V)`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    taken = inspect.signature(base.forward).parameters
    places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    given = {"position_ids": places, "logits_to_keep": width}
    inputs = {name: value for name, value in given.items() if name in taken}
    if cache is not None:
        inputs[cache_name(model)] = cache
    output = model(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **inputs)
    logits: torch.Tensor = output.logits[:, -width:]
    return logits
