"""What a person is told of how long a run still takes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sftkey.training.log import RunProgress


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
