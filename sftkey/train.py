"""Train a recipe: `sftkey train`, `python -m sftkey.train` and every launcher come in here."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sftkey.recipe import load_recipe


def train(recipe: Path, overrides: Sequence[str] = (), fresh: bool = False) -> None:
    """Check the recipe's form, set the process up, and run the stages.

    The form comes first: a wrong recipe must be told before torch is imported, which takes seconds.

    Raises:
        SFTKeyError: What the user can mend; the command line prints it.
    """
    checked = load_recipe(recipe, overrides)
    use_all_cores()
    quiet_libraries()
    from sftkey.evaluate import grade_stage, print_table
    from sftkey.training.stages import start

    run = start(checked, Path("runs") / checked.name, fresh)
    with run.progress:
        for stage in run.stages():
            grade_stage(run, stage)
    print_table(run)


def quiet_libraries() -> None:
    """Keep the libraries' own bars and advice off a run's progress; their warnings stay."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    # TRL switches gradient checkpointing on by its old name, which transformers reports.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)


def use_all_cores() -> None:
    """Give this process its share of the physical cores that it may use.

    The launchers set `OMP_NUM_THREADS=1`, which leaves all cores but one idle. Another value is
    the user's own and stays. The variable is set for libraries that load an OpenMP of their own
    (bitsandbytes does), the call for a torch that is loaded already.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    threads = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def available_cores() -> int:
    """Count the physical cores, or the ones that this process is bound to if these are fewer."""
    import psutil  # accelerate's dependency

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return min(cores, len(os.sched_getaffinity(0)))
    return cores


if __name__ == "__main__":
    from sftkey.cli import main

    main(["train", *sys.argv[1:]])
