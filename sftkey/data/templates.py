"""Templates over the columns of a row, in `str.format`'s writing."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
FIELD = re.compile(r"([^\[\]]*)((?:\[[^\[\]]+\])*)\Z")


class RowError(ValueError):
    """One row can't be used; `make_examples` counts it."""


@dataclass(frozen=True)
class Field:
    """A part of a template, `{metadata[answer_cot]}`: column, keys into it, format."""

    column: str
    keys: tuple[str, ...]
    conversion: str | None
    spec: str

    def text(self, row: Row) -> str:
        """Give the value as text; null, lists and mappings are no text."""
        value, name = row.get(self.column), self.column
        for key in self.keys:
            name = f"{name}[{key}]"
            try:
                value = value[int(key) if isinstance(value, list) else key]  # type: ignore[index]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise RowError(f"`{name}` does not exist") from error
        if value is None:
            raise RowError(f"`{name}` is null")
        if isinstance(value, list | tuple | dict):
            raise RowError(f"`{name}` holds a {type(value).__name__}, not text")
        try:
            return format(string.Formatter().convert_field(value, self.conversion), self.spec)
        except ValueError as error:
            raise RowError(f"`{name}`: {error}") from error


def parse_field(
    name: str, columns: Sequence[str], conversion: str | None = None, spec: str = ""
) -> Field:
    """Read a column's name, with keys into it: `messages[1][content]`."""
    match = None if name in columns else FIELD.match(name)
    column, keys = (match[1], match[2]) if match else (name, "")
    return Field(column, tuple(re.findall(r"\[(.+?)\]", keys)), conversion, spec)


class Template:
    """Text with columns in braces, in `str.format`'s writing; `{{` and `}}` are braces themselves.

    Names of columns may hold dots, so a dot is no attribute here.

    Raises:
        ValueError: The braces don't pair.
    """

    def __init__(self, text: str, columns: Sequence[str]) -> None:
        self.parts: list[tuple[str, Field | None]] = []
        for literal, name, spec, conversion in string.Formatter().parse(text):
            field = None
            if name is not None:
                field = parse_field(name, columns, conversion, spec or "")
            self.parts.append((literal, field))
        self.columns = [field.column for _, field in self.parts if field]
        # The column that is the whole template: only there a list of messages is a prompt.
        whole = len(self.parts) == 1 and not self.parts[0][0] and self.parts[0][1]
        self.column = whole.column if whole and not whole.keys else None

    def fill(self, row: Row) -> str:
        """Give the text of one row."""
        return "".join(
            literal + (field.text(row) if field else "") for literal, field in self.parts
        )
