"""How the benchmarks measure: alternating rounds, medians with their spread, peaks, bars."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import ProfilerConfig, ProfilerState

Step = Callable[[], Any]


@dataclass(frozen=True)
class Bar:
    """A figure and its limit: at least so much, or at most."""

    name: str
    measured: float
    limit: float
    at_most: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the bar as it stands in the last line of `--json`."""
        holds = self.measured <= self.limit if self.at_most else self.measured >= self.limit
        measured = round(self.measured, 3)
        return {"name": self.name, "measured": measured, "limit": self.limit, "holds": holds}

    def __str__(self) -> str:
        verdict = "holds" if self.as_dict()["holds"] else "misses"
        wanted = f"{'at most' if self.at_most else 'at least'} {self.limit}"
        return f"{self.name}: {self.measured:.3f}, {wanted}: {verdict}"


@dataclass(frozen=True)
class Spread:
    """The middle of some measured seconds, and how far apart they lie."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarize."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}-{self.most:.2f})"


def alternate(jobs: dict[str, Step], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Run all jobs in turn, again and again, so that what slows the machine slows them alike.

    Every other round runs backwards.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeats):
        for name in reversed(list(jobs)) if number % 2 else list(jobs):
            gc.collect()
            synchronize(device)
            start = time.perf_counter()
            jobs[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: str) -> None:
    """Wait for what the device has been told to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(step: Step, device: str = "cpu") -> int:
    """Return by how much a step's allocations rise above what is held when it starts.

    CUDA counts itself; on the CPU it is torch's allocator, through the profiler's records.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - held
    # What torch.profiler wraps around it in Python takes longer than the step, and isn't needed.
    settings = ProfilerConfig(
        ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig()
    )
    activities = {torch.profiler.ProfilerActivity.CPU}
    torch.autograd._prepare_profiler(settings, activities)
    torch.autograd._enable_profiler(settings, activities)
    try:
        step()
    finally:
        records = torch.autograd._disable_profiler().events()
    held = peak = 0
    for record in sorted(
        (each for each in records if each.name() == "[memory]"), key=lambda each: each.start_ns()
    ):
        held += record.nbytes()
        peak = max(peak, held)
    return peak
