"""Examples (prompt, thinking, answer) from rows: column templates, rules that split a response."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

from sftkey.bounds import SECONDS, Late, bounded
from sftkey.data.messages import (
    SAYS_NOTHING,
    Calls,
    check_beside,
    check_trained,
    columns_beside,
    is_named,
    read_messages,
    read_tools,
    system_of,
    unmarked,
)
from sftkey.data.response import TOOLS, Example, as_messages, require_text
from sftkey.data.values import (
    RawRow,
    Refusal,
    RowError,
    Template,
    parse_field,
    parsed_json,
    trimmed,
)
from sftkey.errors import DataError, Problem, shown
from sftkey.recipe.schema import DataSection, Recipe

Rule = Callable[[str], "tuple[str, str] | str"]

# GSM8K's calculator marks: `48/2 = <<48/2=24>>24`. Without `=` it is none: `a << b >> c`.
CALCULATOR_MARK = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")
HASH_MARK = re.compile(r"^[ \t]*####[ \t]*(?!#)", re.MULTILINE)
# What a box leaves open before it: `the answer is $\boxed{5}$`.
OPEN_MATHS = re.compile(r"\s*(?:\$\$?|\\\(|\\\[)?\s*\Z")
# A line above the box that says no more than that the answer follows: `**Final Answer**`.
HEADING = re.compile(
    r"(?:\n[#*\s]{0,8}(?:the )?(?:final )?answer(?: is)?[:*\s]{0,8})+\Z", re.IGNORECASE
)


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
            thinking = HEADING.sub("", OPEN_MATHS.sub("", text[:start]))
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
    """Return the rule of that name, or one made of a regular expression.

    The expression has the groups `thinking` and `answer` (the recipe has checked it); it is
    searched for, `.` matches line ends too, and what the groups hold is taken as it is.
    """
    if name in RULES:
        return RULES[name]
    pattern = re.compile(name, re.DOTALL)

    def by_expression(text: str) -> tuple[str, str] | str:
        try:
            with bounded(num_bytes=None):
                match = pattern.search(text)
        except Late:
            what = f"{shown(name)} takes more than {SECONDS:g} seconds on {len(text):,} characters"
            hint = "write it without a repeat of what repeats itself, such as (a*)*"
            raise DataError("data.split_rule", what, hint) from None
        if match is None:
            return "the regular expression doesn't match"
        thinking, answer = match["thinking"], match["answer"]
        if thinking is None or answer is None:
            return f"the group {'thinking' if thinking is None else 'answer'} matched nothing"
        return thinking, answer

    return by_expression


REPLIES = ("completion", "response", "output")  # columns that mostly hold a whole reply
NUM_TRIED = 20  # rows that a hint's lines must read
# Text, or the messages of a chat, with the thinking and the answer that follow them.
Parts = tuple[Any, str, str]


@dataclass(frozen=True)
class RowOptions:
    """What a recipe says of its rows outside of the section on data.

    With the turns `all` every assistant turn of a conversation is an example, with the turns before
    it as prompt.
    """

    turns: Literal["last", "all"] = "last"
    reasoning: bool = True  # whether rows without one are refused; else it is empty
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe) -> RowOptions:
        """Return a recipe's."""
        kwargs = recipe.model.chat_template_kwargs
        return cls(recipe.response.turns, recipe.needs_reasoning, kwargs)


USUAL = RowOptions()


@dataclass(frozen=True)
class Loaded:
    """The examples of one split, in source order, and the rows that gave none."""

    examples: list[Example]
    unsplit: list[Refusal]


def columns_of(rows: Sequence[RawRow]) -> list[str]:
    """Return all columns in their order; a row may lack what others have, as in JSON."""
    return list(dict.fromkeys(column for row in rows for column in row))


def make_examples(rows: Sequence[RawRow], data: DataSection, options: RowOptions = USUAL) -> Loaded:
    """Make the examples of all rows; `data` has the defaults of its source.

    Raises:
        DataError: The section names columns that don't exist, or doesn't say what the answer is.
    """
    columns = columns_of(rows)
    read, beside = _reader(data, columns, rows, options), columns_beside(columns, data, rows)
    takes_tools = not is_named("tools", data)
    loaded = Loaded([], [])
    for index, row in enumerate(rows):
        outcomes: list[Parts | RowError]
        try:
            outcomes = list(read(row))
            if beside:
                prompts = [each[0] for each in outcomes if not isinstance(each, RowError)]
                check_beside(row, beside, prompts, options.template_kwargs)
        except RowError as error:
            outcomes = [error]
        for turn, outcome in enumerate(outcomes):
            try:
                tools = read_tools(row.get("tools")) if takes_tools else []
                parts = _whole(_usable(outcome, data), system_of(row, data), tools, data)
            except RowError as error:
                loaded.unsplit.append(Refusal(index, str(error), error.code))
            else:
                loaded.examples.append(Example(*parts, index, turn))
    return loaded


def _reader(
    data: DataSection, columns: Sequence[str], rows: Sequence[RawRow], options: RowOptions
) -> Callable[[RawRow], Iterable[Parts | RowError]]:
    """Choose how a row is read: as a conversation, with a rule, or with three templates."""
    rule = make_rule(data.split_rule) if data.split_rule else None
    conversation, calls = _conversation_column(data, columns, rows), Calls(rows)
    if conversation is not None:
        chats = parse_field(conversation, columns)
        return lambda row: _conversation(read_messages(chats.value(row), calls), rule, options)
    wanted = {"prompt": data.prompt}
    messages = data.response is not None and _holds_messages(data.response, rows)
    if data.response is None:
        absent = data.thinking is None and "thinking" not in columns and not options.reasoning
        wanted |= {"thinking": "" if absent else data.thinking, "answer": data.answer}
        if rule:
            what = "data.response: expected the column that `data.split_rule` splits; got none"
            raise DataError(data.source, what, _lines_of(data, columns, rows))
    elif rule is None and not messages:
        what = f"data.split_rule: expected a rule that splits `{data.response}`; got none"
        raise DataError(data.source, what)
    templates = _templates(data, wanted, columns, rows)
    if messages:
        chats = parse_field(data.response or "", columns)
        return lambda row: _conversation(
            _joined(
                _prompt(row, templates["prompt"], calls),
                read_messages(chats.value(row), calls),
                chats.name,
            ),
            rule,
            options,
        )
    if data.response is not None:
        field = parse_field(data.response, columns)
        return lambda row: [
            (_prompt(row, templates["prompt"], calls), *_by_rule(field.text(row), rule))
        ]
    return lambda row: [
        (
            _prompt(row, templates["prompt"], calls),
            trimmed(templates["thinking"].fill(row)),
            trimmed(templates["answer"].fill(row)),
        )
    ]


def _joined(prompt: Any, messages: Sequence[dict[str, Any]], column: str) -> Any:
    """Return a prompt and the messages that follow it."""
    before = as_messages(prompt)
    opening = takewhile(lambda message: message["role"] != "assistant", messages)
    if any(message in before for message in opening):
        raise RowError(f"the prompt stands in `{column}` already; leave data.prompt out")
    return (*before, *messages)


def _holds_messages(column: str, rows: Sequence[RawRow]) -> bool:
    """Tell whether a column holds lists of messages, or JSON of such, by its first full value."""
    first = _first_value(column, rows)
    return isinstance(first, list) and bool(first) and isinstance(first[0], dict)


def _first_value(column: str, rows: Sequence[RawRow]) -> Any:
    for row in rows:
        with suppress(RowError):
            value = parsed_json(parse_field(column, tuple(row)).value(row))
            if value not in SAYS_NOTHING:
                return value
    return None


def _lines_of(data: DataSection, columns: Sequence[str], rows: Sequence[RawRow]) -> str | None:
    """Write a recipe's lines for messages that end in an answer, or a text that a rule splits."""
    if data.response is not None or data.thinking is not None or data.answer is not None:
        return None
    for column in columns:
        if column == "prompt" or not _holds_messages(column, rows):
            continue
        try:
            turn = read_messages(_first_value(column, rows))[-1]
        except RowError:
            continue
        if turn["role"] == "assistant":
            begins = _first_value(column, rows)[0]
            holds_question = read_messages([begins])[0]["role"] != "assistant"
            lines = ['data.prompt: "{prompt}"'] * ("prompt" in columns and not holds_question)
            lines.append(f"data.response: {column}")
            adapt = ""
            if data.split_rule is None and "reasoning_content" not in turn:
                if isinstance(think_tags(turn["content"]), str):
                    adapt = "; `sftkey adapt` finds a data.split_rule, where they need one"
                else:
                    lines.append("data.split_rule: think_tags")
            return f"these messages are read with {', '.join(lines)}{adapt}"
    rules = {data.split_rule: make_rule(data.split_rule)} if data.split_rule else RULES
    for column in (column for column in columns if column != "prompt"):
        texts = [row.get(column) for row in rows[:NUM_TRIED]]
        for name, rule in rules.items():
            if all(isinstance(text, str) and not isinstance(rule(text), str) for text in texts):
                lines = [f'data.prompt: "{_asking(columns, column)}"', f"data.response: {column}"]
                return f"these rows are read with {', '.join(lines)}, data.split_rule: {name}"
    return None


def _asking(columns: Sequence[str], response: str) -> str:
    """Return the template of a prompt beside a response, as far as the columns' names tell it."""
    others = ["prompt"] if "prompt" in columns else [name for name in columns if name != response]
    return f"{{{others[0] if len(others) == 1 else '…'}}}"


def _conversation_column(
    data: DataSection, columns: Sequence[str], rows: Sequence[RawRow]
) -> str | None:
    """Find the column of conversations: the response column if it holds lists, else `messages`."""
    if data.prompt is not None or data.thinking is not None or data.answer is not None:
        return None
    if data.response is not None:
        return data.response if _holds_messages(data.response, rows) else None
    default = {"prompt", "thinking", "answer"} <= set(columns)
    return "messages" if "messages" in columns and not default else None


def _templates(
    data: DataSection,
    wanted: Mapping[str, str | None],
    columns: Sequence[str],
    rows: Sequence[RawRow],
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
    if data.system_column is not None:
        asked.append(("data.system_column", data.system_column))
    known = ", ".join(columns)
    problems = [
        Problem(f"data.{name}", _constant(text, columns))
        for name, text in wanted.items()
        if text and not templates[name].columns
    ]
    problems += [
        Problem(where, f"no column {column!r}; the columns are {known}")
        for where, column in asked
        if column not in columns
    ]
    if problems:
        hint = "`data.prompt`, `data.thinking` and `data.answer` are templates over the columns"
        hint += ", or `data.response` is the one to split by `data.split_rule`"
        if data.thinking is None and "thinking" not in columns and data.response is None:
            hint += "; rows without a reasoning need `thinking: own` in every stage"
            whole = next((name for name in REPLIES if name in columns), None)
            hint += f', and data.answer: "{{{whole}}}" where that is one' if whole else ""
        raise DataError(data.source, problems, _lines_of(data, columns, rows) or hint)
    return templates


def _constant(text: str, columns: Sequence[str]) -> str:
    """Say what is wrong with a template that would be the same text in every row."""
    what = f"names no column, so every row would have the text {shown(text)}"
    return f'{what}; write "{{{text.strip()}}}"' if text.strip() in columns else what


def _prompt(row: RawRow, template: Template, calls: Calls) -> Any:
    """Return the prompt: a list of messages as it is, everything else as text."""
    value = row.get(template.column) if template.column else None
    if template.column and _holds_messages(template.column, [row]):
        return tuple(unmarked(message) for message in read_messages(value, calls))
    return template.fill(row)


def _by_rule(text: str, rule: Rule | None) -> tuple[str, str]:
    if rule is None:
        raise RowError("no `reasoning_content`, and no `data.split_rule` that splits the text")
    parts = rule(text)
    if isinstance(parts, str):
        raise RowError(parts)
    return parts


def _conversation(
    messages: tuple[dict[str, Any], ...], rule: Rule | None, options: RowOptions
) -> Iterator[Parts | RowError]:
    """Return a conversation's last assistant turn, or every one, with the messages before it."""
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not places:
        raise RowError("no assistant turn")
    for place in places if options.turns == "all" else places[-1:]:
        turn = messages[place]
        try:
            check_trained(turn)
            # With a rule, an empty `reasoning_content` says nothing: the content may hold the tags.
            beside = turn.get("reasoning_content")
            if beside or (rule is None and beside is not None):
                thinking, answer = trimmed(beside), trimmed(turn["content"])
                if beside and rule and not isinstance(rule(answer), str):
                    what = "a reasoning beside the text, and one that data.split_rule finds in it"
                    raise RowError(f"{what}; leave one out")
            elif rule is None and not options.reasoning:
                thinking, answer = "", trimmed(turn["content"])
            else:
                thinking, answer = _by_rule(turn["content"], rule)
        except RowError as error:
            yield error
        else:
            yield tuple(_earlier(each, rule) for each in messages[:place]), thinking, answer


def _earlier(message: dict[str, Any], rule: Rule | None) -> dict[str, Any]:
    """Move the thinking of an earlier answer beside its content, where the template handles it."""
    message = unmarked(message)
    if message["role"] != "assistant" or "reasoning_content" in message or rule is not think_tags:
        return message
    parts = think_tags(message["content"])
    if isinstance(parts, str):
        return message
    return {**message, "content": parts[1], "reasoning_content": parts[0]}


def _usable(outcome: Parts | RowError, data: DataSection) -> Parts:
    """Return what can be trained on, or raise a RowError that says why it can't."""
    if isinstance(outcome, RowError):
        raise outcome
    prompt, _, answer = outcome
    messages = as_messages(prompt)
    if not any(message["content"].strip() for message in messages):
        raise RowError("the prompt is empty")
    if not answer.strip():
        raise RowError("the answer is empty", "no-key")
    if messages[-1]["role"] not in ("user", "tool"):
        role = messages[-1]["role"]
        raise RowError(f"the answer follows a message of the role {role!r}, not a user's")
    if answer.lstrip().startswith("<think>") and not isinstance(think_tags(answer), str):
        found = "" if data.split_rule == "think_tags" else "; data.split_rule: think_tags parts it"
        raise RowError(f"the answer begins with a reasoning in <think> tags{found}")
    return outcome


def _whole(
    parts: Parts, system: str | None, tools: Sequence[Mapping[str, Any]], data: DataSection
) -> Parts:
    """Set system message and tools before what is trained on."""
    prompt, thinking, answer = parts
    if system is not None:
        if as_messages(prompt)[0]["role"] == "system":
            key = "system" if data.system_column is None else "system_column"
            raise RowError(f"`data.{key}` is set, but the row has a system message of its own")
        prompt = ({"role": "system", "content": system}, *as_messages(prompt))
    if tools:
        told = json.dumps(tools, ensure_ascii=False, default=str)
        prompt = ({"role": TOOLS, "content": told}, *as_messages(prompt))
    try:
        require_text(json.dumps((prompt, thinking, answer), ensure_ascii=False, default=str))
    except ValueError as error:
        raise RowError(str(error)) from error
    return prompt, thinking, answer
