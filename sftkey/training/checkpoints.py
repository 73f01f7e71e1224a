"""Which checkpoints are whole: transformers writes them file by file, and a kill tears them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sftkey.errors import RunError
from sftkey.files import file_hash, files_below, free_name, write_json

SEAL = "whole.json"


def seal(checkpoint: Path) -> None:
    """Record the sizes and hashes of a finished checkpoint's files; what differs later is torn.

    A power cut may leave a file of the right size without its content.
    """
    files = {
        file.relative_to(checkpoint).as_posix(): [file.stat().st_size, file_hash(file)]
        for file in files_below(checkpoint)
        if file.name != SEAL
    }
    write_json(checkpoint / SEAL, files)


def is_whole(checkpoint: Path) -> bool:
    """Tell whether every file stands as it was when the checkpoint was finished."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_bytes())
        return all(_is_same(checkpoint / name, known) for name, known in sealed.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _is_same(file: Path, known: Any) -> bool:
    """Compare a file with its seal; one of before there were hashes has the size alone."""
    size, digest = known if isinstance(known, list) else (known, None)
    return file.stat().st_size == size and digest in (None, file_hash(file))


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


def kept_checkpoint(state: TrainerState, loads_best: bool) -> str | None:
    """Say which checkpoint a stage ends with; None where it ends with its last step anyway.

    Args:
        state: The trainer's, after its last step.
        loads_best: Whether the trainer was to load the best checkpoint at the end.
    """
    if not loads_best:
        return None
    if state.best_model_checkpoint is None:
        return "kept the last step: no checkpoint has a finite validation loss to choose by"
    best = Path(state.best_model_checkpoint).name
    last = best == f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    which = "the last" if last else "not the last"
    return f"kept {best} (validation loss {state.best_metric:.4f}), {which}"


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
