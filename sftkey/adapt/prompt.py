"""The template of the prompts: the question with its context, input and options."""

import re
import string
from collections.abc import Sequence
from typing import Any

from sftkey.adapt.columns import (
    ANSWER,
    CONTEXT,
    ENOUGH,
    OPTIONS,
    PROMPT,
    TURN_MARK,
    Table,
    plain,
)
from sftkey.data.messages import SAYS_NOTHING
from sftkey.data.values import options_in
from sftkey.recipe.rules import UNDECIDED

# Columns that hold one option each: `option_a`, `B`, `choice1`.
LETTERED = re.compile(r"(?:option|choice|op|answer)?_?([a-h])\Z")
NUMBERED = re.compile(r"(?:option|choice|op|ending)_?(\d)\Z")
# Columns that may ask where none is called a prompt.
ASKING = ("source", "user", "human", "inputs")
FEW = 20  # rows of one prompt, which may be samples of one question
PICTURE = re.compile(r"<\|?(?:image|img|video|audio)(?:_pad|[_ ]?\d+)?\|?>", re.IGNORECASE)
OPEN_TAG = re.compile(r"<\|?\w+\|?>\s*\Z|◁\w+▷\s*\Z")


def prompt_of(table: Table) -> str | None:
    """Write the template of the prompts, or what must be decided; None without a question."""
    if not table.called(PROMPT):
        asked = [name for name in table.columns if plain(name) in ASKING and table.is_text(name)]
        asked = [name for name in asked if table.num_kinds(name) * 2 > len(table.rows)]
        asked += [name for name in table.columns if _only_asks(table, name)]
        return f"{{{asked[0]}}}" if asked else None
    found = [each for each in table.called(PROMPT) if table.is_messages(each)]
    if found:
        return f"{{{found[0]}}}"
    found = [each for each in table.called(PROMPT) if table.is_text(each)]
    if not found:
        return None
    question = _question(table, found)
    if question.startswith(UNDECIDED):
        return question
    columns = table.asked(question)
    marks = list(filter(None, map(TURN_MARK.search, table.texts(columns[-1]))))
    if len(marks) > (1 - ENOUGH) * len(table.rows):
        return (
            f"{UNDECIDED} the prompts in {columns[-1]} hold {marks[0][0]}, which the chat template "
            "writes itself; remove its marks from the rows"
        )
    if any(OPEN_TAG.search(text) for text in table.texts(columns[-1])):
        return (
            f"{UNDECIDED} the prompts in {columns[-1]} end with a tag, which belongs to the "
            "response; remove it from the rows"
        )
    if len(list(filter(PICTURE.search, table.texts(columns[-1])))) * 2 > len(table.rows):
        return (
            f"{UNDECIDED} the prompts in {columns[-1]} stand beside pictures or sounds, which no "
            "text model sees; take other rows"
        )
    if unread := _unread_context(table):
        return unread
    context = [
        column
        for column in table.called(CONTEXT)
        if column not in columns and table.is_text(column) and not inside(table, column, columns)
    ]
    before = "".join(f"{{{column}}}\n\n" for column in context)
    options = _options(table, columns) or _places(table)
    if options.startswith(UNDECIDED):
        return options
    prompt = before + question + options
    return _often_null(table, prompt) or _constant(table, prompt) or prompt


def _unread_context(table: Table) -> str:
    """Ask for a context that is no text: lists of sentences, earlier turns, mappings."""
    found = [name for name in table.called(CONTEXT) if not table.is_text(name)]
    found += [name for name in table.columns if plain(name.partition("[")[0]) in CONTEXT]
    for name in found:
        kinds = {type(value).__name__ for value in table.values(name) if value not in SAYS_NOTHING}
        if kinds and (not table.is_text(name) or "[" in name):
            return (
                f"{UNDECIDED} {name} holds a {' or '.join(sorted(kinds))}, which no template "
                "writes; make it one text in the rows (earlier turns: messages), or write the "
                "prompt without it"
            )
    return ""


def _often_null(table: Table, prompt: str) -> str:
    """Ask for a column of the prompt that too many rows have no value of."""
    for name in table.asked(prompt):
        num = sum(value is None for value in table.values(name))
        if num > (1 - ENOUGH) * len(table.rows):
            return (
                f"{UNDECIDED} {name} is null in {num} of {len(table.rows)} rows, and a template "
                "takes no null; write an empty text there, or the prompt without it"
            )
    return ""


def _constant(table: Table, prompt: str) -> str:
    """Ask for prompts that are one and the same, such as `-`, where the rows are not."""
    names = table.asked(prompt)
    if len(set(table.wholes(names))) > 1 or len({str(row) for row in table.rows}) <= FEW:
        return ""
    return (
        f"{UNDECIDED} the prompts made of {' and '.join(names)} are the same in all rows; name "
        "the column that asks, or write the questions into the rows"
    )


def _only_asks(table: Table, column: str) -> bool:
    """Tell whether it holds messages that a user's ends, none of them the assistant's."""
    chats = table.messages(column) if table.is_messages(column) else []
    roles = [[message["role"] for message in chat] for chat in chats]
    return bool(roles) and all("assistant" not in each and each[-1:] == ["user"] for each in roles)


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
    wholes = table.wholes(columns)
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
    """Return the columns that hold one option each, by their letters; numbers become letters."""
    # A letter alone is a column's name, and no key inside of one: `meta[a]`.
    named = [name for name in table.columns if len(plain(name)) > 1 or len(name) == 1]
    plains = {name: plain(name) for name in named}
    found = {match[1].upper(): name for name in plains if (match := LETTERED.match(plains[name]))}
    if {"A", "B"} <= found.keys():
        return dict(sorted(found.items()))
    found = {match[1]: name for name in plains if (match := NUMBERED.match(plains[name]))}
    first = int(min(found, default="2"))
    places = {
        string.ascii_uppercase[int(number) - first]: found[number] for number in sorted(found)
    }
    return places if first < 2 and "B" in places else {}


def _options(table: Table, columns: Sequence[str]) -> str:
    """Write the options below the question, unless it has them already."""
    for column in table.called(OPTIONS):
        values = table.values(column)
        if column in columns or all(value in SAYS_NOTHING for value in values):
            continue
        if all(isinstance(value, str) for value in values):
            if any(value.lstrip().startswith(("[", "{")) for value in values):
                return f"{UNDECIDED} the options in {column} are no list and no JSON; mend the rows"
            return "" if inside(table, column, columns) else f"\n{{{column}}}"
        pairs = zip(values, table.wholes(columns), strict=True)
        if not all(_stand_in(value, whole) for value, whole in pairs):
            return f"\n{{{column}:letters}}"
    return "".join(f"\n{label}) {{{column}}}" for label, column in single_options(table).items())


def _places(table: Table) -> str:
    """Ask whether a list holds the options, where an answer is a place in it."""
    for answer in table.called(ANSWER):
        places = table.texts(answer)
        if not all(text.isdigit() for text in places):
            continue
        for name in table.columns:
            options = [options_in(value) for value in table.values(name)]
            known = name in table.called(OPTIONS) or table.is_messages(name)
            if not known and all(
                len(each) > 1 and int(place) <= len(each)
                for place, each in zip(places, options, strict=True)
            ):
                return (
                    f"{UNDECIDED} whether {name} holds the options, and {answer} the place of one: "
                    f'then "{{{name}:letters}}" here, and "{{{answer}:letter}}" as the answer'
                )
    return ""


def _stand_in(options: Any, text: str) -> bool:
    found = options_in(options)
    return bool(found) and all(option.strip() in text for _, option in found)
