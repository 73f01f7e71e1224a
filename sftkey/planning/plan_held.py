"""What a stage holds from its first step to its last: weights, adapters, gradients, optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from sftkey.planning.model_shape import ModelShape
from sftkey.planning.plan_setting import OPTIMIZERS, Setting

NF4_BLOCK, NESTED_BLOCK = 64, 256  # numbers with one absmax; absmaxes with one of their own
NF4_TABLES = 4 * (16 + 256 + 1)  # of a module: NF4's values, those of the absmaxes, their mean
SMALL_TENSOR = 4096  # numbers; smaller ones have their state in 32 bits
STATE_BLOCK = 256  # numbers of an 8-bit state with one float32 absmax
ADAPTER_BYTES = 4  # whatever is computed in, adapters are float32


def weight_bytes(shape: ModelShape, setting: Setting) -> int:
    """Count the base's weights: packed two in a byte where they are quantized."""
    others = (shape.numel_embeddings + shape.numel_small) * setting.weight_bytes
    if not setting.quantized:
        return others + shape.numel_linear * setting.weight_bytes
    return others + shape.layers * sum(-(-each.numel // 2) for each in shape.linears)


def constant_bytes(shape: ModelShape, setting: Setting) -> int:
    """Count what NF4 with double quantization keeps beside the packed weights."""
    if not setting.quantized:
        return 0
    blocks = [-(-each.numel // NF4_BLOCK) for each in shape.linears]
    nested = [4 * -(-count // NESTED_BLOCK) for count in blocks]
    return shape.layers * (sum(blocks) + sum(nested) + NF4_TABLES * len(blocks))


def adapter_bytes(shape: ModelShape, setting: Setting) -> int:
    """Count the adapters: what is trained, and what acts on a frozen context."""
    if setting.full:
        return 0
    pairs = sum(each.inputs + each.outputs for each in setting.adapted)
    context = setting.context_rank * pairs * shape.layers
    return ADAPTER_BYTES * (context + sum(trained(shape, setting)))


def gradient_bytes(shape: ModelShape, setting: Setting) -> int:
    """Count the gradients of all that is trained."""
    each = setting.weight_bytes if setting.full else ADAPTER_BYTES
    return each * sum(trained(shape, setting))


def optimizer_bytes(shape: ModelShape, setting: Setting) -> int:
    """Count the optimizer's state."""
    whole, states = OPTIMIZERS[setting.optimizer]
    sizes = list(trained(shape, setting))
    if not states:
        return whole * sum(sizes)
    small = sum(size for size in sizes if size < SMALL_TENSOR)
    blocks = sum(-(-size // STATE_BLOCK) for size in sizes if size >= SMALL_TENSOR)
    return whole * small + states * (sum(sizes) - small + 4 * blocks)


def trained(shape: ModelShape, setting: Setting) -> Iterator[int]:
    """Give the number of numbers in each tensor that is trained."""
    if setting.full:
        for _ in range(1 if shape.tied else 2):
            yield shape.vocabulary * shape.hidden
        yield shape.hidden
        for _ in range(shape.layers):
            yield from (each.numel for each in shape.linears)
            yield from (each.outputs for each in shape.linears if each.bias)
            yield from shape.norms
            yield from shape.head_norms
        return
    for _ in range(shape.layers):
        for each in setting.adapted:
            yield setting.rank * each.inputs
            yield setting.rank * each.outputs
    if setting.trained_rows:
        yield setting.trained_rows * shape.hidden
