"""Signals that end a run: what it keeps, what it says, and that the same command goes on."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from sftkey import cli
from sftkey.errors import ProcessLost, RunStopped
from sftkey.training import callbacks
from sftkey.training.callbacks import StopAfterStep, StopRequest, newest_whole, stopping_on_signals
from sftkey.training.log import StageLog
from tests.training.test_run import adapter_of, done

NUMBERS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]


@pytest.mark.fault("signals")
def test_a_signal_ends_the_stage_after_its_step_with_a_checkpoint(
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint is of that step, and the same command ends as if nothing had come."""
    recipe = tiny_recipe(stages=[{"name": "key", "loss_on": "key"}])
    uninterrupted = done(recipe, tmp_path / "whole")
    before = signal.getsignal(signal.SIGUSR1)

    def send(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.record.name == "key" and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(StageLog, "on_step_begin", send)
        with pytest.raises(RunStopped, match="the same command goes on, or: sftkey train") as error:
            done(recipe, tmp_path / "runs")
    assert error.value.exit_code == 138
    assert signal.getsignal(signal.SIGUSR1) == before
    checkpoints = tmp_path / "runs/tiny/stages/1-key/checkpoints"
    assert newest_whole(checkpoints) == checkpoints / "checkpoint-3"
    again = adapter_of(done(recipe, tmp_path / "runs"), 0)
    expected = adapter_of(uninterrupted, 0)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.fault("signals")
def test_while_answers_are_written_a_signal_ends_the_run_and_keeps_them(
    tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four questions are answered before it comes."""
    recipe = tiny_recipe(eval={"num_questions": 4, "max_new_tokens": 4, "batch_size": 2})

    def send(self: Any, stage: str, num_done: int, num_all: int) -> None:
        if num_done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("sftkey.training.log.RunProgress.answers", send)
        with pytest.raises(RunStopped):
            done(recipe, tmp_path / "runs")
    (part,) = (tmp_path / "runs/tiny/evaluation").glob("base.part*")
    assert len(part.read_text().splitlines()) == 2


@pytest.mark.parametrize(("number", "exit_code"), NUMBERS)
@pytest.mark.fault("signals")
def test_each_signal_ends_with_its_exit_code(number: int, exit_code: int, tmp_path: Path) -> None:
    """As a shell reports a process that it has ended."""
    with stopping_on_signals(tmp_path, print), pytest.raises(RunStopped) as error:
        os.kill(os.getpid(), number)
    assert error.value.exit_code == exit_code


@pytest.mark.fault("signals")
def test_a_second_ctrl_c_waits_for_no_step(tmp_path: Path) -> None:
    """A second signal of another kind is the same one, passed on."""
    said: list[str] = []
    request = StopRequest(tmp_path, said.append)
    request.in_training = True
    request.receive(signal.SIGUSR1, None)
    request.receive(signal.SIGTERM, None)
    assert said == ["SIGUSR1: a checkpoint is written after this step; Ctrl-C ends the run at once"]
    with pytest.raises(RunStopped) as error:
        request.receive(signal.SIGINT, None)
    assert error.value.exit_code == 130


@pytest.mark.fault("signals")
def test_no_library_takes_it_for_an_error_of_its_own(tmp_path: Path) -> None:
    """One that goes on after any error doesn't go on after this."""
    with (
        stopping_on_signals(tmp_path, print),
        pytest.raises(RunStopped),
        suppress(Exception),
    ):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.fault("signals")
def test_a_signal_in_a_destructor_is_not_lost(tmp_path: Path) -> None:
    """Python drops what is raised there; the signal comes again behind it."""

    class Closing:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with stopping_on_signals(tmp_path, print) as request:
        Closing()
        assert request.number is None
        with pytest.raises(RunStopped):
            time.sleep(10)


@pytest.mark.fault("signals")
def test_a_process_that_was_told_ends_so_though_the_others_went_before_it(tmp_path: Path) -> None:
    """One that answers no question any more, while this one takes its step."""

    def lose(*told: int) -> None:
        with stopping_on_signals(tmp_path, print) as request:
            request.in_training = True
            for number in told:
                os.kill(os.getpid(), number)
            raise ProcessLost(str(tmp_path), "another process is gone")

    with pytest.raises(RunStopped) as error:
        lose(signal.SIGTERM)
    assert error.value.exit_code == 143
    with pytest.raises(ProcessLost):
        lose()


def test_several_processes_ask_each_other_on_their_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them was told; the group is theirs alone, and waits no longer than the recipe says."""
    made: list[dict[str, Any]] = []

    def all_reduce(value: torch.Tensor, op: Any, group: Any) -> None:
        assert (value.device.type, group) == ("cpu", "theirs")
        value.fill_(signal.SIGUSR1)  # another process's

    monkeypatch.setattr(
        torch.distributed, "new_group", lambda **given: made.append(given) or "theirs"
    )
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(callbacks, "PartialState", lambda: SimpleNamespace(num_processes=2))
    stop, control = StopAfterStep(StopRequest(tmp_path, print)), TrainerControl()
    arguments = SimpleNamespace(ddp_timeout=60)
    for _ in range(2):
        stop.on_train_begin(arguments, TrainerState(), control)
    assert made == [{"backend": "gloo", "timeout": timedelta(seconds=60)}]
    stop.on_step_end(arguments, TrainerState(), control)
    assert control.should_save
    with pytest.raises(RunStopped, match="stopped by SIGUSR1"):
        stop.on_save(arguments, TrainerState(), control)


def test_the_command_line_ends_with_that_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the message of the error alone."""

    def stopped(*args: Any, **kwargs: Any) -> None:
        raise RunStopped("runs/x", "stopped by SIGTERM", "go on", signal.SIGTERM)

    monkeypatch.setattr(cli, "app", stopped)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"])
    assert ended.value.code == 143
    assert capsys.readouterr().err == "error: runs/x: stopped by SIGTERM\nhint: go on\n"
