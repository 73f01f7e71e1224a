"""Several processes of one run: for how long they wait for one another, and what a lost one is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState

from sftkey.errors import DeviceError, SFTKeyError, first_line
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import trainer_setting

# What gloo, NCCL and torch's own store say when they wait in vain for another process.
LOST = re.compile(r"gloo|nccl|closed by peer|Connection reset|Broken pipe|timed out|timeout", re.I)


def patience(recipe: Recipe) -> timedelta:
    """Return how long processes wait for one another: the longest `ddp_timeout` of the stages.

    Their group is made once, before any trainer could say it.
    """
    told = (trainer_setting(recipe.stage_trainer(each), "ddp_timeout") for each in recipe.stages)
    return timedelta(seconds=max(told))


@contextmanager
def explained_lost_process(folder: Path) -> Iterator[None]:
    """Turn the loss of another process into an error that says how the run goes on.

    Args:
        folder: The run folder, which keeps what was reached.

    Raises:
        DeviceError: In place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        several = PartialState().num_processes > 1
        if isinstance(error, SFTKeyError) or not several or not LOST.search(str(error)):
            raise
        raise DeviceError(
            str(folder),
            f"another process of this run is gone, or answers no more: {first_line(error)}",
            "see what it said before; the same command, with the same number of processes, goes "
            "on from the newest checkpoint. trainer.ddp_timeout says for how long processes wait",
        ) from error
