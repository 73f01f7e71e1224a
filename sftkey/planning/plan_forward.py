"""What passes without gradient need: the reading of a context, validation, and answers."""

from __future__ import annotations

from dataclasses import dataclass

from sftkey.planning.model_shape import ModelShape
from sftkey.planning.plan_setting import Setting

# As sftkey.training has them (a test compares): importing them would import torch.
TILE_LOGITS, TILE_ROWS, WIDEST_TILE = 2**20, 4096, 32768

FLOAT = 4
FORWARD_WIDE = 4  # act(gate), up's product, the adapter's, and their sum
FORWARD_HIDDEN = 3  # what goes from layer to layer, its norm, and a part of either
CPU_TILES = 8  # copies of a tile of logits in the backward pass of TRL's head, without Triton


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


def reading_bytes(
    shape: ModelShape, setting: Setting, tokens: int, seen: int, rows: int, masked: bool
) -> float:
    """Give what a pass holds at its widest: in the MLP, and of attention what the mask costs.

    Args:
        shape: The model's.
        setting: The stage's.
        tokens: In all rows, of the pass.
        seen: Tokens of a row that the last one attends to.
        rows: How many there are.
        masked: Attention has a mask, for which keys and values are copied for all heads.
    """
    size = setting.compute_bytes
    needed = tokens * (FORWARD_WIDE * shape.wide + FORWARD_HIDDEN * shape.hidden) * size
    if masked and setting.attention == "sdpa":
        needed += 2 * rows * seen * shape.queries * size + tokens * seen * (1 + size)
    if setting.attention == "eager":
        needed += tokens * seen * shape.heads * (FLOAT + size)
    return needed


def head_bytes(shape: ModelShape, setting: Setting, tokens: int, gradient: bool = True) -> float:
    """Give what the head needs for labelled tokens: a tile of logits, states, gradients."""
    states = tokens * shape.hidden * setting.compute_bytes
    if gradient:
        states += tokens * shape.hidden * (setting.compute_bytes + FLOAT)
    if setting.full and gradient:  # the head's own, before it is added to what there is
        states += shape.vocabulary * shape.hidden * FLOAT
    if setting.kind == "cuda":
        return states + min(tokens, TILE_ROWS) * WIDEST_TILE * setting.compute_bytes
    tile = min(TILE_LOGITS, tokens * WIDEST_TILE)
    return states + (tile + CPU_TILES * min(tile, tokens * shape.vocabulary)) * FLOAT


def validation(shape: ModelShape, setting: Setting, batch: Batch) -> Passing:
    """Give what a batch of validation rows needs."""
    windows = [window or batch.length for window in shape.windows]
    masked = batch.padded or min(windows) < batch.length
    needed = reading_bytes(shape, setting, batch.tokens, batch.length, batch.rows, masked)
    return Passing(needed, head_bytes(shape, setting, batch.tokens, gradient=False), 0)


def answers(shape: ModelShape, setting: Setting, rows: int, prompt: int, written: int) -> Passing:
    """Give what writing needs: the larger of reading the prompts and the last token.

    A layer's cache is there twice while a token is added to it, and keys and values of all heads
    are copied under a mask.
    """
    size, length = setting.compute_bytes, prompt + written
    per_token = 2 * shape.keys * size
    seen = [min(length, window or length) for window in shape.windows]
    reading = reading_bytes(shape, setting, rows * prompt, prompt, rows, masked=True)
    logits = rows * shape.vocabulary * (size + FLOAT)
    cache = rows * per_token * sum(seen)
    adding = rows * length * per_token
    # While prompts are read the cache holds no more than them.
    spared = rows * per_token * sum(each - min(each, prompt) for each in seen)
    return Passing(max(adding, reading - spared), logits, cache)
