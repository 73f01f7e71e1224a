"""The plan's memory against measured peaks: `plan.py [--json] [--device cuda]`, in this folder.

Models of published shapes with random weights, float32 on the CPU, NF4 and bfloat16 on CUDA; a LoRA
adapter on all linear modules. Each row takes a short step first, so that gradients and the
optimizer's state are there, and then the measured one. `held` is what its tensors weigh; `peak` is
by how much torch's allocator rises above it. The plan has one fitted constant, the copies of
a tile of logits on a CPU; rows marked as held out have not been seen by it.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from measuring import Bar, peak_bytes
from models import SHAPES, Shape
from rich.console import Console
from rich.table import Table
from sides import PROMPT_SHARE, Batch, Sides
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from sftkey.data.collator import KeyCollator
from sftkey.memory_plan import trace
from sftkey.memory_plan.held import Kind, Setting
from sftkey.memory_plan.plan import parts_of
from sftkey.models.facts import Skeleton

HELD_OUT_SHAPE, HELD_OUT_LENGTH = "1b", 1024
LENGTHS = {"cpu": (256, 1024, 2048), "cuda": (1024, 4096, 8192)}
SHAPES_OF = {"cpu": ("135m", "0.5b", "1b"), "cuda": ("1b", "7b")}
NUM_KEY = 64
SHORT = Batch(1, 32, 8)
METHODS = ("plain", "checkpointed", "detached")
# More would take 11 GB, and 55.
MOST_TOKENS = {("cpu", "1b", "plain"): 1024, ("cuda", "7b", "plain"): 4096}
LIMITS = {"cpu": 0.15, "cuda": 0.10}  # of the step's peak; of all memory


@dataclass(frozen=True)
class Row:
    """One measured step, in bytes."""

    device: Kind
    shape: str
    length: int
    method: str
    planned_held: int
    measured_held: int
    planned_peak: int
    measured_peak: int
    seconds: float

    @property
    def held_out(self) -> bool:
        """No constant has seen it."""
        if self.device == "cuda":
            return self.shape == "7b"
        return self.shape == HELD_OUT_SHAPE or self.length == HELD_OUT_LENGTH

    @property
    def error(self) -> float:
        """By what share the planned peak of the step, weights aside, misses the measured one."""
        return self.planned_peak / self.measured_peak - 1

    @property
    def whole_error(self) -> float:
        """The same of all memory."""
        measured = self.measured_held + self.measured_peak
        return (self.planned_held + self.planned_peak) / measured - 1

    def as_dict(self) -> dict[str, Any]:
        """Return it as it stands in `--json`."""
        errors = {"error": round(self.error, 4), "whole_error": round(self.whole_error, 4)}
        return {**asdict(self), **errors, "held_out": self.held_out}


class WithoutProducts(TorchDispatchMode):
    """Allocates the results of matrix products, and leaves the products out.

    What is allocated, and when, stays as it was, to the byte; a billion weights take seconds.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, unless it is a product."""
        aten = torch.ops.aten
        if func is aten.mm.default:
            return args[0].new_empty(args[0].shape[0], args[1].shape[1])
        if func is aten.addmm.default:
            return args[1].new_empty(args[1].shape[0], args[2].shape[1])
        if func is aten.mm.out:
            return kwargs["out"]
        if func is aten.addmm_.default:
            return args[0]
        return func(*args, **(kwargs or {}))


def planned(
    device: Kind, shape: Shape, method: str, rows: Batch, num_labelled: int
) -> tuple[int, int]:
    """Return what the plan says is held, and what a batch needs beside."""
    dtype = "bfloat16" if shape.quantized else "float32"
    setting = Setting(
        kind=device,
        quantized=shape.quantized,
        weights=dtype,
        compute=dtype,
        context="detached" if method == "detached" else "exact",
        checkpointing=shape.checkpointing,
        ranks=(16,),
        dropout=shape.dropout > 0,
    )
    batch = trace.Batch(rows.num_rows, rows.length, num_labelled)
    parts = parts_of(skeleton(shape.name), setting, batch)
    needed = sum(parts[name] for name in ("activations", "logits", "cache"))
    return sum(parts.values()) - needed, needed


@cache
def skeleton(name: str) -> Skeleton:
    """Build a shape's model without weights."""
    (shape,) = (each for each in SHAPES.values() if each.name == name)
    return Skeleton(AutoConfig.for_model(**shape.config))


def labelled(rows: Batch, method: str) -> int:
    """Return the number of a row's tokens that the loss is on."""
    return rows.num_key if method == "detached" else rows.length - round(rows.length * PROMPT_SHARE)


def measured(
    device: Kind, name: str, method: str, lengths: tuple[int, ...], dropout: float, mode: Any
) -> Iterator[Row]:
    """Measure the steps of one model; it is dropped before the next one is made."""
    shape = replace(
        SHAPES[name],
        quantized=device == "cuda",
        checkpointing=method == "checkpointed",
        dropout=dropout,
    )
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(shape, device, Path(folder), ("ours",))
        trainer = sides.ours
        trainer.context = "detached" if method == "detached" else "exact"
        loss_on = "key" if method == "detached" else "completion"
        _step(trainer, SHORT, loss_on, shape)
        trainer.optimizer.step()
        for length in lengths:
            if length > MOST_TOKENS.get((device, name, method), length):
                continue
            rows = Batch(1, length, min(NUM_KEY, length // 4))
            gc.collect()
            held = torch.cuda.memory_allocated() if device == "cuda" else _held_bytes(trainer)
            start = time.perf_counter()
            with mode:
                step = partial(_step, trainer, rows, loss_on, shape)
                peak = peak_bytes(step, device)
            seconds = time.perf_counter() - start
            expected = planned(device, shape, method, rows, labelled(rows, method))
            taken = round(seconds, 1)
            yield Row(device, name, length, method, expected[0], held, expected[1], peak, taken)


def _step(trainer: Any, rows: Batch, loss_on: str, shape: Shape) -> None:
    """Compute one batch and its gradients, which are added to those that there are."""
    inputs = KeyCollator(0, loss_on, for_key_trainer=True)(list(rows.rows(shape.vocabulary)))
    count = trainer._get_num_items_in_batch([inputs], trainer.args.device)
    trainer.training_step(trainer.model, inputs, num_items_in_batch=count)


def _held_bytes(trainer: Any) -> int:
    """Add up the tensors of the model, its gradients and the optimizer's state."""
    parameters = list(trainer.model.parameters())
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    for state in trainer.optimizer.state.values():
        tensors += [each for each in state.values() if torch.is_tensor(each) and each.numel() > 1]
    return sum(each.numel() * each.element_size() for each in tensors)


def table(rows: list[Row]) -> Table:
    """Show planned and measured gigabytes."""
    shown = Table("shape", "tokens", "step", "held", "planned", "peak", "planned", "error", "all")
    for row in rows:
        sizes = (row.measured_held, row.planned_held, row.measured_peak, row.planned_peak)
        shown.add_row(
            row.shape + (" *" if row.held_out else ""),
            str(row.length),
            row.method,
            *(f"{size / 2**20:,.0f}" for size in sizes),
            f"{row.error:+.1%}",
            f"{row.whole_error:+.1%}",
        )
    return shown


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", choices=LENGTHS, default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--without-products", action="store_true")
    options = parser.parse_args()
    mode = WithoutProducts() if options.without_products else nullcontext()
    rows: list[Row] = []
    console = Console(stderr=True)
    device: Kind = options.device
    lengths = tuple(options.lengths or LENGTHS[device])
    for name in options.shapes or SHAPES_OF[device]:
        for method in options.methods:
            for row in measured(device, name, method, lengths, options.dropout, mode):
                rows.append(row)
                console.print(f"{name} {row.length} {method}: {row.error:+.1%}, {row.seconds} s")
            gc.collect()
    worst = max(abs(row.error if device == "cpu" else row.whole_error) for row in rows)
    bar = Bar("planned_over_measured", worst, LIMITS[device], at_most=True)
    if options.json:
        for row in rows:
            print(json.dumps(row.as_dict()))
        print(json.dumps({"bars": [bar.as_dict()]}))
        return
    Console(width=120).print(table(rows))
    print("MiB; * held out of what fitted the constants")
    print(bar)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
