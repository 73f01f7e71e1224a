"""Where data goes: stdout, wrapped to a terminal, or whole in a pipe."""

from __future__ import annotations

import sys

from rich.console import Console

PIPE_WIDTH = 10_000  # no line of ours is as long, so a pipe gets it unbroken


def stdout_console() -> Console:
    """Give the console of the data; markup is off, since data may hold brackets."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, markup=False, highlight=False)
