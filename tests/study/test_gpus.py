"""A study on several GPUs runs a cell on each of them at the same time."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sftkey.commands import study as command
from tests.study.test_run import write_study

SAYS = (
    "import os, sys; print('a report'); "
    "print('sees', os.environ['CUDA_VISIBLE_DEVICES'], file=sys.stderr)"
)
ENDS = f"{SAYS}; sys.exit(int(os.environ['CUDA_VISIBLE_DEVICES'] == '5') * 3)"
WAITS = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
    "print('ready', file=sys.stderr, flush=True); time.sleep(60)"
)


@pytest.mark.parametrize(
    ("count", "named", "expected"),
    [(0, None, []), (2, None, ["0", "1"]), (2, "5,3", ["5", "3"]), (1, "5", ["5"])],
)
def test_gpus_have_the_names_that_were_given(
    count: int, named: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was given some of a machine's GPUs hands on these."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert command.visible_gpus() == expected


def test_each_process_sees_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Its lines are told with the GPU, its report isn't printed, and a failure is the command's."""
    command.run_beside(["0", "1"], [sys.executable, "-c", SAYS])
    said = capsys.readouterr()
    assert (said.out, sorted(said.err.splitlines())) == ("", ["GPU 0: sees 0", "GPU 1: sees 1"])
    with pytest.raises(SystemExit) as end:
        command.run_beside(["4", "5"], [sys.executable, "-c", ENDS])
    assert end.value.code == 3


def test_a_signal_reaches_each_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command ends when they have ended, with their exit code."""
    said: list[str] = []
    monkeypatch.setattr(command, "say", said.append)

    def end() -> None:
        while len(said) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=end).start()
    with pytest.raises(SystemExit) as ended:
        command.run_beside(["0", "1"], [sys.executable, "-c", WAITS])
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_study_leaves_its_cells_to_its_processes_and_writes_the_report(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one would see all GPUs, and so trains nothing; no process is without a cell."""
    file = write_study(tmp_path, tiny_folder)
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []
    monkeypatch.setattr(command, "visible_gpus", lambda: list("01234567"))
    monkeypatch.setattr(command, "run_beside", lambda *given: asked.append(given))
    monkeypatch.setattr(command, "write_report", lambda *given: asked.append(given[2]))
    command.study(file)
    assert asked == [
        (list("0123"), [sys.executable, "-m", "sftkey", "study", str(file)]),  # four cells
        Path("runs/small"),
    ]
