"""What packing saves: an epoch over short rows, in padded batches of random order and in packs.

Both sides are sftkey's trainer on the whole completion, on the same rows; only the batches differ.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from datasets import Dataset
from measuring import Bar, alternate
from sides import Sides

from sftkey.data.collator import KeyCollator
from sftkey.data.packing import pack_rows
from sftkey.data.response import Segment

# Tokens of the rows of recipes/smollm2-135m/demo.yaml: 3 terms or 4, and how many rows in 300.
DEMO_LENGTHS = {
    67: 46,
    68: 58,
    69: 23,
    70: 29,
    78: 22,
    79: 32,
    80: 32,
    81: 23,
    82: 7,
    83: 25,
    84: 3,
}
SHARES = {Segment.PROMPT: 0.504, Segment.THINKING: 0.34}  # of the demo's tokens; the rest is key
NUM_TAGS = 9  # the demo's answer tags
NUM_ROWS, BATCH_ROWS, PACK_TOKENS = 48, 8, 608  # eight rows, or a pack of as many tokens, a step

Batches = list[dict[str, Any]]


def made_rows(vocabulary: int, num_rows: int = NUM_ROWS) -> Dataset:
    """Make rows of random tokens, with the lengths and segments of the demo's."""
    dice = random.Random(0)
    lengths = dice.choices(list(DEMO_LENGTHS), list(DEMO_LENGTHS.values()), k=num_rows)
    segments = [_segments(length) for length in lengths]
    ids = [[dice.randrange(vocabulary) for _ in row] for row in segments]
    return Dataset.from_dict({"input_ids": ids, "segment_ids": segments})


def batches(rows: Dataset) -> dict[str, Batches]:
    """Cut an epoch into steps: rows as they come, padded, and packs of as many tokens."""
    collate = KeyCollator(0, "completion", for_key_trainer=True)
    starts = range(0, len(rows), BATCH_ROWS)
    padded = [list(rows.select(range(n, min(n + BATCH_ROWS, len(rows))))) for n in starts]
    packs = [[pack] for pack in pack_rows(rows, PACK_TOKENS)]
    return {"padded": list(map(collate, padded)), "packed": list(map(collate, packs))}


def bar(sides: Sides, repeats: int, say: Callable[[Any], None]) -> Bar:
    """Measure epochs in alternating rounds; say what each side reads and how long it takes."""
    sides.ours.context = "exact"
    made = batches(made_rows(sides.shape.vocabulary))
    losses = {name: _epoch(sides, of) for name, of in made.items()}  # also warms up
    tolerance = 2e-2 if sides.shape.quantized else 1e-4
    assert abs(losses["padded"] - losses["packed"]) < tolerance, losses
    epochs = {name: partial(_epoch, sides, of) for name, of in made.items()}
    seconds = alternate(epochs, repeats, sides.device)
    for name, of in made.items():
        num_tokens = sum(batch["input_ids"].numel() for batch in of)
        median = round(statistics.median(seconds[name]), 3)
        say({"epoch": name, "steps": len(of), "computed_tokens": num_tokens, "seconds": median})
    return Bar("packed_over_padded", _ratio(seconds["padded"], seconds["packed"]), 1.3)


def _segments(length: int) -> list[int]:
    counts = {segment: round(length * share) for segment, share in SHARES.items()}
    counts |= {Segment.ANSWER_TAG: NUM_TAGS, Segment.END: 1}
    counts[Segment.ANSWER] = length - sum(counts.values())
    return [int(segment) for segment in Segment for _ in range(counts[segment])]


def _epoch(sides: Sides, steps: Batches) -> float:
    """Take all steps, optimizer included; give the mean loss of the epoch's trained tokens."""
    trainer, above, below = sides.ours, 0.0, 0.0
    for batch in steps:
        inputs = dict(batch)  # the trainer takes its own columns out
        count = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        loss = trainer.training_step(trainer.model, inputs, num_items_in_batch=count)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        above, below = above + float(loss) * float(count), below + float(count)
    return above / below


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Give the median of the rounds' own ratios: what slows one round slows both of its sides."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
