"""One process works on a run folder, also where the file system has no locks."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from platform import node

import psutil
import pytest

from sftkey.errors import RunLocked
from sftkey.training.run_lock import HOLDER, lock_run

LOCKING = """
import sys
from pathlib import Path
from sftkey.training.run_lock import lock_run
lock = lock_run(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Lock a folder by another process, until the test's end or its own."""
    command = [sys.executable, "-c", LOCKING, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


@pytest.mark.fault("a second process, a dead one's lock")
def test_a_second_process_is_refused_and_a_dead_one_is_not_in_the_way(
    other: subprocess.Popen[str], tmp_path: Path
) -> None:
    """The first one's host and pid are named; when it is killed its lock is free."""
    for _ in range(2):  # who was refused has taken nothing away
        with pytest.raises(RunLocked, match=f"process works on this run: pid {other.pid}"):
            lock_run(tmp_path)
    other.kill()
    other.wait()
    with lock_run(tmp_path):
        assert lock_run(tmp_path) is lock_run(tmp_path), "the same process may ask again"


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse each lock as some network file systems do."""

    def refuse(*_: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("without_locks")
@pytest.mark.fault("a second process, a dead one's lock")
def test_without_locks_the_process_that_the_folder_names_counts(
    other: subprocess.Popen[str], tmp_path: Path
) -> None:
    """As long as it runs; a run that one process works on alone begins and goes on."""
    for _ in range(2):
        with pytest.raises(RunLocked, match=f"process works on this run: pid {other.pid}"):
            lock_run(tmp_path)
    other.kill()
    other.wait()
    lock_run(tmp_path)
    lock_run(tmp_path)
    assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()


@pytest.mark.usefixtures("without_locks")
@pytest.mark.fault("a second process, a dead one's lock")
def test_without_locks_a_clock_that_is_set_hides_no_process(
    other: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Linux: the time of its start is told from the time of the system's."""
    boot_time = psutil.boot_time()
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: boot_time - 60)
    with pytest.raises(RunLocked, match=f"process works on this run: pid {other.pid}"):
        lock_run(tmp_path)


@pytest.mark.parametrize(
    "named",
    [
        {"host": node(), "pid": os.getppid(), "since": 1.0},
        {"host": f"not-{node()}", "pid": os.getppid()},
        {"host": node(), "pid": "many"},
        ["nobody"],
    ],
    ids=["another program's number", "renamed host", "no number", "no object"],
)
@pytest.mark.usefixtures("without_locks")
@pytest.mark.fault("a second process, a dead one's lock")
def test_without_locks_a_name_that_means_no_process_here_is_not_in_the_way(
    named: object, tmp_path: Path
) -> None:
    """A killed process's number may be given to another, its host have another name."""
    (tmp_path / HOLDER).write_text(json.dumps(named))
    lock_run(tmp_path)
    assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
