"""One process works on a run folder; which one, the folder says."""

import errno
import os
from pathlib import Path
from platform import node

import psutil
from filelock import FileLock, Timeout

from sftkey.errors import RunError, RunLocked
from sftkey.files import read_json, write_json

LOCK, HOLDER = ".lock", ".running.json"
# What some network file systems say.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def lock_run(folder: Path) -> FileLock:
    """Lock a run folder for this process, which may do so again: two would tear each other's files.

    It is held until it is released or nobody has the object any more, and the system takes it from
    a process that dies.

    On a file system without locks it is the process that the folder names, as long as that runs on
    this host.

    Raises:
        RunLocked: Another process has it; its host and pid are named.
    """
    file = folder.resolve() / LOCK
    lock = FileLock(file, timeout=0, is_singleton=True, fallback_to_soft=False)
    try:
        if lock.is_locked:
            return lock
        lock.acquire()
    except Timeout:
        raise _locked(folder) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if _holder_runs(folder):
            raise _locked(folder) from None
    pid = os.getpid()
    write_json(folder / HOLDER, {"host": node(), "pid": pid, "since": _since_boot(pid)})
    return lock


def _locked(folder: Path) -> RunLocked:
    try:
        holder = read_json(folder / HOLDER)
        who = f"pid {holder['pid']} on {holder['host']}"
    except (RunError, KeyError):
        who = "it hasn't said which one"
    return RunLocked(
        str(folder),
        f"another process works on this run: {who}",
        "wait for it, or end it; `name=…` begins another run beside it",
    )


def _holder_runs(folder: Path) -> bool:
    """Tell whether the process that a run names runs here; its number may be another's now."""
    try:
        holder = read_json(folder / HOLDER)
        others = holder["pid"] != os.getpid() and holder["host"] == node()
        return others and abs(_since_boot(holder["pid"]) - holder["since"]) < 1
    except (RunError, KeyError, TypeError, ValueError, psutil.Error):
        return False


def _since_boot(pid: int) -> float:
    """Return when a process began, in seconds since the system did: whatever the clock is set to.

    Raises:
        psutil.Error: No such process runs.
    """
    return psutil.Process(pid).create_time() - psutil.boot_time()
