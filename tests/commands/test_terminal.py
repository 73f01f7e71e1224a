"""A process that trains takes its share of the machine, whatever the launcher left it."""

import io
import os
import sys
import time
from collections.abc import Callable

import psutil
import pytest
import torch

from sftkey.activity import activity, current, tell
from sftkey.cli import main
from sftkey.commands.terminal import available_cores, never_silent, stdout_console, use_all_cores


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return what sets the threads on a machine of eight cores, as a launcher calls it."""
    before = torch.get_num_threads()
    monkeypatch.setattr("sftkey.commands.terminal.available_cores", lambda: 8)

    def set_under(**environment: str) -> int:
        for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        torch.set_num_threads(3)
        use_all_cores()
        number = torch.get_num_threads()
        torch.set_num_threads(before)
        return number

    return set_under


def test_no_stream_ends_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon may have closed its streams; a file's encoding may not know our signs."""
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", narrow)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["ls", "--json"])
    stdout_console().print("é⏎")
    narrow.flush()
    sys.stderr.close()
    assert narrow.buffer.getvalue().decode("latin-1").endswith("é\\u23ce\n")


def test_a_launchers_single_thread_becomes_all_cores(threads: Callable[..., int]) -> None:
    """`accelerate launch` leaves one core, and so would torchrun: the process takes its share."""
    assert threads(OMP_NUM_THREADS="1") == 8
    assert threads(OMP_NUM_THREADS="1", LOCAL_WORLD_SIZE="2") == 4
    assert threads(OMP_NUM_THREADS="1", LOCAL_WORLD_SIZE="16") == 1
    assert threads() == 8


def test_later_libraries_get_the_threads_too(threads: Callable[..., int]) -> None:
    """A library with an OpenMP of its own reads the variable when it is loaded."""
    threads(OMP_NUM_THREADS="1", LOCAL_WORLD_SIZE="2")
    assert os.environ["OMP_NUM_THREADS"] == "4"


def test_the_users_own_number_of_threads_stays(threads: Callable[..., int]) -> None:
    """Whoever sets another number than the launchers' 1 means it."""
    assert threads(OMP_NUM_THREADS="5") == 3
    assert os.environ["OMP_NUM_THREADS"] == "5"


def test_cores_are_physical_and_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the second thread of a core nor a core that belongs to others is counted."""
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 16 if logical else 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert available_cores() == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert available_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == 8
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores() == 1


def test_a_silent_command_says_what_it_is_at(capsys: pytest.CaptureFixture[str]) -> None:
    """After some silence the innermost activity is named, with how far it is and its seconds."""
    before = sys.stderr
    with never_silent(0.05):
        with activity("generating"):
            tell("3 of 200")
            time.sleep(0.2)
        time.sleep(0.1)
    assert sys.stderr is before
    assert current() is None
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 4
    assert set(lines) == {"… generating, 3 of 200, 0 s"}


def test_a_command_that_speaks_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Where something is written often enough, nothing is added."""
    with never_silent(1.0), activity("generating"):
        for _ in range(6):
            print("x", file=sys.stderr)
            time.sleep(0.05)
    assert capsys.readouterr().err == "x\n" * 6


def test_only_the_first_process_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others stay silent."""
    monkeypatch.setenv("RANK", "1")
    with never_silent(0.02), activity("generating"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
