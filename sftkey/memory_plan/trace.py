"""What a batch needs, by running the real model on torch's meta device: no weight, no number.

Modules, autograd and gradient checkpointing are those of transformers and torch; what they
allocate, and when they let go of it, is counted. Layers that are alike are run once, and count as
often as the model has them. What happens only on a real device is imitated (`meta`).
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sftkey.activity import activity
from sftkey.errors import ModelError, first_line
from sftkey.memory_plan.held import (
    BESIDE_LOGITS,
    CHUNK_TOKENS,
    DTYPE_BYTES,
    TILE_LOGITS,
    TILE_ROWS,
    WIDEST_TILE,
    Batch,
    Joint,
    Setting,
    named,
)
from sftkey.memory_plan.meta import META, Adapted, Device, Head, Memory, Nf4
from sftkey.models.facts import Skeleton
from sftkey.models.key_pass import ConstantContext, cache_name, checkpointed, shared_keys

CPU_TILES = 7  # copies of a tile of logits in the backward pass of TRL's head, without Triton
BESIDE_TILES = 6  # copies of such a tile in its backward pass: 5 measured, and one in 16 bits twice
TOKEN_INTEGERS = 4  # labels, segments, weights and targets; the trace sees the other inputs


@dataclass(frozen=True)
class Trace:
    """What a batch needs, in bytes, beside what is held and the output head."""

    kept: int  # when the forward pass is done: what autograd keeps, the inputs, the cache
    peak: int  # the most in the forward pass over what is trained and in the backward pass
    reading: int  # the most while a context is read without gradient; 0 where none is
    cache: int  # keys and values at the end of the forward pass


@activity("planning the memory")
@cache
def traced(skeleton: Skeleton, setting: Setting, batch: Batch) -> Trace:
    """Run a batch of a stage without its output head."""
    if setting.context == "exact" and batch.labelled:  # what is labelled is the head's affair
        return traced(skeleton, setting, replace(batch, labelled=0))
    try:
        return _tracer(skeleton, replace(setting, optimizer="", trained_rows=0)).trace(batch)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        what = f"its memory can't be planned: {type(error).__name__}: {first_line(error)}"
        raise ModelError(skeleton.name, what, "leave --gpu out") from error


@lru_cache(maxsize=16)
def _tracer(skeleton: Skeleton, setting: Setting) -> Tracer:
    return Tracer(skeleton, setting)


def head_bytes(skeleton: Skeleton, setting: Setting, batch: Batch) -> int:
    """Return what the output head needs: a tile of logits, states and gradients.

    On CUDA it is TRL's Triton kernel, which no trace sees into: this formula stands for it.
    """
    tokens, size = batch.rows * batch.labelled, DTYPE_BYTES[setting.compute]
    if batch.joint:
        tokens = max(tokens, batch.joint.rows * (batch.joint.keys - 1))
    weight = skeleton.model.get_output_embeddings().weight
    states = tokens * weight.shape[1] * (2 * size + 4)
    if setting.kind == "cpu":
        tile = min(TILE_LOGITS, tokens * WIDEST_TILE)
        tiles = (tile + CPU_TILES * min(tile, tokens * weight.shape[0])) * 4
    else:
        tiles = min(tokens, TILE_ROWS) * WIDEST_TILE * size
    if setting.keeps_start:
        every = batch.rows * batch.length
        states += 2 * every * weight.shape[1] * size  # of the start, and now
        rows = min(max(BESIDE_LOGITS // weight.shape[0], 1), every)
        tiles = max(tiles, BESIDE_TILES * rows * weight.shape[0] * 4)
    if setting.full:  # the head's own gradient, before it is added to what there is
        states += weight.numel() * 4
    return int(states + tiles)


class Tracer:
    """The model of one setting on the meta device, with its first layer and one of each kind."""

    def __init__(self, skeleton: Skeleton, setting: Setting) -> None:
        self.setting = setting
        self.model: Any = skeleton.build(setting.weights)
        self.config = self.model.config.get_text_config()
        self.decoder = self.model.get_decoder()
        targets, linear = (named(self.model, each) for each in (setting.targets, "all-linear"))
        carrying = set() if setting.full else {id(each) for each in targets}
        packed = {id(each) for each in linear} if setting.quantized else set()
        self.layers, self.extra = self._cut(carrying)
        self.model.requires_grad_(setting.full)
        self._dress(self.model, carrying, packed)
        self.decoder.train()
        if setting.checkpointing:
            self._checkpoint()
        for each in self.model.parameters():
            if each.requires_grad:
                each.grad = torch.empty_like(each)

    def _cut(self, carrying: set[int]) -> tuple[list[Any], list[int]]:
        """Leave the first layer and one of each kind; return how many more each stands for."""
        name, layers = layers_of(self.decoder, self.config.num_hidden_layers)
        types = getattr(self.config, "layer_types", None)
        kinds = [_kind(layer, carrying) for layer in layers]
        if types:
            kinds = list(zip(kinds, types, strict=True))
        last = {kind: number for number, kind in enumerate(kinds) if number}
        taken = [0, *sorted(last.values())]  # the first keeps less: embeddings may be frozen
        counts = Counter(kinds[1:])
        if types:
            self.config.layer_types = [types[number] for number in taken]
        self.config.num_hidden_layers = len(taken)
        cut = nn.ModuleList(layers[number] for number in taken)
        for place, layer in enumerate(cut):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    setattr(module, "layer_idx", place)  # noqa: B010  # typed as a module
        setattr(self.decoder, name, cut)
        return list(cut), [0, *(counts[kinds[number]] - 1 for number in taken[1:])]

    def _dress(self, module: nn.Module, carrying: set[int], packed: set[int]) -> None:
        """Put NF4 and adapters in the places of the modules that have them."""
        for name, child in list(module.named_children()):
            self._dress(child, carrying, packed)
            put: nn.Module = Nf4(child) if id(child) in packed else child
            if id(child) in carrying:
                put = Adapted(put, self.setting)
            if put is not child:
                setattr(module, name, put)

    def _checkpoint(self) -> None:
        """Switch gradient checkpointing on, as the trainer does."""
        again = lambda: (nullcontext(), Device(self.setting, None))  # noqa: E731
        settings = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": again}
        with warnings.catch_warnings():  # transformers is about to rename it
            warnings.simplefilter("ignore", FutureWarning)
            self.model.gradient_checkpointing_enable(settings)
        if not self.setting.full:
            self.model.enable_input_require_grads()

    def trace(self, batch: Batch) -> Trace:
        """Run a step without its output head."""
        parameters = list(self.model.parameters())
        held = [*parameters, *self.model.buffers()]
        held += [each.grad for each in parameters if each.grad is not None]
        memory = Memory(held, batch.padded)
        with attending(self.model, self.setting.attention):
            if self.setting.context == "exact":
                return self._exact(memory, batch)
            return self._behind_context(memory, batch)

    def _exact(self, memory: Memory, batch: Batch) -> Trace:
        """Run whole rows."""
        shape = (batch.rows, batch.length)
        with memory:
            ids = torch.empty(shape, dtype=torch.long, device=META)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if self.setting.attention.startswith("flash"):
                inputs = {"input_ids": ids.view(1, -1)}
            kept, peak = self._step(memory, inputs, [0] * len(self.layers))
        return Trace(kept, peak, 0, 0)

    def _step(self, memory: Memory, inputs: dict[str, Any], before: list[int]) -> tuple[int, int]:
        """Run forward and backward; return what is kept between them, and the peak of both.

        Each layer holds `before` already.
        """
        others = [torch.empty_like(inputs["input_ids"]) for _ in range(TOKEN_INTEGERS)]
        memory.phase = "forward"
        memory.peaks.clear()
        # Under checkpointing autocast's copies are gone when a layer needs the most.
        casts: dict[int, torch.Tensor] | None = None if self.setting.checkpointing else {}
        with self._marks(memory) as after, Device(self.setting, casts):
            use_cache = {"use_cache": "position_ids" in inputs}
            states = self.decoder(**{**use_cache, **inputs}).last_hidden_state
        loss = Head.apply(states)
        if self.setting.kind == "cpu":  # there the labelled states alone are left to the head
            del states
        kept = memory.live
        if casts:
            casts.clear()
        memory.phase = "head"
        states = None
        loss.backward()
        del others
        beyond = self._beyond(before, after)
        # When the backward pass comes to the first layer, the others have let go.
        peaks = (peak + beyond * (phase != 0) for phase, peak in memory.peaks.items())
        return kept + beyond, max(peaks)

    @contextmanager
    def _marks(self, memory: Memory) -> Iterator[list[int]]:
        """Yield the bytes that are alive after each layer, and tell where the backward pass is.

        A layer's input lives on in its caller until the layer is done; it doesn't count where
        nothing else has kept it when the next layer is done.
        """
        after: list[int] = []
        given: list[Any] = []

        def settle() -> None:
            if given and given[-1][0]() is None:
                after[-1] -= given[-1][1]

        def passed(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
            settle()
            number = len(after)
            after.append(memory.live)
            storage = (args[0] if args else kwargs["hidden_states"]).untyped_storage()
            given.append((weakref.ref(storage), storage.nbytes()))
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                states.register_hook(lambda _: setattr(memory, "phase", number))

        hooks = [layer.register_forward_hook(passed, with_kwargs=True) for layer in self.layers]
        yield after
        settle()
        for hook in hooks:
            hook.remove()

    def _beyond(self, before: list[int], after: list[int]) -> int:
        """Return what the layers hold that a layer here stands for."""
        each = [
            held + now - then
            for held, now, then in zip(before, after, [0, *after[:-1]], strict=True)
        ]
        return sum(count * size for count, size in zip(self.extra, each, strict=True))

    def _behind_context(self, memory: Memory, batch: Batch) -> Trace:
        """Read a context in pieces, then run keys on their caches, as sftkey.training.detached."""
        alone, joint = batch.alone, batch.joint or batch.alone
        members = max(len(self.setting.ranks), 1)
        with memory:
            cache: Any = DynamicCache(config=self.model.config)
            self._set_reading(True)
            with torch.no_grad(), Device(self.setting, {}):
                reading = self._read(memory, cache, batch, alone.context)
            self._set_reading(False)
            one = self._all([_cache_bytes(layer) for layer in cache.layers])
            contexts = alone.rows * alone.context
            reading += one * (joint.rows * joint.context - contexts) // contexts
            copies = 1 if self.setting.checkpointing else members
            if joint.rows * copies != alone.rows:
                _join(cache, joint, copies)
            before = [_cache_bytes(layer) for layer in cache.layers]
            start, stop = joint.context, joint.context + joint.keys
            inputs = self._columns(joint.rows * members, start, stop)
            if self.setting.checkpointing:  # computed anew, a layer finds its cache as it was
                cache.layers = [ConstantContext(layer, members) for layer in cache.layers]
            again = lambda layer: Device(self.setting, None)  # noqa: E731
            with shared_keys(), checkpointed(self.model, again, preserve_rng_state=False):
                kept, peak = self._step(memory, inputs | {cache_name(self.decoder): cache}, before)
            after = [_cache_bytes(layer) for layer in cache.layers]
        return Trace(kept, peak, reading, self._all(after))

    def _read(self, memory: Memory, cache: Any, batch: Batch, context: int) -> int:
        """Read the last piece of the context behind the others, and return the peak.

        The cache of the other pieces is filled with what one column leaves, many times over.
        """
        start = max(context - max(CHUNK_TOKENS // batch.rows, 1), 0)  # no piece is longer
        if start:
            self._run(batch.rows, 0, 1, cache)
        for layer in cache.layers if start > 1 else ():
            rows, heads, _, width = layer.keys.shape
            more = layer.keys.new_empty(rows, heads, start - 1, width)
            wide = layer.values.new_empty(rows, heads, start - 1, layer.values.shape[-1])
            layer.update(more, wide)
        held = [_cache_bytes(layer) if start else 0 for layer in cache.layers]
        memory.peaks.clear()
        with self._marks(memory) as after:
            self._run(batch.rows, start, context, cache)
        return max(memory.peaks.values()) + self._beyond(held, after)

    def _run(self, rows: int, start: int, stop: int, cache: Any) -> None:
        inputs = self._columns(rows, start, stop) | {cache_name(self.decoder): cache}
        self.decoder(**inputs, use_cache=True)

    def _columns(self, rows: int, start: int, stop: int) -> dict[str, Any]:
        """Return the inputs of some columns behind a cache of those before."""
        ids = torch.empty((rows, stop - start), dtype=torch.long, device=META)
        mask = torch.ones((rows, stop), dtype=torch.long, device=META)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": torch.empty_like(ids)}

    def _all(self, sizes: list[int]) -> int:
        return sum((more + 1) * size for more, size in zip(self.extra, sizes, strict=True))

    def _set_reading(self, reading: bool) -> None:
        """Say whether a context is read, where a frozen stage's own adapters don't act."""
        for each in self.model.modules():
            if isinstance(each, Adapted):
                each.reading = reading


def _join(cache: Any, joint: Joint, copies: int) -> None:
    """Let a cache hold the contexts of a joint pass, each so many times."""
    for layer in cache.layers:
        columns = joint.context
        if layer.is_sliding:
            columns = min(columns, layer.sliding_window - 1)
            layer.cumulative_length = joint.context
        for name in ("keys", "values"):
            held = getattr(layer, name)
            _, heads, _, width = held.shape
            setattr(layer, name, held.new_empty(joint.rows * copies, heads, columns, width))


def _cache_bytes(layer: Any) -> int:
    """Return what a layer's cache holds: of a sliding window all that its view was cut from."""
    storages = [each.untyped_storage() for each in (layer.keys, layer.values)]
    return sum({id(each): each.nbytes() for each in storages}.values())


@contextmanager
def attending(model: Any, attention: str) -> Iterator[None]:
    """Let a model attend as the kernels of flash attention, which need no mask, where so set."""
    if not attention.startswith("flash"):
        yield
        return

    def flash(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = flash
    model.config._attn_implementation = "flash_attention_2"
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["flash_attention_2"]


def layers_of(decoder: nn.Module, count: int) -> tuple[str, Any]:
    """Return the decoder's list of layers, and its name."""
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return name, child
    raise LookupError(f"{type(decoder).__name__} has no list of {count} layers")


def _kind(layer: nn.Module, carrying: set[int]) -> Any:
    """Describe a layer so that two that keep the same are described alike: all but its number."""
    return tuple(
        (
            name,
            type(module),
            id(module) in carrying,
            *(each.shape for each in module.parameters(recurse=False)),
            *(
                (key, value)
                for key, value in vars(module).items()
                if isinstance(value, bool | int | float | str) and "idx" not in key
            ),
        )
        for name, module in layer.named_modules()
    )
