"""Files that appear under their name only when they are whole, free names, and the cache."""

from __future__ import annotations

import json
import os
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


def cache_folder() -> Path:
    """Give the folder of what is fetched or made once: `SFTKEY_CACHE`, or in the user's cache."""
    if own := os.environ.get("SFTKEY_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sftkey"
