"""What takes long, by name: so that a command can say what it is at where nothing else is said."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_LOCK = threading.Lock()
_ACTIVITIES: list[Activity] = []


@dataclass
class Activity:
    """Something that takes long."""

    what: str  # its name, such as "loading the model"
    how_far: str = ""  # how far it is, such as "3 of 200"; empty where nobody knows
    # When it began, by the monotonic clock, in seconds.
    since: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.what, self.how_far)))


@contextmanager
def activity(what: str) -> Iterator[None]:
    """Name what is done inside; a decorator, too.

    >>> with activity("generating"):
    ...     tell("3 of 200")
    ...     str(current())
    'generating, 3 of 200'
    >>> current()
    """
    with _LOCK:
        place = len(_ACTIVITIES)
        _ACTIVITIES.append(Activity(what))
    try:
        yield
    finally:
        with _LOCK:
            del _ACTIVITIES[place:]


def tell(how_far: str) -> None:
    """Say how far the innermost activity is; nothing happens where there is none."""
    with _LOCK:
        if _ACTIVITIES:
            _ACTIVITIES[-1].how_far = how_far


def current() -> Activity | None:
    """Return the innermost activity; None where nothing takes long."""
    with _LOCK:
        return _ACTIVITIES[-1] if _ACTIVITIES else None
