"""A lock on a run folder: two processes that train in one would tear each other's files."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from platform import node
from types import TracebackType
from weakref import WeakValueDictionary

from filelock import FileLock, Timeout

from sftkey.errors import RunLocked
from sftkey.files import write_json

LOCK, HOLDER = ".lock", ".running.json"


class RunLock:
    """The lock of a run folder, held until it is released or nobody has it any more.

    The system takes it from a process that dies: who finds it free need not ask who had it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / LOCK, timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise RunLocked(
                str(folder),
                f"another process works on this run: {_holder(folder)}",
                "wait for it, or end it; `name=…` begins another run beside it",
            ) from None
        except NotImplementedError:  # a file system without locks
            return
        write_json(folder / HOLDER, {"host": node(), "pid": os.getpid()})

    def release(self) -> None:
        """Let others work on the run."""
        if self._lock.is_locked:
            with suppress(OSError):
                (self.folder / HOLDER).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


_held: WeakValueDictionary[Path, RunLock] = WeakValueDictionary()


def lock_run(folder: Path) -> RunLock:
    """Lock a run folder for this process, which may do so again.

    Raises:
        RunLocked: Another process has it; its host and pid are named.
    """
    place = folder.resolve()
    lock = _held.get(place)
    if lock is None or not lock._lock.is_locked:
        lock = _held[place] = RunLock(folder)
    return lock


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER).read_text())
        return f"pid {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "it hasn't said which one"
