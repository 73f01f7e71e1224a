"""The largest batches of a stage: how many rows, how long, and how many keys go together."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sftkey.recipe.loss_on import trained_context
from sftkey.recipe.schema import CONTEXT_OF_KEY, Recipe, StageSection
from sftkey.recipe.stages import trainer_setting

KEY_TOKENS = 128  # of a row's key, where no data were read
# How training cuts up what goes through a model, or its head, at once.
CHUNK_TOKENS = 4096  # of a batch's context in one pass; what a pass computes is freed after it
TILE_LOGITS = 2**20  # on a CPU: so many logits at once stay in its cache (4 MiB in float32)
TILE_ROWS = 4096  # TRL's tiles hold so many tokens at most
NARROWEST_TILE, WIDEST_TILE = 256, 32768  # entries of the vocabulary
BESIDE_LOGITS = 2**24  # at once of what is computed beside the losses (64 MiB in float32)


@dataclass(frozen=True)
class Joint:
    """A pass over the keys of several micro-batches, whose contexts are held meanwhile."""

    rows: int  # how many
    context: int  # tokens before the key of each
    keys: int  # tokens of each key


@dataclass(frozen=True)
class Batch:
    """The largest batch of a stage."""

    rows: int  # how many
    length: int  # tokens of each
    labelled: int  # tokens of each that the loss is on
    padded: bool = False  # rows are of unequal lengths, so that attention needs a mask
    # Behind a context, what goes through the model at once; by default the batch alone.
    joint: Joint | None = None

    @property
    def alone(self) -> Joint:
        """The pass over the batch's own keys, and the token before each."""
        keys = self.labelled + 1
        return Joint(self.rows, max(self.length - keys, 1), keys)


def joint_pass(batch: Batch, micro_batches: int, copies: int, most_tokens: int) -> Joint:
    """Return the largest pass over keys that a step has with rows of a length, or shorter ones.

    Shorter rows have as long keys, so that more of these go together.

    Args:
        batch: A micro-batch.
        micro_batches: Of a step.
        copies: Of each row, for the adapters of a grid.
        most_tokens: `key_batch_tokens`.

    >>> joint_pass(Batch(1, 401, 9), micro_batches=8, copies=1, most_tokens=50)
    Joint(rows=3, context=267, keys=17)
    """
    alone = batch.alone
    rows = alone.rows * copies
    contexts, keys = rows * alone.context, rows * alone.keys
    held = min(contexts * micro_batches, max(contexts, most_tokens * CONTEXT_OF_KEY))
    tokens = min(keys * micro_batches, max(keys, most_tokens))
    together = -(-held // contexts)
    return Joint(
        alone.rows * together, -(-held // (rows * together)), -(-tokens // (rows * together))
    )


def stage_batch(recipe: Recipe, stage: StageSection, copies: int, rows: int, length: int) -> Batch:
    """Return a micro-batch of so many rows of so many tokens, with the keys that go with its own.

    `copies` is how often a row is there, for the adapters of a grid.
    """
    short = min(KEY_TOKENS, max(length - 2, 1))
    labelled = length if trained_context(stage.loss_on) else short
    packed = recipe.data.packing and stage.context == "exact"
    batch = Batch(rows, length, labelled, rows > 1 or packed)
    if stage.context == "exact":
        return batch
    accumulated = trainer_setting(recipe.stage_trainer(stage), "gradient_accumulation_steps")
    joint = joint_pass(batch, accumulated, copies, stage.key_batch_tokens)
    return replace(batch, padded=joint.rows > 1, joint=joint)
