"""A row's values as texts: column templates, JSON inside a column, options with their letters."""

import ast
import json
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

LABELS = ("label", "key", "id", "letter")
TEXTS = ("text", "value", "content", "option")
# What numpy prints has no commas, and Python would join its texts: `['a pen' 'a bird']`.
WITHOUT_COMMA = re.compile(r"""['"]\s+['"]""")


class RowError(ValueError):
    """One row can't be used; the code names the kind of reason, for programs."""

    def __init__(self, reason: str, code: str = "unusable") -> None:
        self.code = code
        super().__init__(reason)


@dataclass
class Refusal:
    """A row that can't be used."""

    index: int  # its place in source order, from 0
    reason: str  # why, for people
    code: str = "unusable"  # the kind of reason, for programs
    split: str = ""  # the one that it was meant for


class RepeatedKeyError(ValueError):
    """An object of JSON has a key several times, of which only the last would be read."""


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, as its `object_pairs_hook`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return found


def row_json(value: Any) -> Any:
    """Return the same as `parsed_json`, of a row that is read."""
    try:
        return parsed_json(value, each_once)
    except RepeatedKeyError as error:
        raise RowError(f"JSON with the key {str(error)!r} several times in one object") from error


def parsed_json(value: Any, objects: Callable[[Any], Any] | None = None) -> Any:
    """Return what a text of JSON or a printed Python list holds; anything else as it is.

    >>> parsed_json('["a pen"]'), parsed_json("['a pen', None]"), parsed_json("[see below]")
    (['a pen'], ['a pen', None], '[see below]')
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value, object_pairs_hook=objects)
    except RepeatedKeyError:
        raise
    except (ValueError, RecursionError):
        pass
    if value.rstrip()[-1:] not in ("]", "}") or WITHOUT_COMMA.search(value):
        return value
    try:  # a table's list, written as text by pandas
        printed = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value
    return printed if isinstance(printed, list | dict) else value


def lettered(options: Any, name: str) -> str:
    r"""Write options a line each, with their letters.

    Args:
        options: A list of texts, or of mappings with `label` and `text`; a mapping from letters to
            texts; or one of two lists, `label` and `text`.
        name: What it is called in an error.

    >>> lettered(["a pen", "a bird"], "choices")
    'A) a pen\nB) a bird'
    """
    pairs = _pairs(row_json(options), name)
    if not pairs or any(isinstance(text, list | dict) or text is None for _, text in pairs):
        raise RowError(f"`{name}` holds no options")
    if all(re.match(rf"\(?{re.escape(label)}\s*[).:]", str(text)) for label, text in pairs):
        return "\n".join(str(text) for _, text in pairs)  # they have their letters already
    return "\n".join(f"{label}) {text}" for label, text in pairs)


def options_in(options: Any) -> list[tuple[str, str]]:
    """Return the labels and texts that `lettered` writes; nothing where it writes none."""
    try:
        return [(label, str(text)) for label, text in _pairs(parsed_json(options), "")]
    except RowError:
        return []


def _pairs(options: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(options, dict):
        labels, texts = options.get("label"), options.get("text")
        if isinstance(labels, list) and isinstance(texts, list):
            return [(str(label), text) for label, text in zip(labels, texts, strict=False)]
        return [(str(label), text) for label, text in options.items() if text is not None]
    if isinstance(options, list) and len(options) <= len(string.ascii_uppercase):
        return [_pair(*each) for each in zip(string.ascii_uppercase, options, strict=False)]
    raise RowError(f"`{name}` holds a {type(options).__name__}, no list of options")


def _pair(label: str, option: Any) -> tuple[str, Any]:
    """Take label and text out of an option that has both: `{"key": "A", "value": "a pen"}`."""
    if not isinstance(option, dict):
        return label, option
    own = next((str(option[key]) for key in LABELS if option.get(key) is not None), label)
    return own, next((option[key] for key in TEXTS if option.get(key) is not None), None)


def letter(place: Any, name: str, first: int) -> str:
    """Return the letter of the option at a place.

    >>> letter(0, "answer", first=0), letter("2", "answer", first=1)
    ('A', 'B')
    """
    text = str(place).strip()
    number = int(text) - first if re.fullmatch(r"\d{1,2}", text) else -1
    if not 0 <= number < len(string.ascii_uppercase):
        raise RowError(f"`{name}` is {text[:20]!r}, no place of an option, counted from {first}")
    return string.ascii_uppercase[number]


def trimmed(text: str) -> str:
    """Remove the white space around a text; the first line of several keeps its indentation."""
    text = text.rstrip()
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", text) if "\n" in text.lstrip() else text.lstrip()


RawRow = Mapping[str, Any]
PLACES = {"letter": 0, "letter_from_1": 1}  # formats, and where they begin to count
FIELD = re.compile(r"([^\[\]]*)((?:\[[^\[\]]+\])*)\Z")


@dataclass(frozen=True)
class Field:
    """A part of a template, `{metadata[answer_cot]}`: column, keys into it, format."""

    column: str
    keys: tuple[str, ...]
    conversion: str | None
    spec: str

    @property
    def name(self) -> str:
        """The column with the keys into it."""
        return "".join([self.column, *(f"[{key}]" for key in self.keys)])

    def value(self, row: RawRow) -> Any:
        """Return the value; JSON text is looked into."""
        value = row.get(self.column)
        for place, key in enumerate(self.keys, 1):
            value = row_json(value)
            try:
                value = value[int(key) if isinstance(value, list) else key]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                name = replace(self, keys=self.keys[:place]).name
                raise RowError(f"`{name}` does not exist") from error
        return value

    def text(self, row: RawRow) -> str:
        """Return the value as text; null, NaN, lists and mappings are no text.

        Three formats are our own: `letters` writes options a line each; `letter` turns the place of
        one, counted from 0, into its letter, and `letter_from_1` one that is counted from 1.
        """
        value, name = self.value(row), self.name
        if value is None:
            raise RowError(f"`{name}` is null")
        if self.spec == "letters":
            return lettered(value, name)
        if self.spec in PLACES:
            return letter(value, name, PLACES[self.spec])
        if isinstance(value, float) and not math.isfinite(value):
            raise RowError(f"`{name}` is {value}, which is no number")
        if isinstance(value, list | tuple | dict | bytes):
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

    def fill(self, row: RawRow) -> str:
        """Return the text of one row; a column that is empty leaves no white space beside it."""
        text, value = "", None
        for literal, field in self.parts:
            # `{context}\n\n{question}` of a row without context begins with the question.
            literal = literal.lstrip() if value == "" and not text else literal
            value = field.text(row) if field else None
            # `{instruction}\n\n{input}` of a row without input ends with the instruction.
            text += literal.rstrip() if value == "" and text else literal
            text += value or ""
        return text
