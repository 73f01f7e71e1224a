"""Examples (prompt, thinking, answer) from rows: column templates, rules that split a response."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sftkey.data.response import Example
from sftkey.errors import DataError, Problem
from sftkey.recipe.schema import DataSection

RawRow = Mapping[str, Any]
FIELD = re.compile(r"([^\[\]]*)((?:\[[^\[\]]+\])*)\Z")


class RowError(ValueError):
    """One row can't be used; `make_examples` counts it.

    Args:
        reason: Why, for people.
        code: The kind of reason, for programs.
    """

    def __init__(self, reason: str, code: str = "unusable") -> None:
        self.code = code
        super().__init__(reason)


@dataclass(frozen=True)
class Field:
    """A part of a template, `{metadata[answer_cot]}`: column, keys into it, format."""

    column: str
    keys: tuple[str, ...]
    conversion: str | None
    spec: str

    def text(self, row: RawRow) -> str:
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

    def fill(self, row: RawRow) -> str:
        """Give the text of one row."""
        return "".join(
            literal + (field.text(row) if field else "") for literal, field in self.parts
        )


Rule = Callable[[str], "tuple[str, str] | str"]

# GSM8K's calculator marks: `48/2 = <<48/2=24>>24`. Without `=` it is none: `a << b >> c`.
CALCULATOR_MARK = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")
HASH_MARK = re.compile(r"^[ \t]*####[ \t]*(?!#)", re.MULTILINE)
# What a box leaves open before it: `the answer is $\boxed{5}$`.
OPEN_MATHS = re.compile(r"\s*(?:\$\$?|\\\(|\\\[)?\s*\Z")


def think_tags(text: str) -> tuple[str, str] | str:
    """Split `<think>thinking</think>answer`; the opening tag may stand in the prompt already."""
    if text.count("</think>") != 1:
        return "more than one `</think>`" if "</think>" in text else "no `</think>`"
    thinking, answer = text.split("</think>")
    before, tag, inside = thinking.partition("<think>")
    if tag and before.strip():
        return "text before `<think>`"
    if "<think>" in inside:
        return "more than one `<think>`"
    return (inside if tag else thinking).strip(), answer.strip()


def boxed(text: str) -> tuple[str, str] | str:
    r"""Take the last `\boxed{answer}`, braces balanced; the thinking is what stands before it."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return r"no `\boxed{`"
    content = start + len(r"\boxed{")
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[content:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            thinking = OPEN_MATHS.sub("", text[:start])
            return thinking.strip(), text[content : content + brace.start()].strip()
    return r"a `\boxed{` that is not closed"


def hash_marks(text: str) -> tuple[str, str] | str:
    """Split at the last line that begins with `####`, as in GSM8K; remove its calculator marks."""
    marks = list(HASH_MARK.finditer(text))
    if not marks:
        return "no line that begins with `####`"
    thinking = CALCULATOR_MARK.sub("", text[: marks[-1].start()])
    return thinking.strip(), text[marks[-1].end() :].strip()


RULES: dict[str, Rule] = {"think_tags": think_tags, "boxed": boxed, "hash_marks": hash_marks}


def make_rule(name: str) -> Rule:
    """Give the rule of that name, or one made of a regular expression.

    The expression has the groups `thinking` and `answer` (the recipe has checked it); it is
    searched for, `.` matches line ends too, and what the groups hold is taken as it is.
    """
    if name in RULES:
        return RULES[name]
    pattern = re.compile(name, re.DOTALL)

    def by_expression(text: str) -> tuple[str, str] | str:
        match = pattern.search(text)
        if match is None:
            return "the regular expression doesn't match"
        thinking, answer = match["thinking"], match["answer"]
        if thinking is None or answer is None:
            return f"the group {'thinking' if thinking is None else 'answer'} matched nothing"
        return thinking, answer

    return by_expression


Turns = Literal["last", "all"]
# Text, or the messages of a chat, with the thinking and the answer that follow them.
Parts = tuple[Any, str, str]


@dataclass(frozen=True)
class Unsplit:
    """A row that gives no example, with the reason; `index` is its place in the source, from 0.

    `code` names the kind of reason, for programs.
    """

    index: int
    reason: str
    code: str


@dataclass(frozen=True)
class Loaded:
    """The examples of one split, in source order, and the rows that gave none."""

    examples: list[Example]
    unsplit: list[Unsplit]


def make_examples(
    rows: Sequence[RawRow],
    data: DataSection,
    columns: Sequence[str],
    turns: Turns,
    reasoning: bool = True,
) -> Loaded:
    """Make the examples of all rows.

    Args:
        rows: The rows, in source order.
        data: The recipe's section, with the defaults of its source.
        columns: The columns that the source has.
        turns: `all`: an example for every assistant turn of a conversation, with the turns before
            it as prompt.
        reasoning: Whether rows without a reasoning are refused; else it is empty.

    Raises:
        DataError: The section names columns that don't exist, or doesn't say what the answer is.
    """
    read = _reader(data, columns, rows, turns, reasoning)
    loaded = Loaded([], [])
    for index, row in enumerate(rows):
        outcomes: list[Parts | RowError]
        try:
            outcomes = list(read(row))
        except RowError as error:
            outcomes = [error]
        for turn, outcome in enumerate(outcomes):
            try:
                prompt, thinking, answer = _usable(outcome, data.system)
            except RowError as error:
                loaded.unsplit.append(Unsplit(index, str(error), error.code))
                continue
            if data.system is not None:
                prompt = ({"role": "system", "content": data.system}, *_as_messages(prompt))
            loaded.examples.append(Example(prompt, thinking, answer, index, turn))
    return loaded


def _reader(
    data: DataSection,
    columns: Sequence[str],
    rows: Sequence[RawRow],
    turns: Turns,
    reasoning: bool,
) -> Callable[[RawRow], Iterable[Parts | RowError]]:
    """Choose how a row is read: as a conversation, with a rule, or with three templates."""
    rule = make_rule(data.split_rule) if data.split_rule else None
    conversation = _conversation_column(data, columns, rows)
    if conversation is not None:
        return lambda row: _conversation(row.get(conversation), rule, turns, reasoning)
    wanted = {"prompt": data.prompt}
    if data.response is None:
        absent = data.thinking is None and "thinking" not in columns and not reasoning
        wanted |= {"thinking": "" if absent else data.thinking, "answer": data.answer}
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
    data: DataSection, columns: Sequence[str], rows: Sequence[RawRow]
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
        if data.thinking is None and "thinking" not in columns and data.response is None:
            hint += "; rows without a reasoning need `thinking: own` in every stage"
        raise DataError(data.source, problems, hint)
    return templates


def _prompt(row: RawRow, template: Template) -> Any:
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


def _conversation(
    value: Any, rule: Rule | None, turns: Turns, reasoning: bool
) -> Iterator[Parts | RowError]:
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
            elif rule is None and not reasoning:
                thinking, answer = "", turn["content"]
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


def _usable(outcome: Parts | RowError, system: str | None) -> Parts:
    """Return what can be trained on.

    Raises:
        RowError: It can't.
    """
    if isinstance(outcome, RowError):
        raise outcome
    prompt, thinking, answer = outcome
    messages = _as_messages(prompt)
    if not any(message["content"].strip() for message in messages):
        raise RowError("the prompt is empty")
    if not answer.strip():
        raise RowError("the answer is empty", "no-key")
    if messages[-1]["role"] not in ("user", "tool"):
        role = messages[-1]["role"]
        raise RowError(f"the answer follows a message of the role {role!r}, not a user's")
    if system is not None and messages[0]["role"] == "system":
        raise RowError("`data.system` is set, but the row has a system message of its own")
    try:
        "".join([thinking, answer, *(message["content"] for message in messages)]).encode()
    except UnicodeEncodeError as error:
        raise RowError("half of a surrogate pair, which is no text") from error
    return outcome
