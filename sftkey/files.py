"""Files that appear under their name only when they are whole, and names that are free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a text; the file appears under its name only when it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, as `write_text` writes."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def free_name(path: Path) -> Path:
    """Give `path`, or the first of `path.1`, `path.2` … that doesn't exist."""
    count, free = 0, path
    while free.exists():
        count += 1
        free = path.with_name(f"{path.name}.{count}")
    return free
