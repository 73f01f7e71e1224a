"""Which checkpoints are whole: transformers writes them file by file, and a kill tears them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sftkey.errors import RunError
from sftkey.files import free_name, write_json

SEAL = "whole.json"


def seal(checkpoint: Path) -> None:
    """Record the names and sizes of a finished checkpoint's files; what differs later is torn."""
    sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir() if file.is_file()}
    write_json(checkpoint / SEAL, sizes)


def is_whole(checkpoint: Path) -> bool:
    """Tell whether every file stands as it was when the checkpoint was finished."""
    try:
        sizes = json.loads((checkpoint / SEAL).read_text())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def newest_whole(folder: Path, set_aside: bool = True) -> Path | None:
    """Return the newest whole checkpoint of a stage.

    Args:
        folder: Where the stage's checkpoints lie.
        set_aside: Rename torn ones to `torn-…`; nothing is deleted.
    """
    found = []
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", checkpoint.name)
        if not step:
            continue
        if is_whole(checkpoint):
            found.append((int(step[1]), checkpoint))
        elif set_aside:
            checkpoint.rename(free_name(folder / f"torn-{checkpoint.name}"))
    return max(found)[1] if found else None


class SealCheckpoints(TrainerCallback):
    """Seals each checkpoint when all processes have written theirs, and logs up to it.

    A log line at every checkpoint lets a resumed stage log each step exactly once.
    """

    def __init__(self, wait_for_everyone: Any) -> None:
        self.wait_for_everyone = wait_for_everyone

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Log where a checkpoint follows, and at the stage's last step."""
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True
        return control

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Log where `save_strategy: epoch` saves."""
        return self.on_step_end(args, state, control, **kwargs)

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seal the checkpoint that was just written."""
        self.wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            if not checkpoint.is_dir():
                raise RunError(str(checkpoint), "expected the checkpoint just written; it is gone")
            seal(checkpoint)
