"""A recipe as text for people: each value with the reason for it beside."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

WIDTH = 118
REASON_COLUMN = 34
# YAML folds or refuses these inside quotes.
UNSEEN = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")


@dataclass(frozen=True)
class Line:
    """One key of a section, with the reason for its value."""

    key: str
    value: Any
    why: str = ""


Section = tuple[str, Sequence[Line]]


def write_recipe(head: Iterable[str], sections: Iterable[Section]) -> str:
    """Write a recipe: comment lines, then sections in order.

    A section without a name holds keys of the top level; the lines of `stages` are a list.
    """
    lines = [f"# {text}" for text in head]
    for name, entries in sections:
        if name and entries:
            lines.append(f"{name}:")
        indent = "  " if name else ""
        for entry in entries:
            lines += _entry(entry, indent, "- " if name == "stages" else f"{entry.key}: ")
    return "\n".join(lines) + "\n"


def _entry(entry: Line, indent: str, before: str) -> list[str]:
    text = f"{indent}{before}{inline(entry.value)}"
    if not entry.why:
        return [text]
    beside = f"{text:<{REASON_COLUMN - 2}}  # {entry.why}"
    if len(beside) <= WIDTH:
        return [beside]
    above = textwrap.wrap(entry.why, WIDTH - len(indent) - 2, break_on_hyphens=False)
    return [*(f"{indent}# {line}" for line in above), text]


def inline(value: Any) -> str:
    """Write a value on one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{inline(key)}: {inline(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return _number(value)
    return json.dumps(value)  # numbers, booleans and null are JSON's


def _number(value: float) -> str:
    """Write a number as YAML reads one: `1.0e-4`, where Python has `1e-05`."""
    digits, e, power = repr(value).partition("e")
    if value and abs(value) < 1e-3 and not e:
        digits, e, power = f"{value:e}".partition("e")
        digits = digits.rstrip("0")
    if not e:
        return digits
    digits = digits if "." in digits else f"{digits}.0"
    digits = f"{digits}0" if digits.endswith(".") else digits
    return f"{digits}e{int(power):+d}"


def _text(value: str) -> str:
    """Write text bare where it is read as such, else in quotes."""
    if re.fullmatch(r"[A-Za-z_][\w./-]*", value, re.ASCII) and yaml.safe_load(value) == value:
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)
