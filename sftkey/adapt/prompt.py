"""The template of the prompts: the question with its context, input and options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sftkey.adapt.columns import CONTEXT, OPTIONS, PROMPT, Table
from sftkey.checks.recipe import UNDECIDED
from sftkey.data.values import options_in

# Columns that hold one option each.
LETTERED = re.compile(r"(?:option|choice|op|answer)?_?([A-Ha-h])\Z")
OPEN_TAG = re.compile(r"<\|?\w+\|?>\s*\Z|◁\w+▷\s*\Z")


def prompt_of(table: Table) -> str | None:
    """Write the template of the prompts, or what must be decided; None without a question."""
    if not table.called(PROMPT):
        asked = [name for name in table.columns if name == "source" and table.is_text(name)]
        asked = [name for name in asked if table.num_kinds(name) * 2 > len(table.rows)]
        return f"{{{asked[0]}}}" if asked else None
    found = [each for each in table.called(PROMPT) if _holds_something(table, each)]
    if not found:
        return None
    chats = [column for column in found if table.is_messages(column)]
    if chats:
        return f"{{{chats[0]}}}"
    question = _question(table, found)
    if question.startswith(UNDECIDED):
        return question
    columns = re.findall(r"\{([^{}]+)\}", question)
    if any(OPEN_TAG.search(text) for text in table.texts(columns[-1])):
        return (
            f"{UNDECIDED} the prompts in {columns[-1]} end with a tag, which belongs to the "
            "response; remove it from the rows"
        )
    context = [
        column
        for column in table.called(CONTEXT)
        if column not in columns and table.is_text(column) and not inside(table, column, columns)
    ]
    before = "".join(f"{{{column}}}\n\n" for column in context)
    options = _options(table, columns)
    return options if options.startswith(UNDECIDED) else before + question + options


def _holds_something(table: Table, column: str) -> bool:
    return table.is_messages(column) or table.is_text(column)


def _question(table: Table, found: Sequence[str]) -> str:
    """Join an instruction with its input; of two that say the same, take the longer."""
    several = {text: column for column in found for text in [tuple(table.texts(column))]}
    first = found[0]
    if len(several) == 1:
        return f"{{{first}}}"
    inputs = [column for column in found if column.lower().endswith("input")]
    heads = [column for column in found if column not in inputs]
    if len(inputs) == 1 and len(heads) == 1:
        return f"{{{heads[0]}}}\n\n{{{inputs[0]}}}"
    for column in found:
        if all(inside(table, other, [column]) for other in found if other != column):
            return f"{{{column}}}"
    listed = " or ".join(f'"{{{column}}}"' for column in found)
    return f"{UNDECIDED} which column asks: {listed}; or a template of both"


def inside(table: Table, column: str, columns: Sequence[str]) -> bool:
    """Tell whether a column's texts stand in those of the other columns already."""
    wholes = ["\n".join(texts) for texts in zip(*map(table.texts, columns), strict=True)]
    return all(text in whole for text, whole in zip(table.texts(column), wholes, strict=True))


def options_of(table: Table) -> list[list[tuple[str, str]]]:
    """Return the labels and texts of each row's options; nothing where there are none."""
    for column in table.called(OPTIONS):
        options = [options_in(value) for value in table.values(column)]
        if options and all(options):
            return options
    single = single_options(table)
    return [
        [(label, str(row.get(column))) for label, column in single.items()]
        for row in (table.rows if single else ())
    ]


def single_options(table: Table) -> dict[str, str]:
    """Return the columns that hold one option each, by their letters."""
    found = {match[1].upper(): name for name in table.columns if (match := LETTERED.match(name))}
    return dict(sorted(found.items())) if {"A", "B"} <= found.keys() else {}


def _options(table: Table, columns: Sequence[str]) -> str:
    """Write the options below the question, unless it has them already."""
    for column in table.called(OPTIONS):
        values = table.values(column)
        if column in columns or all(value in (None, "", [], {}) for value in values):
            continue
        if all(isinstance(value, str) for value in values):
            if any(value.lstrip().startswith(("[", "{")) for value in values):
                return f"{UNDECIDED} the options in {column} are no list and no JSON; mend the rows"
            return "" if inside(table, column, columns) else f"\n{{{column}}}"
        wholes = ["\n".join(texts) for texts in zip(*map(table.texts, columns), strict=True)]
        if not all(_stand_in(value, whole) for value, whole in zip(values, wholes, strict=True)):
            return f"\n{{{column}:letters}}"
    return "".join(f"\n{label}) {{{column}}}" for label, column in single_options(table).items())


def _stand_in(options: Any, text: str) -> bool:
    found = options_in(options)
    return bool(found) and all(option.strip() in text for _, option in found)
