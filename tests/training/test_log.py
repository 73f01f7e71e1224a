"""What a person is told of how long a run still takes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import TrainerState

from sftkey.errors import RunError
from sftkey.models.adapters import refuse_not_finite
from sftkey.training.checkpoints import kept_checkpoint
from sftkey.training.log import RunProgress, refuse_unsound_end


def test_the_time_left_is_that_of_the_steps_that_are_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stage that has other steps than planned, more or fewer, counts with those that it has."""
    now = 0.0
    monkeypatch.setattr("sftkey.training.log.time.monotonic", lambda: now)
    lines = io.StringIO()
    progress = RunProgress({"completion": 4, "key": 4}, Console(file=lines))
    progress.begin("completion", 1)  # a checkpoint has three
    now += 10
    progress.step()
    assert (progress.num_steps, progress.seconds_left) == (5, 40)
    progress.begin("key", 7)  # the model's own thinkings make more rows
    now += 10
    progress.step()
    assert (progress.num_steps, progress.seconds_left) == (8, 60)
    progress.log("key", 1, 7, {"loss": 1.0, "segments": {"answer": 1.0}, "tokens_per_second": 9})
    assert lines.getvalue() == "key 1/7  loss 1.0000 (answer 1.0000)  9 tokens/s  1:00 left\n"


def test_an_end_that_is_not_finite_is_refused_before_anything_is_saved() -> None:
    """The error names the segments whose loss is none."""
    refuse_unsound_end({"thinking": 1.0, "answer": 0.1}, "stage")
    with pytest.raises(RunError, match="those of answer, end are not, and nothing was saved"):
        refuse_unsound_end({"thinking": 1.0, "answer": float("nan"), "end": float("inf")}, "stage")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Of an adapter or of a whole model; the error names one of them."""
    sound = {"a": torch.zeros(2), "b": torch.ones(2)}
    refuse_not_finite(sound, tmp_path)
    broken = {**sound, "c": torch.tensor([1.0, float("nan")])}
    with pytest.raises(RunError, match="1 of 3 hold NaN or infinity, such as c; nothing was"):
        refuse_not_finite(broken, tmp_path)


def test_what_a_stage_ends_with_is_said() -> None:
    """Which checkpoint was kept, and that none could be chosen by losses that are NaN."""
    state = TrainerState(global_step=8, best_metric=1.25)
    state.best_model_checkpoint = "runs/x/checkpoint-5"
    assert kept_checkpoint(state, loads_best=False) is None
    told = "kept checkpoint-5 (validation loss 1.2500), not the last"
    assert kept_checkpoint(state, loads_best=True) == told
    state.best_model_checkpoint = "runs/x/checkpoint-8"
    assert kept_checkpoint(state, loads_best=True).endswith(", the last")  # type: ignore[union-attr]
    state.best_model_checkpoint = None
    assert "no checkpoint has a finite validation loss" in str(kept_checkpoint(state, True))
