"""What packing saves: an epoch over short rows, in padded batches of random order and in packs.

    python tests/benchmarks/packing.py [--json]

Both sides are sftkey's trainer on the whole completion, on the same rows; only the batches differ.
The command takes rows of GSM8K's lengths, of which the longest is three times the shortest, and a
third side, batches grouped by length, which is how sftkey pads; and it says how long attention and
matrix products take in each. The bar of key_stage.py takes the demo's rows, which hardly differ.
"""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from measuring import Bar, alternate
from models import SHAPES
from sides import Sides
from torch.profiler import ProfilerActivity, profile

from sftkey.commands.terminal import quiet_libraries, use_all_cores
from sftkey.data.collator import KeyCollator, pack_rows
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
# Tokens of GSM8K's training rows with SmolLM2's tokenizer: the middles of 24 equal parts of 7,273.
GSM8K_LENGTHS = [117, 128, 136, 142, 148, 154, 158, 164, 169, 174, 180, 185]
GSM8K_LENGTHS += [191, 197, 204, 211, 218, 226, 234, 245, 258, 274, 297, 338]
SHARES = {Segment.PROMPT: 0.504, Segment.THINKING: 0.34}  # of the demo's tokens; the rest is key
NUM_TAGS = 9  # the demo's answer tags
NUM_ROWS, BATCH_ROWS, PACK_TOKENS = 48, 8, 608  # eight rows, or a pack of as many tokens, a step

Batches = list[dict[str, Any]]


def made_rows(vocabulary: int, num_rows: int = NUM_ROWS) -> Dataset:
    """Make rows of random tokens, with the lengths and segments of the demo's."""
    dice = random.Random(0)
    lengths = dice.choices(list(DEMO_LENGTHS), list(DEMO_LENGTHS.values()), k=num_rows)
    return rows_of(lengths, vocabulary, dice)


def rows_of(lengths: Sequence[int], vocabulary: int, dice: random.Random) -> Dataset:
    """Make rows of random tokens, one of each length."""
    segments = [_segments(length) for length in lengths]
    ids = [[dice.randrange(vocabulary) for _ in row] for row in segments]
    return Dataset.from_dict({"input_ids": ids, "segment_ids": segments})


def batches(rows: Dataset, pack_tokens: int = PACK_TOKENS) -> dict[str, Batches]:
    """Cut an epoch into steps: rows as they come, padded, and packs of as many tokens."""
    collate = KeyCollator(0, "completion", for_key_trainer=True)
    starts = range(0, len(rows), BATCH_ROWS)
    padded = [list(rows.select(range(n, min(n + BATCH_ROWS, len(rows))))) for n in starts]
    packs = [[pack] for pack in pack_rows(rows, pack_tokens)]
    return {"padded": list(map(collate, padded)), "packed": list(map(collate, packs))}


def bar(sides: Sides, repeats: int, say: Callable[[Any], None]) -> Bar:
    """Measure both sides on rows of the demo's lengths."""
    seconds = measure(sides, batches(made_rows(sides.shape.vocabulary)), repeats, say)
    return Bar("packed_over_padded", _ratio(seconds["padded"], seconds["packed"]), 1.3)


def measure(
    sides: Sides, made: dict[str, Batches], repeats: int, say: Callable[[Any], None]
) -> dict[str, list[float]]:
    """Measure epochs in alternating rounds; say what each side reads and how long it takes."""
    sides.ours.context = "exact"
    losses = {name: _epoch(sides, of) for name, of in made.items()}  # also warms up
    tolerance = 2e-2 if sides.shape.quantized else 1e-4
    assert max(losses.values()) - min(losses.values()) < tolerance, losses
    epochs = {name: partial(_epoch, sides, of) for name, of in made.items()}
    seconds = alternate(epochs, repeats, sides.device)
    for name, of in made.items():
        num_tokens = sum(batch["input_ids"].numel() for batch in of)
        median = round(statistics.median(seconds[name]), 3)
        say({"epoch": name, "steps": len(of), "computed_tokens": num_tokens, "seconds": median})
    return seconds


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
    """Return the median of the rounds' own ratios: what slows one round slows both of its sides."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _shares(sides: Sides, steps: Batches) -> dict[str, float]:
    """Return the profiler's seconds of an epoch's products and attention, with backward."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        _epoch(sides, steps)
    own = {event.key: event.self_cpu_time_total / 1e6 for event in found.key_averages()}
    parts = {"products": ("aten::mm", "aten::addmm"), "attention": ("attention",)}
    return {
        part: round(sum(s for name, s in own.items() if any(w in name for w in words)), 2)
        for part, words in parts.items()
    } | {"all": round(sum(own.values()), 2)}


def main() -> None:
    """Measure rows of GSM8K's lengths: padded in random order, grouped by length, packed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a toy model: no figures of use")
    arguments = parser.parse_args()
    quiet_libraries()
    use_all_cores()

    def say(found: Any) -> None:
        print(json.dumps(found) if arguments.json else found, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPES["toy" if arguments.quick else "135m"]
        sides, dice = Sides(shape, "cpu", Path(folder), ("exact",)), random.Random(0)
        mixed = rows_of(dice.sample(GSM8K_LENGTHS, k=24), shape.vocabulary, dice)
        order = sorted(range(len(mixed)), key=lambda n: -len(mixed[n]["input_ids"]))
        made = batches(mixed, BATCH_ROWS * sum(GSM8K_LENGTHS) // len(GSM8K_LENGTHS) + 64)
        made["grouped"] = batches(mixed.select(order))["padded"]
        seconds = measure(sides, made, arguments.repeats, say)
        for name in ("grouped", "packed"):
            say({"padded_over": name, "ratio": round(_ratio(seconds["padded"], seconds[name]), 3)})
        for name, of in made.items():
            say({"profile": name, "seconds": _shares(sides, of)})


if __name__ == "__main__":
    main()
