"""A row's values as texts: JSON inside a column, options with their letters."""

from __future__ import annotations

import json
import re
import string
from typing import Any


class RowError(ValueError):
    """One row can't be used; `make_examples` counts it.

    Args:
        reason: Why, for people.
        code: The kind of reason, for programs.
    """

    def __init__(self, reason: str, code: str = "unusable") -> None:
        self.code = code
        super().__init__(reason)


def parsed_json(value: Any) -> Any:
    """Return what a text of JSON holds; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def lettered(options: Any, name: str) -> str:
    r"""Write options a line each, with their letters.

    Args:
        options: A list of texts; a mapping from letters to texts; or one of two lists, `label` and
            `text`.
        name: What it is called in an error.

    >>> lettered(["a pen", "a bird"], "choices")
    'A) a pen\nB) a bird'
    """
    options = parsed_json(options)
    pairs: list[tuple[str, Any]]
    if isinstance(options, dict) and {"label", "text"} <= options.keys():
        pairs = list(zip(options["label"], options["text"], strict=False))
    elif isinstance(options, dict):
        pairs = [(label, text) for label, text in options.items() if text is not None]
    elif isinstance(options, list) and len(options) <= len(string.ascii_uppercase):
        pairs = list(zip(string.ascii_uppercase, options, strict=False))
    else:
        raise RowError(f"`{name}` holds a {type(options).__name__}, no list of options")
    if not pairs or any(isinstance(text, list | dict) or text is None for _, text in pairs):
        raise RowError(f"`{name}` holds no options")
    if all(re.match(rf"\(?{re.escape(label)}\s*[).:]", str(text)) for label, text in pairs):
        return "\n".join(str(text) for _, text in pairs)  # they have their letters already
    return "\n".join(f"{label}) {text}" for label, text in pairs)


def letter(place: Any, name: str) -> str:
    """Return the letter of the option at a place, from 0: A for 0."""
    text = str(place).strip()
    if not re.fullmatch(r"\d{1,2}", text) or int(text) >= len(string.ascii_uppercase):
        raise RowError(f"`{name}` is {text[:20]!r}, no place of an option, counted from 0")
    return string.ascii_uppercase[int(text)]


def trimmed(text: str) -> str:
    """Remove the white space around a text; the first line of several keeps its indentation."""
    text = text.rstrip()
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", text) if "\n" in text.lstrip() else text.lstrip()
