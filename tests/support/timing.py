"""How the time of a function grows with the length of what it reads."""

import math
import time
from collections.abc import Callable


def takes_linear_time(work: Callable[[int], object], length: int = 4_000) -> bool:
    """Tell whether four times the length takes less than ten times the time; quadratic is 16.

    It is the best of five tries in processor time, with a tenth of a second to spare, so that a
    busy machine changes nothing.
    """
    short = long = math.inf
    for _ in range(5):
        short, long = min(short, _seconds(work, length)), min(long, _seconds(work, 4 * length))
        if long <= 10 * short + 0.1:
            return True
    return False


def _seconds(work: Callable[[int], object], length: int) -> float:
    since = time.thread_time()
    work(length)
    return time.thread_time() - since
