"""Memory: given back between stages, and explained where it doesn't suffice."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sftkey.errors import DeviceError

CPU_MESSAGE = "DefaultCPUAllocator: can't allocate memory"  # a plain RuntimeError of torch's


def release_memory() -> None:
    """Free a dropped trainer: TRL's patched forward makes a cycle that only this breaks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def explained_out_of_memory(folder: Path) -> Iterator[None]:
    """Turn running out of memory into an error that names what to change.

    Args:
        folder: The run folder, which keeps what was reached.

    Raises:
        DeviceError: In place of torch's error.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not out_of_memory and CPU_MESSAGE not in str(error):
            raise
        raise DeviceError(
            str(folder),
            "out of memory; what was reached is kept",
            "lower trainer.per_device_train_batch_size (and raise gradient_accumulation_steps), "
            "lower data.max_length, or set trainer.gradient_checkpointing=true; "
            "then go on with a new `name=…`",
        ) from error
