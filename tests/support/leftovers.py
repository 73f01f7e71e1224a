"""What a killed process leaves beside a file that it was writing."""

from pathlib import Path
from platform import node

NO_PROCESS = 2**31 - 1  # above the most that any system gives


def left_by_a_kill(path: Path) -> Path:
    """Name the unfinished file or folder of a process that is gone."""
    return path.with_name(f".{path.name}.{node()}-{NO_PROCESS}.tmp")
