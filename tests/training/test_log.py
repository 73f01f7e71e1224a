"""What a person is told of how long a run still takes."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerState

from sftkey.errors import RunError
from sftkey.training.callbacks import kept_checkpoint
from sftkey.training.log import RunProgress, read_log
from sftkey.training.soundness import refuse_unsound_end


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


@pytest.mark.fault("losses or gradients that are not finite, a model made worse")
def test_an_end_that_is_not_finite_is_refused_before_anything_is_saved() -> None:
    """The error names the segments whose loss is none."""
    refuse_unsound_end({"thinking": 1.0, "answer": 0.1}, "stage")
    with pytest.raises(RunError, match="those of answer, end are not, and nothing was saved"):
        refuse_unsound_end({"thinking": 1.0, "answer": float("nan"), "end": float("inf")}, "stage")


@pytest.mark.fault("a file emptied, halved, garbled or deleted")
@pytest.mark.parametrize("torn", [b"\xff\xfe", b'{"step": 2, "lo', b"[1]", b"{}", b"[" * 9999])
def test_lines_of_a_log_that_hold_no_step_are_passed_over(torn: bytes, tmp_path: Path) -> None:
    """Bytes that are no text, and values that are no line of a log."""
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"step": 1}\n' + torn + b'\n{"step": 3}\n')
    for last_step in (None, 3):
        assert [line["step"] for line in read_log(file, last_step)] == [1, 3]


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


LINE = {
    "loss": 1.25,
    "segments": {"thinking": 1.5, "answer_tag": 0.25, "answer": 2.0, "end": 0.125},
    "tokens_per_second": 2413.2,
}


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_terminal_shows_bar_step_and_time_and_keeps_the_losses(width: int) -> None:
    """One line of progress at any width; above it a row for each log, below one head."""
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    with RunProgress({"completion": 1200}, console) as progress:
        progress.begin("completion", 1200)
        for step in (10, 20):
            progress.step()
            progress.log("completion", step, 1200, LINE)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n")
    lines = [line.rstrip() for line in text.split("\n")]
    assert max(map(len, lines)) <= width
    assert re.fullmatch(r"completion [━╸╺─ ]{20,} +2/1200 +steps, \d+:\d\d left", lines[-2])
    heads = [line for line in lines if "answer_tag" in line]
    assert [line.split() for line in heads] == [
        ["step", "loss", "thinking", "answer_tag", "answer", "end", "tokens/s", "left"]
    ]
    rows = [line.split()[:6] for line in lines if "1.2500" in line]
    assert [row[0] for row in rows] == ["10/1200", "20/1200"]
    assert rows[0][1:] == ["1.2500", "1.5000", "0.2500", "2.0000", "0.1250"]
