"""What becomes of a row: through templates over its columns, a rule, or as a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sftkey.data.response import Example
from sftkey.data.rules import Rule, make_rule
from sftkey.data.templates import Row, RowError, Template, parse_field
from sftkey.errors import DataError, Problem
from sftkey.recipe.schema import DataSection

Turns = Literal["last", "all"]
# Text, or the messages of a chat, with the thinking and the answer that follow them.
Parts = tuple[Any, str, str]


@dataclass(frozen=True)
class Unsplit:
    """A row that gives no example, with the reason; `index` is its place in the source, from 0."""

    index: int
    reason: str


@dataclass(frozen=True)
class Loaded:
    """The examples of one split, in source order, and the rows that gave none."""

    examples: list[Example]
    unsplit: list[Unsplit]


def make_examples(
    rows: Sequence[Row], data: DataSection, columns: Sequence[str], turns: Turns
) -> Loaded:
    """Make the examples of all rows.

    Args:
        rows: The rows, in source order.
        data: The recipe's section, with the defaults of its source.
        columns: The columns that the source has.
        turns: `all`: an example for every assistant turn of a conversation, with the turns before
            it as prompt.

    Raises:
        DataError: The section names columns that don't exist, or doesn't say what the answer is.
    """
    read = _reader(data, columns, rows, turns)
    loaded = Loaded([], [])
    for index, row in enumerate(rows):
        outcomes: list[Parts | RowError]
        try:
            outcomes = list(read(row))
        except RowError as error:
            outcomes = [error]
        for outcome in outcomes:
            fault = str(outcome) if isinstance(outcome, RowError) else _fault(outcome, data.system)
            if fault or isinstance(outcome, RowError):
                loaded.unsplit.append(Unsplit(index, str(fault)))
                continue
            prompt, thinking, answer = outcome
            if data.system is not None:
                prompt = ({"role": "system", "content": data.system}, *_as_messages(prompt))
            loaded.examples.append(Example(prompt, thinking, answer, index))
    return loaded


def _reader(
    data: DataSection, columns: Sequence[str], rows: Sequence[Row], turns: Turns
) -> Callable[[Row], Iterable[Parts | RowError]]:
    """Choose how a row is read: as a conversation, with a rule, or with three templates."""
    rule = make_rule(data.split_rule) if data.split_rule else None
    conversation = _conversation_column(data, columns, rows)
    if conversation is not None:
        return lambda row: _conversation(row.get(conversation), rule, turns)
    wanted = {"prompt": data.prompt}
    if data.response is None:
        wanted |= {"thinking": data.thinking, "answer": data.answer}
        if rule:
            what = "data.response: expected the column that `data.split_rule` splits; got none"
            raise DataError(data.source, what)
    elif rule is None:
        what = f"data.split_rule: expected a rule that splits `{data.response}`; got none"
        raise DataError(data.source, what)
    templates = _templates(data, wanted, columns)
    if data.response is not None:
        field = parse_field(data.response, columns)
        return lambda row: [(_prompt(row, templates["prompt"]), *_by_rule(field.text(row), rule))]
    return lambda row: [
        (
            _prompt(row, templates["prompt"]),
            templates["thinking"].fill(row),
            templates["answer"].fill(row),
        )
    ]


def _conversation_column(
    data: DataSection, columns: Sequence[str], rows: Sequence[Row]
) -> str | None:
    """Find the column of conversations: the response column if it holds lists, else `messages`."""
    if data.prompt is not None or data.thinking is not None or data.answer is not None:
        return None
    if data.response is not None:
        values = (row.get(data.response) for row in rows)
        first = next((value for value in values if value is not None), None)
        return data.response if isinstance(first, list) else None
    default = {"prompt", "thinking", "answer"} <= set(columns)
    return "messages" if "messages" in columns and not default else None


def _templates(
    data: DataSection, wanted: Mapping[str, str | None], columns: Sequence[str]
) -> dict[str, Template]:
    """Read the templates, and refuse all unknown columns at once."""
    templates = {
        name: Template(f"{{{name}}}" if text is None else text, columns)
        for name, text in wanted.items()
    }
    asked = [
        (f"data.{name}", column) for name, made in templates.items() for column in made.columns
    ]
    if data.response is not None:
        asked.append(("data.response", parse_field(data.response, columns).column))
    known = ", ".join(columns)
    problems = [
        Problem(where, f"no column {column!r}; the columns are {known}")
        for where, column in asked
        if column not in columns
    ]
    if problems:
        hint = "`data.prompt`, `data.thinking` and `data.answer` are templates over the columns"
        hint += ", or `data.response` is the one to split by `data.split_rule`"
        raise DataError(data.source, problems, hint)
    return templates


def _prompt(row: Row, template: Template) -> Any:
    """Give the prompt: a list of messages as it is, everything else as text."""
    value = row.get(template.column) if template.column else None
    return _messages(value) if isinstance(value, list) else template.fill(row)


def _by_rule(text: str, rule: Rule | None) -> tuple[str, str]:
    if rule is None:
        raise RowError("no `reasoning_content`, and no `data.split_rule` that splits the text")
    parts = rule(text)
    if isinstance(parts, str):
        raise RowError(parts)
    return parts


def _conversation(value: Any, rule: Rule | None, turns: Turns) -> Iterator[Parts | RowError]:
    """Give the last assistant turn of a conversation, or every one, with the messages before it."""
    messages = _messages(value)
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not places:
        raise RowError("no assistant turn")
    for place in places if turns == "all" else places[-1:]:
        turn = messages[place]
        try:
            # With a rule, an empty `reasoning_content` says nothing: the content may hold the tags.
            if turn.get("reasoning_content") or (rule is None and "reasoning_content" in turn):
                thinking, answer = turn["reasoning_content"], turn["content"]
            else:
                thinking, answer = _by_rule(turn["content"], rule)
        except RowError as error:
            yield error
        else:
            yield messages[:place], thinking, answer


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    """Check a list of messages, and keep of each what is text: role, content, reasoning_content."""
    if not isinstance(value, list):
        raise RowError("no list of messages")
    messages = []
    for place, message in enumerate(value):
        message = message if isinstance(message, dict) else {}
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise RowError(f"message {place} has no text as `role` and `content`")
        keys = ("role", "content", "reasoning_content")
        messages.append({key: message[key] for key in keys if isinstance(message.get(key), str)})
    return tuple(messages)


def _as_messages(prompt: Any) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt


def _fault(parts: Parts, system: str | None) -> str | None:
    """Say why this can't be trained on; None if it can."""
    prompt, thinking, answer = parts
    messages = _as_messages(prompt)
    if not any(message["content"].strip() for message in messages):
        return "the prompt is empty"
    if not answer.strip():
        return "the answer is empty"
    if messages[-1]["role"] not in ("user", "tool"):
        return f"the answer follows a message of the role {messages[-1]['role']!r}, not a user's"
    if system is not None and messages[0]["role"] == "system":
        return "`data.system` is set, but the row has a system message of its own"
    try:
        "".join([thinking, answer, *(message["content"] for message in messages)]).encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair, which is no text"
    return None
