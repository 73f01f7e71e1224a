"""Key stages that let no gradient through the context."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import distributed
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sftkey.data.labels import IGNORED
from sftkey.errors import ModelError
from sftkey.generation.generate import inferring
from sftkey.memory_plan.held import CHUNK_TOKENS
from sftkey.models.adapters import without_adapters
from sftkey.models.key_pass import (
    ConstantContext,
    GroupedAttention,
    cache_name,
    checkpointed,
    is_checkpointed,
    join,
    joining,
    shared_keys,
)

KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True)
class Aligned:
    """A batch whose rows are shifted to the right so far that all keys begin in one column."""

    # `(B, C + K)`: C columns of context, filled up on the left, and K of the key, filled up on the
    # right.
    input_ids: torch.Tensor
    attention_mask: torch.Tensor  # `(B, C + K)`; 0 where it is filled up
    position_ids: torch.Tensor  # `(B, C + K)`: each token's place in its own row
    labels: torch.Tensor  # `(B, K)`, the token that each column of the key predicts, or -100
    starts: torch.Tensor  # `(B,)`, where the key's columns begin in the row as it came

    @property
    def num_context(self) -> int:
        """Return the number of context columns."""
        return self.input_ids.shape[1] - self.labels.shape[1]


Keep = Callable[[Aligned, Any, Callable[[], DynamicCache]], DynamicCache]


def align(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    least_context: int = 0,
    starts: torch.Tensor | None = None,
) -> Aligned:
    """Shift rows that are filled up on the right so that their keys begin in one column.

    Args:
        input_ids: `(B, T)`.
        attention_mask: `(B, T)`.
        labels: `(B, T)`, at each position the token that it predicts, or -100.
        least_context: Make C at least so large.
        starts: `(B,)`, where the key's columns begin in each row; by default at the first label.

    >>> ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]])
    >>> labels = torch.tensor([[-100, -100, 4, 5, -100], [-100, 3, -100, -100, -100]])
    >>> aligned = align(ids, (ids > 0).long(), labels)
    >>> aligned.input_ids
    tensor([[1, 2, 3, 4, 5],
            [1, 1, 2, 3, 0]])
    >>> aligned.attention_mask
    tensor([[1, 1, 1, 1, 1],
            [0, 1, 1, 1, 0]])
    >>> aligned.labels
    tensor([[   4,    5, -100],
            [   3, -100, -100]])
    """
    lengths = attention_mask.sum(1)
    if starts is None:
        labelled = labels != IGNORED
        starts = torch.where(labelled.any(1), labelled.int().argmax(1), lengths - 1)
    # C columns of context and as many of key as the longest one has; a row's key begins at C.
    num_context = max(int(starts.max()), least_context)
    num_key = int((lengths - starts).max())
    # Where each column's token stands in its row; negative or behind its end: nothing stands there.
    places = starts[:, None] + torch.arange(-num_context, num_key, device=starts.device)
    outside = (places < 0) | (places >= lengths[:, None])
    source = places.clamp(0, input_ids.shape[1] - 1)
    return Aligned(
        input_ids.gather(1, source),
        (~outside).to(attention_mask.dtype),
        places.clamp(min=0).minimum(lengths[:, None] - 1),  # what fills up takes no new place
        labels.gather(1, source).masked_fill(outside, IGNORED)[:, num_context:],
        starts,
    )


@dataclass(frozen=True)
class ReadContext:
    """A micro-batch whose context has been read without gradient, and whose key waits."""

    batch: Aligned
    cache: DynamicCache  # what the model keeps of the context
    length: int  # T, tokens of the rows as they came


def _restored(values: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """Put values of the key's columns, `(…, B, K)`, where the tokens came from: `(…, B, T)`."""
    columns = torch.arange(length, device=values.device) - starts[:, None].to(values.device)
    outside = (columns < 0) | (columns >= values.shape[-1])
    source = columns.clamp(0, values.shape[-1] - 1).expand(*values.shape[:-1], length)
    return values.gather(-1, source).masked_fill(outside, 0)


def read_context(
    model: PreTrainedModel,
    labels: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    key_starts: torch.Tensor | None = None,
    context_cache: Keep | None = None,
) -> ReadContext:
    """Read what lies before the keys of a micro-batch.

    Args:
        model: The causal language model.
        labels: `(B, T)`, at each position the token that it predicts, or -100.
        input_ids: `(B, T)`, filled up on the right.
        attention_mask: `(B, T)`.
        key_starts: `(B,)`: from this token of a row on, the model's key adapters act, too.
        context_cache: Keeps what is read of contexts: `ContextCache.read`.

    Raises:
        ModelError: The model doesn't use the cache that it is given.
    """
    num_chunks = _num_chunks(input_ids)
    batch = align(input_ids, attention_mask, labels, num_chunks, key_starts)
    make = partial(_read_context, model, batch, num_chunks, exact=key_starts is not None)
    cache = context_cache(batch, model.config, make) if context_cache else make()
    return ReadContext(batch, cache, input_ids.shape[1])


def key_losses(
    model: PreTrainedModel,
    head: Callable[..., torch.Tensor],
    read: Sequence[ReadContext],
    key_adapters: Sequence[str] = (),
) -> list[torch.Tensor]:
    """Score the labels of several micro-batches in one pass, with gradient through the keys alone.

    Args:
        model: The causal language model.
        head: Runs it on its inputs and scores the labels it is given, and maybe more.
        read: The micro-batches; their caches are used up.
        key_adapters: They act on the keys. Of several (a grid), each scores a copy of its own.

    Returns:
        Of each micro-batch the `(B, T)` losses, 0 where there is no label; for N key adapters
        `(N * B, T)`. Where the head gives more of each place, `(1 + n, …)`.
    """
    copies = max(len(key_adapters), 1)
    joined = _joined([each.batch for each in read])
    batch, start = _joined([joined] * copies), joined.num_context
    anew = is_checkpointed(model)
    cache = join([each.cache for each in read], 1 if anew else copies)
    if anew:
        cache.layers = [ConstantContext(layer, copies) for layer in cache.layers]
    attention = GroupedAttention()

    @contextmanager
    def acting_in(part: torch.nn.Module) -> Iterator[None]:
        with shared_keys(attention), joining(model, key_adapters, within=part):
            yield

    with checkpointed(model, acting_in), acting_in(model):
        found = head(
            batch.labels,
            input_ids=batch.input_ids[:, start:],
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids[:, start:],
            **{cache_name(model.base_model): cache},
        )
    sizes = [len(each.batch.labels) for each in read]
    parts = found.unflatten(-2, (copies, sum(sizes))).split(sizes, dim=-2)
    losses = []
    for each, part in zip(read, parts, strict=True):
        own = part[..., : each.batch.labels.shape[1]].flatten(-3, -2)
        losses.append(_restored(own, each.batch.starts.repeat(copies), each.length))
    return losses


def _joined(batches: Sequence[Aligned]) -> Aligned:
    """Put the rows of several batches one behind another, all their keys beginning in one column.

    >>> ids = torch.tensor([[1, 2, 3, 4]])
    >>> one = Aligned(ids[:, :3], torch.ones(1, 3), ids[:, :3] - 1, ids[:, 2:3], torch.tensor([2]))
    >>> two = Aligned(ids, torch.ones(1, 4), ids - 1, ids[:, 1:], torch.tensor([1]))
    >>> _joined([one, two]).input_ids
    tensor([[1, 2, 3, 0, 0],
            [0, 1, 2, 3, 4]])
    """
    if len(batches) == 1:
        return batches[0]
    num_context = max(batch.num_context for batch in batches)
    num_key = max(batch.labels.shape[1] for batch in batches)
    filled = []
    for batch in batches:
        behind = num_key - batch.labels.shape[1]
        whole = (batch.input_ids, batch.attention_mask, batch.position_ids)
        filled.append(
            (
                *(pad(each, (num_context - batch.num_context, behind)) for each in whole),
                pad(batch.labels, (0, behind), value=IGNORED),
                batch.starts,
            )
        )
    return Aligned(*(torch.cat(parts) for parts in zip(*filled, strict=True)))


@torch.no_grad()
def _read_context(
    model: PreTrainedModel, batch: Aligned, num_chunks: int, exact: bool
) -> DynamicCache:
    """Fill a cache with the context's keys and values, chunk by chunk; `exact`: without dropout."""
    cache = DynamicCache(config=model.config)
    with inferring(model) if exact else nullcontext():
        for columns in torch.arange(batch.num_context).tensor_split(num_chunks):
            start, stop = int(columns[0]), int(columns[-1]) + 1
            model.base_model(
                input_ids=batch.input_ids[:, start:stop],
                attention_mask=batch.attention_mask[:, :stop],
                position_ids=batch.position_ids[:, start:stop],
                use_cache=True,
                **{cache_name(model.base_model): cache},
            )
            if cache.get_seq_length() != stop:
                raise _unfit(model, "doesn't keep its context in transformers' cache")
    return cache


def _num_chunks(input_ids: torch.Tensor) -> int:
    """Return the number of passes: the same in all processes; sharded layers meet in each."""
    num_chunks = torch.tensor(-(-input_ids.numel() // CHUNK_TOKENS), device=input_ids.device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(num_chunks, distributed.ReduceOp.MAX)
    return int(num_chunks)


def refuse_other_caches(model: PreTrainedModel | PeftModel) -> None:
    """Refuse a model whose layers keep something else of a context than keys and values."""
    if kept := other_caches(model):
        raise _unfit(model, f"keeps of a context more than keys and values: {kept}")


def other_caches(model: PreTrainedModel | PeftModel) -> str | None:
    """Name what a model's layers keep of a context beside keys and values; None: nothing."""
    layers = {type(each) for each in DynamicCache(config=model.config).layers}
    others = sorted(each.__name__ for each in layers.difference(KEYS_AND_VALUES))
    stateful: bool = without_adapters(model)._is_stateful
    return ", ".join(others) or ("a state of its own" if stateful else None)


def _unfit(model: PreTrainedModel | PeftModel, what: str) -> ModelError:
    family = model.config.model_type
    return ModelError(family, f"a model of this family {what}", "write context: exact in the stage")
