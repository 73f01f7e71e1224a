"""What a batch needs beside what is held: activations, logits, the cache of a detached context.

Every term is what autograd keeps of one module, for one token: it was read off with
`torch.autograd.graph.saved_tensors_hooks`, in float32 and under autocast. Norms keep their input in
float32. The MLP keeps gate, act(gate) and up. Attention keeps queries, keys, values and outputs. An
adapter keeps its input, which modules share; dropout makes each its own copy, and so does autocast,
since peft widens the input first, but for NF4 modules on CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass

from sftkey.memory_plan.held import Setting
from sftkey.memory_plan.shape import ModelShape

# As sftkey.training has them (a test compares): importing them would import torch.
TILE_LOGITS, TILE_ROWS, WIDEST_TILE = 2**20, 4096, 32768
CONTEXT_TOKENS = 4096

FLOAT = 4
# Fitted: gradients of the MLP's width that are there at once, in float32 on a CPU, and NF4 on CUDA.
BACKWARD_WIDE, BACKWARD_WIDE_NF4 = 2.0, 1.0
FORWARD_WIDE = 4  # act(gate), up's product, the adapter's, and their sum
CPU_TILES = 8  # copies of a tile of logits in the backward pass of TRL's head, without Triton
TOKEN_INTEGERS = 6  # ids, mask, labels, segments, positions, targets


@dataclass(frozen=True)
class Batch:
    """The largest batch of a stage.

    Args:
        rows: How many.
        length: Tokens of each.
        labelled: Tokens of each that the loss is on.
        padded: Rows are of unequal lengths, so that attention needs a mask.
    """

    rows: int
    length: int
    labelled: int
    padded: bool = False

    @property
    def tokens(self) -> int:
        """The number of places in the batch."""
        return self.rows * self.length


@dataclass(frozen=True)
class Passing:
    """What a batch needs while it is computed, in bytes."""

    activations: float
    logits: float
    cache: float


def passing(shape: ModelShape, setting: Setting, batch: Batch) -> Passing:
    """Give what a batch needs at the moment when it needs most."""
    if setting.context != "exact":
        return _detached(shape, setting, batch)
    logits = _logits(shape, setting, batch)
    backward = batch.tokens * _backward(shape, setting)
    if not setting.checkpointing:
        return Passing(kept_bytes(shape, setting, batch) + max(backward - logits, 0), logits, 0)
    # The head is done before a layer is computed anew.
    inputs = shape.layers * batch.tokens * shape.hidden * _stream_bytes(setting)
    layer = max(_kept(shape, setting, batch, window) for window in shape.windows)
    kept = inputs + _once(shape, setting, batch)
    return Passing(kept + max(layer + backward - logits, 0), logits, 0)


def kept_bytes(shape: ModelShape, setting: Setting, batch: Batch) -> float:
    """Give what autograd keeps of all layers, beside what is held."""
    layers = sum(_kept(shape, setting, batch, window) for window in shape.windows)
    return layers + _once(shape, setting, batch)


def _kept(shape: ModelShape, setting: Setting, batch: Batch, window: int | None) -> float:
    """Give what autograd keeps of one layer."""
    masked = batch.padded or (window is not None and window < batch.length)
    attention = _attention(shape, setting, batch.length, masked)
    return batch.tokens * (_outside_attention(shape, setting) + attention)


def _outside_attention(shape: ModelShape, setting: Setting) -> float:
    """Give what norms, linear modules and the MLP keep of a token."""
    norms = sum(shape.norms) * FLOAT + len(shape.norms) * FLOAT
    if shape.traits.head_norms != "none":
        norms += (shape.queries + shape.keys) * FLOAT + (shape.heads + shape.groups) * FLOAT
    if setting.full:  # a norm's weight needs what it multiplies
        norms += sum(shape.norms) * FLOAT
        if shape.traits.head_norms != "none":
            size = FLOAT if shape.traits.norms == "around" else setting.compute_bytes  # Gemma's
            norms += (shape.queries + shape.keys) * size
    return norms + 3 * shape.wide * setting.compute_bytes + _inputs(shape, setting)


def _inputs(shape: ModelShape, setting: Setting) -> float:
    """Give what the linear modules keep of their inputs, for a token."""
    size = setting.compute_bytes
    if setting.full:
        own = {"self_attn.o_proj", "mlp.down_proj"}  # the only ones in the type that they take
        hidden = sum(each.inputs for each in shape.linears if each.name not in own)
        return (hidden if setting.mixed else 2 * shape.hidden) * size + shape.wide * size
    inputs = {each.name: each.inputs for each in setting.adapted}
    ranks = len(inputs) * setting.rank * size
    dropped = 0
    if setting.dropout:  # CUDA keeps what is dropped as truth values, a CPU as numbers
        dropped = sum(inputs.values()) * (1 if setting.kind == "cuda" else FLOAT)
    as_it_comes = setting.quantized and setting.kind == "cuda" and setting.weight_bytes == size
    if setting.dropout or (setting.mixed and not as_it_comes):
        return ranks + dropped + sum(inputs.values()) * size
    attended = any(name in inputs for name in _READS_HIDDEN[:4])
    shared = shape.hidden * (attended + any(name in inputs for name in _READS_HIDDEN[4:]))
    return ranks + (shared + inputs.get("mlp.down_proj", 0)) * size


_READS_HIDDEN = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.qkv_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.gate_up_proj",
)


def _attention(shape: ModelShape, setting: Setting, length: int, masked: bool) -> float:
    """Give what attention keeps of a token that stands in a row of some length."""
    size, queries, keys = setting.compute_bytes, shape.queries, shape.keys
    if setting.attention == "eager":
        caps = size if shape.config.get("attn_logit_softcapping") else 0
        weights = FLOAT + (size if setting.mixed else 0)
        copied = setting.dropout or setting.mixed  # then the output is kept as the next input
        output = setting.full or any(each.name == "self_attn.o_proj" for each in setting.adapted)
        widths = 3 + (output and (setting.full or not copied))
        return widths * queries * size + shape.heads * length * (weights + caps)
    kept = 2 * queries * size + shape.heads * FLOAT
    if masked and setting.attention == "sdpa":  # copies for all heads; the mask in numbers
        return kept + (2 * queries + length) * size
    if shape.traits.fused:
        return kept + (queries + queries + 3 * keys) * size
    return kept + 2 * keys * size


def _once(shape: ModelShape, setting: Setting, batch: Batch) -> float:
    """Give what is kept once: the last norm's input, places, masks, autocast's copies."""
    kept = batch.tokens * ((shape.hidden + 1) * FLOAT + TOKEN_INTEGERS * 8)
    kept += 2 * batch.length * shape.head * setting.compute_bytes
    if batch.padded and setting.attention != "flash_attention_2":
        kept += batch.tokens * batch.length
    if setting.mixed:
        copied = shape.numel_linear if setting.full else sum(_adapted(shape, setting))
        kept += copied * setting.compute_bytes
    return kept


def _adapted(shape: ModelShape, setting: Setting) -> list[int]:
    ranks = [setting.rank * (each.inputs + each.outputs) for each in setting.adapted]
    return [shape.layers * each for each in ranks]


def _stream_bytes(setting: Setting) -> int:
    """Give the size of a number that goes from layer to layer."""
    return max(setting.compute_bytes, setting.weight_bytes if setting.full else 0)


def _backward(shape: ModelShape, setting: Setting) -> float:
    """Give what a layer's backward pass holds of a token beside what autograd keeps."""
    wide = BACKWARD_WIDE_NF4 if setting.quantized else BACKWARD_WIDE
    return (wide * shape.wide + 2 * shape.hidden) * setting.compute_bytes


def _widened(shape: ModelShape, setting: Setting) -> int:
    """Give the size of the largest NF4 weight in the type that it is widened to, to be used."""
    if not setting.quantized:
        return 0
    return max(each.numel for each in shape.linears) * setting.compute_bytes


def _logits(shape: ModelShape, setting: Setting, batch: Batch) -> float:
    """Give what the head needs for the labelled tokens: a tile of logits, states, gradients."""
    tokens = batch.rows * batch.labelled
    states = tokens * shape.hidden * (2 * setting.compute_bytes + FLOAT)
    if setting.kind == "cpu":
        tile = min(TILE_LOGITS, tokens * WIDEST_TILE)
        tiles = (tile + CPU_TILES * min(tile, tokens * shape.vocabulary)) * FLOAT
    else:
        tiles = min(tokens, TILE_ROWS) * WIDEST_TILE * setting.compute_bytes
    if setting.full:  # the head's own gradient, before it is added to what there is
        states += shape.vocabulary * shape.hidden * FLOAT
    return states + tiles


def _detached(shape: ModelShape, setting: Setting, batch: Batch) -> Passing:
    """Give it for a context without gradient: read in pieces, then the key on its cache."""
    size, keys = setting.compute_bytes, batch.labelled + 1
    context = max(batch.length - keys, 1)
    per_token = 2 * shape.keys * size
    seen = [min(context, (window or context + 1) - 1) for window in shape.windows]
    rows = batch.rows * setting.members  # each adapter of a grid has a copy of the cache
    cache = rows * per_token * (sum(seen) + shape.layers * keys)
    pieces = -(-batch.tokens // CONTEXT_TOKENS)
    piece = min(batch.rows * context, CONTEXT_TOKENS)
    masked = batch.padded or pieces > 1 or any(each < context for each in seen)
    reading = piece * (FORWARD_WIDE * shape.wide + 3 * shape.hidden) * size
    if masked:  # keys and values are copied for all heads, the mask is written in numbers
        copies = 2 * batch.rows * context * shape.queries * size + piece * context * size
        attending = piece * (3 * shape.hidden + 2 * shape.queries + 2 * shape.keys) * size
        reading = max(reading, attending + copies) + piece * context
    key = rows * keys
    layer = _outside_attention(shape, setting) + 3 * shape.queries * size + shape.heads * FLOAT
    mask = key * batch.length * (size * shape.heads // shape.groups + 1)
    kept = key * layer * shape.layers + mask + rows * per_token * batch.length
    of_key = Batch(rows, keys, batch.labelled)
    kept += _once(shape, setting, of_key)
    logits = _logits(shape, setting, of_key)
    computing = kept + max(key * _backward(shape, setting) - logits, 0)
    return Passing(max(computing, reading - logits) + _widened(shape, setting), logits, cache)
