"""What columns are for, by their names and by what they hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftkey.data.examples import columns_of
from sftkey.data.messages import read_messages
from sftkey.data.values import RowError, parsed_json

PROMPT = ("prompt", "question", "problem", "instruction", "query", "input")
THINKING = (
    *("thinking", "reasoning", "rationale", "cot", "thought", "thoughts", "explanation"),
    *("chain_of_thought", "reasoning_content", "trace"),
)
ANSWER = (
    *("answer", "final_answer", "label", "target", "correct", "answer_key", "expected_answer"),
    *("ground_truth", "gold", "correct_answer"),
)
RESPONSE = ("response", "completion", "output", "solution", "answer", "text", "generation")
SYSTEM = ("system", "system_prompt", "system_message")
CONTEXT = (
    *("context", "passage", "article", "document", "paragraph", "background", "story", "hint"),
    *("contexts", "passages", "articles", "documents", "paragraphs", "premise", "table", "history"),
)
OPTIONS = ("options", "choices", "candidates", "endings")
# A column's name with one of these is about a row, and no part of it.
ABOUT = {"type", "source", "id", "idx", "index", "uuid", "grade", "config", "configs", "count"}
ABOUT |= {"model", "mode", "length", "score", "reward", "task", "topic", "is", "original", "tokens"}
ABOUT |= {"correctness", "finish", "license", "version", "difficulty", "level", "rate", "category"}
# No blank, and no script that writes without blanks.
WORD = re.compile(r"[!-~]*\Z")
NOTHING: tuple[Any, ...] = (None, "", [], {})
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows with their columns, looked at through some of them.

    Args:
        rows: Those that are looked at.
        columns: All columns; inside a column of objects they are called `data[question]`.
    """

    rows: Sequence[Row]
    columns: Sequence[str]
    seen: dict[str, list[Any]] = field(default_factory=dict)

    def values(self, column: str) -> list[Any]:
        """Return a column's values, JSON text read."""
        if column not in self.seen:
            self.seen[column] = [parsed_json(row.get(column)) for row in self.rows]
        return self.seen[column]

    def is_text(self, column: str) -> bool:
        """Tell whether it holds texts or numbers, and not only empty ones."""
        values = [value for value in self.values(column) if value not in (None, "")]
        return bool(values) and all(isinstance(value, str | int | float) for value in values)

    def is_written(self, column: str) -> bool:
        """Tell whether its values are texts or numbers as they stand, be it JSON: `[1, 2]`."""
        values = [row.get(column) for row in self.rows]
        values = [value for value in values if value not in (None, "")]
        return bool(values) and all(isinstance(value, str | int | float) for value in values)

    def is_messages(self, column: str) -> bool:
        """Tell whether it holds lists of messages."""
        values = [value for value in self.values(column) if value is not None]
        return bool(values) and all(
            isinstance(value, list)
            and bool(value)
            and all(isinstance(each, dict) and each.keys() & {"role", "from"} for each in value)
            for value in values[:20]
        )

    def messages(self, column: str) -> list[tuple[dict[str, str], ...]]:
        """Return the conversations of a column; an unreadable one is empty."""
        read = []
        for value in self.values(column):
            try:
                read.append(read_messages(value))
            except RowError:
                read.append(())
        return read

    def unreadable(self, column: str) -> str:
        """Say why the messages of a column can't be read; nothing where some can."""
        reason = ""
        for value in self.values(column):
            try:
                read_messages(value)
            except RowError as error:
                reason = reason or str(error)
            else:
                return ""
        return reason

    def texts(self, column: str) -> list[str]:
        """Return a column's texts as they stand; what is null is empty."""
        values = (row.get(column) for row in self.rows)
        return ["" if value is None else str(value) for value in values]

    def is_words(self, column: str) -> bool:
        """Tell whether each text is one word at most: a number, name, date, link or hash."""
        return all(WORD.match(text) for text in self.texts(column))

    def num_kinds(self, column: str) -> int:
        """Count the different values."""
        return len({str(value) for value in self.values(column)})

    def varies(self, column: str, beside: str) -> bool:
        """Tell whether it says something of its own in each row, as a text of a row does."""
        return self.num_kinds(column) * 20 >= self.num_kinds(beside)

    def called(self, names: Sequence[str]) -> list[str]:
        """Find columns of these names, in the names' order; else those with a name inside.

        `Complex_CoT` and `generated_solution` are found, `problem_type` and `source_id` aren't.
        """
        plains = {column: plain(column) for column in self.columns}
        exact = [column for name in names for column in self.columns if plains[column] == name]
        if exact:
            return list(dict.fromkeys(exact))
        return [
            column
            for column in self.columns
            if not ABOUT & set(plains[column].split("_"))
            and any(re.search(rf"(^|_){name}(_|$)", plains[column]) for name in names)
        ]

    def flattened(self) -> Table:
        """Look into columns of objects: `data[question]` is a column then."""
        rows: list[dict[str, Any]] = []
        for row in self.rows:
            flat: dict[str, Any] = {}
            for column, value in row.items():
                inner = parsed_json(value)
                pairs = inner.items() if isinstance(inner, dict) else ()
                flat |= {f"{column}[{key}]": item for key, item in pairs} or {column: value}
            rows.append(flat)
        return Table(rows, columns_of(rows))


def plain(column: str) -> str:
    """Write a name in small letters and underscores, the last of its keys: `answerKey`."""
    name = column.removesuffix("]").rpartition("[")[2]
    name = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", name)
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
