"""Generations that another engine wrote, read for `sftkey evaluate RUN --generations FILE`."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from sftkey.errors import DataError, Problem
from sftkey.evaluation.grading import shortened
from sftkey.generation.generate import Generation


def read_generations(file: Path, expected: Collection[int]) -> dict[int, Generation]:
    """Read one generation for each question from JSONL, in any order.

    A row is an object with `index` and `text`; `num_tokens` and `stopped` may stand in it.

    Args:
        file: As another engine wrote it, or a run's own `evaluation/<stage>.jsonl`.
        expected: The index of each question.

    Raises:
        DataError: With all rows that are no generations, stand twice or belong to no question,
            and with the questions that have none.
    """
    hint = 'a row is {"index": 7, "text": "…"}, one for each question; `stopped` is optional'
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(str(file), f"can't be read: {error.strerror}", hint) from None
    generations: dict[int, Generation] = {}
    first_lines: dict[int, int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            index, generation = _row(line)
        except ValueError as error:
            problems.append(Problem("", str(error), number))
            continue
        if index in first_lines:
            what = f"expected once; it stands in line {first_lines[index]} already"
            problems.append(Problem(f"index {index}", what, number))
        elif index not in expected:
            what = f"expected the index of one of the {len(expected)} questions"
            problems.append(Problem(f"index {index}", what, number))
        else:
            generations[index] = generation
        first_lines.setdefault(index, number)
    missing = [index for index in expected if index not in generations]
    problems += [Problem(f"index {index}", "expected a generation; got none") for index in missing]
    if problems:
        raise DataError(str(file), shortened(problems), hint)
    return generations


_FIELDS = {
    "index": ((int,), "an integer"),
    "text": ((str,), "a text"),
    "num_tokens": ((int, type(None)), "an integer"),
    "stopped": ((bool, type(None)), "true or false"),
}


def _row(line: bytes) -> tuple[int, Generation]:
    """Check one row; a ValueError's text says what was expected."""
    try:
        row = json.loads(line)
    except ValueError:  # also of bytes that are no UTF-8
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object; got {line[:60].decode(errors='replace')!r}")
    for key, (types, name) in _FIELDS.items():
        if type(row.get(key)) not in types:  # JSON's true is no integer, though Python's is
            raise ValueError(f"{key}: expected {name}; got {row.get(key)!r}")
    return row["index"], Generation(row["text"], row.get("num_tokens"), row.get("stopped"))
