"""What a key stage costs: plain TRL, exact and detached, side by side on the same rows.

    python tests/benchmarks/key_stage.py [--json] [--bars] [--device cuda] [--growth FILE.png]

The model has SmolLM2-135M's shape and random weights in float32, with LoRA; on CUDA a 7B shape in
NF4 and bfloat16. Nothing is downloaded. `--quick` runs the same code on a toy: its figures mean
nothing.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import frozen
import key_pass
import packing
import tokenizing
import torch
from measuring import Bar, Spread, alternate, peak_bytes
from models import SHAPES, Shape
from sides import Batch, Sides

from sftkey.commands.terminal import quiet_libraries, use_all_cores

METHODS = ("trl", "exact", "detached")
SHARES = (0.02, 0.06, 0.25)
THE_SHARE = 0.06  # of the bars
FIXED_KEY = 16  # tokens, where cost is drawn over the thinking's length
GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """What a step of one method costs on one batch."""

    method: str
    loss_on: str
    batch: Batch
    seconds: list[float]
    peak: int
    checkpointed: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the cost as a line of `--json`."""
        spread = Spread.of(self.seconds)
        return {
            "method": self.method,
            "loss_on": self.loss_on,
            "rows": self.batch.num_rows,
            "tokens": self.batch.length,
            "key_tokens": self.batch.num_key,
            "checkpointed": self.checkpointed,
            "seconds": round(spread.median, 4),
            "fastest": round(spread.least, 4),
            "slowest": round(spread.most, 4),
            "peak_gib": round(self.peak / GIB, 3),
        }

    def __str__(self) -> str:
        row = self.as_dict()
        shape = f"{row['rows']} x {row['tokens']:5}, {row['key_tokens']:4} key"
        return (
            f"{self.method:8} {self.loss_on:10} {shape}  {Spread.of(self.seconds)!s:>24} s"
            f"  {row['peak_gib']:7.3f} GiB"
        )


def measure(
    sides: Sides, jobs: Sequence[tuple[str, str, Batch]], repeats: int, say: Callable[[Any], None]
) -> list[Cost]:
    """Measure jobs, each a method, what its loss is on, and a batch, in alternating rounds.

    The peaks are taken in a round of their own, which also warms up.
    """
    steps = {str(job): partial(sides.step, job[0], job[2], job[1]) for job in jobs}
    peaks = {name: peak_bytes(step, sides.device) for name, step in steps.items()}
    seconds = alternate(steps, repeats, sides.device)
    costs = [
        Cost(*job, seconds[str(job)], peaks[str(job)], sides.shape.checkpointing) for job in jobs
    ]
    for cost in costs:
        say(cost)
    return costs


def table(
    sides: Sides,
    batches: Sequence[tuple[int, int]],
    shares: Sequence[float],
    repeats: int,
    say: Callable[[Any], None],
) -> list[Cost]:
    """Measure every length with every share of key tokens; the first also with whole completions.

    On a CPU plain TRL projects every position whatever is trained: one share stands for all.
    """
    costs = []
    for number, (num_rows, length) in enumerate(batches):
        jobs = []
        for share in shares:
            batch = Batch(num_rows, length, round(length * share))
            same = sides.device == "cpu" and share != THE_SHARE
            jobs += [(method, "key", batch) for method in METHODS if method != "trl" or not same]
            if number == 0 and share == THE_SHARE:
                jobs += [(method, "completion", batch) for method in ("trl", "exact")]
        costs += measure(sides, jobs, repeats, say)
    return costs


def bars(costs: Sequence[Cost], num_rows: int, length: int) -> list[Bar]:
    """Take the bars from the costs of the batch that they are defined on."""
    at_bar = {
        (cost.method, cost.loss_on): cost
        for cost in costs
        if cost.batch == Batch(num_rows, length, round(length * THE_SHARE))
    }
    trl, exact, detached = (at_bar[method, "key"] for method in METHODS)
    first, whole = at_bar["exact", "completion"], at_bar["trl", "completion"]
    stages = [a + b for a, b in zip(first.seconds, detached.seconds, strict=True)]
    return [
        Bar("exact_over_trl", _ratio(trl.seconds, exact.seconds), 1.5),
        Bar("detached_over_trl", _ratio(trl.seconds, detached.seconds), 2.7),
        Bar("detached_memory", detached.peak / trl.peak, 0.5, at_most=True),
        Bar("two_stages_over_one", _ratio(stages, whole.seconds), 1.35, at_most=True),
    ]


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the rounds' own ratios: what slows one round slows both of its sides."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def grow(sides: Sides, lengths: Sequence[int], repeats: int, say: Callable[[Any], None]) -> Any:
    """Measure how cost grows with the thinking, the key staying as long as it is; draw it."""
    jobs = [(method, "key", Batch(1, n, FIXED_KEY)) for n in lengths for method in METHODS]
    costs = measure(sides, jobs, repeats, say)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    seconds, memory = figure.subplots(1, 2)
    for method in METHODS:
        of_method = [cost for cost in costs if cost.method == method]
        medians = [Spread.of(cost.seconds).median for cost in of_method]
        seconds.plot(lengths, medians, marker="o", label=method)
        memory.plot(lengths, [cost.peak / GIB for cost in of_method], marker="o", label=method)
    for axes, what in ((seconds, "seconds a step"), (memory, "GiB above the weights")):
        axes.set(xlabel=f"tokens a row, {FIXED_KEY} of them key", ylabel=what, ylim=(0, None))
        axes.legend()
    return figure


def long_thinking(folder: Path, num_tokens: int, gib: int) -> dict[str, Any]:
    """Train one key behind a long thinking on an 8B shape, with so much of a GPU as `gib`."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total)
    sides = Sides(SHAPES["8b"], "cuda", folder, methods=("detached",))
    sides.step("detached", Batch(1, num_tokens, 64))
    peak = torch.cuda.max_memory_allocated() / GIB
    return {"model": SHAPES["8b"].name, "tokens": num_tokens, "limit_gib": gib, "peak_gib": peak}


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one object a line, the bars last")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bars", action="store_true", help="what the bars need, and no table")
    parser.add_argument("--growth", type=Path, help="draw cost over the thinking's length instead")
    parser.add_argument("--quick", action="store_true", help="a toy model: no figures of use")
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for."""
    arguments = parsed()
    quiet_libraries()
    use_all_cores()

    def say(result: Any) -> None:
        shown = result if isinstance(result, dict) else result.as_dict()
        print(json.dumps(shown) if arguments.json else result, flush=True)

    name = "toy" if arguments.quick else {"cpu": "135m", "cuda": "7b"}[arguments.device]
    batches, lengths = settings(arguments.device, arguments.quick)
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.json:
            print(f"{facts(SHAPES[name], arguments.device)}; seconds: median (least-most)")
        sides = Sides(SHAPES[name], arguments.device, Path(folder))
        if arguments.growth:
            grow(sides, lengths, arguments.repeats, say).savefig(arguments.growth, dpi=150)
            return
        shares = SHARES
        if arguments.bars:
            batches, shares = batches[:1], (THE_SHARE,)
        num_rows, length = batches[0]
        found = bars(table(sides, batches, shares, arguments.repeats, say), num_rows, length)
        found += key_pass.bars(sides, length, THE_SHARE, arguments.repeats, say)
        batch = Batch(num_rows, length, round(length * THE_SHARE))
        found += frozen.bars(sides, batch, arguments.repeats, say)
        found.append(packing.bar(sides, arguments.repeats, say))
        del sides
        num_tokenized = 100 if arguments.quick else tokenizing.NUM_ROWS
        found.append(tokenizing.bar(arguments.repeats, num_tokenized))
        if arguments.device == "cuda" and not arguments.quick and not arguments.bars:
            say(long_thinking(Path(folder), 16384, 16))
    if arguments.json:
        print(json.dumps({"bars": [bar.as_dict() for bar in found]}))
    else:
        print(*found, sep="\n")


def settings(device: str, quick: bool) -> tuple[list[tuple[int, int]], list[int]]:
    """Return rows and lengths of the table's batches, the bars' first, then growing lengths."""
    if quick:
        return [(4, 64), (1, 128)], [32, 64]
    if device == "cuda":
        return [(1, 4096), (1, 16384)], [1024, 4096, 8192, 16384]
    return [(4, 256), (1, 1024), (1, 4096)], [256, 512, 1024, 2048, 4096]


def facts(shape: Shape, device: str) -> str:
    """Say in a line what is measured."""
    where = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    return f"{shape.name}'s shape, {'NF4' if shape.quantized else 'float32'}, LoRA r=16, {where}"


if __name__ == "__main__":
    main()
