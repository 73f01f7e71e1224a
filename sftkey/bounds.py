"""Bounds of time and memory for what strangers write: templates, regular expressions."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

SECONDS = 5.0
MEMORY_BYTES = 512 << 20


class Late(BaseException):
    """It takes too long; no `except Exception` on the way may take it for an error."""


@contextmanager
def bounded(seconds: float = SECONDS, num_bytes: int | None = MEMORY_BYTES) -> Iterator[None]:
    """Bound what the code inside takes, where the system can: on Linux, in the main thread.

    Raises:
        Late: After so many seconds.
        MemoryError: It asks for so many bytes more than the process has; None bounds nothing.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise Late

    with nullcontext() if num_bytes is None else _memory(num_bytes):
        before = signal.signal(signal.SIGALRM, late)
        # Again and again: raised where Python drops errors, in a destructor say, one is lost.
        timer = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory(num_bytes: int) -> Iterator[None]:
    """Bound the address space to what the process has and so many bytes more."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * resource.getpagesize() + num_bytes
    except (ImportError, OSError):  # no Linux
        yield
        return
    bounds = [limit for limit in (most, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
