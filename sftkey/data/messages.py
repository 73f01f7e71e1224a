"""Messages of a conversation, in the forms that data sets write them."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sftkey.data.response import TOOLS
from sftkey.data.values import RowError, parsed_json, row_json
from sftkey.errors import did_you_mean
from sftkey.recipe.schema import DataSection
from sftkey.recipe.yaml_io import inline

# What data sets and APIs call the roles.
ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function"), "tool"),
}
# Whose message it is and what it says, in the words of several data sets.
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
REASONING = ("reasoning_content", "thinking", "reasoning")
# Whether a message is trained, in the words of several trainers.
FLAGS = ("train", "trainable", "weight", "loss_mask", "loss")
PARTS = {"reasoning": "thinking", "input_text": "text", "output_text": "text"}
# What a part says beside its text that changes neither what is read nor what is trained.
OF_PARTS = ("type", "id", "index", "signature", "cache_control", "annotations", "citations")
OF_INFO = ("source", "id", "model", "language")  # where a message comes from: `info: {source: …}`
SYSTEM = ("system", "system_prompt", "system_message")  # columns that hold a row's system message
# What other trainers and APIs take from beside the messages, and what is done about it here.
NOT_READ = {
    "functions": "is the old form of `tools`: write each there, as {type: function, function: …}",
    "documents": "aren't handed to the template: write them into the messages",
    "chat_template": "is one for all rows: write model.chat_template",
    "chat_template_kwargs": "are the same for all rows: write model.chat_template_kwargs",
    "enable_thinking": "is one for all rows: write model.chat_template_kwargs",
    "tool_choice": "belongs to a request: no template writes it",
    "function_call": "belongs to a request: no template writes it",
    "parallel_tool_calls": "belongs to a request: no template writes it",
    "history": "holds earlier turns: write them as messages",
    **dict.fromkeys(("images", "image", "videos", "audios", "audio"), "isn't read: text alone is"),
}
TAKES = {"parameters", "input_schema", "inputSchema"}  # beside a tool's name
OF_TEMPLATE = ("chat_template_kwargs", "enable_thinking")
SAYS_NOTHING: tuple[Any, ...] = (None, "", [], {})
DEFAULTS = {"tool_choice": "auto", "function_call": "auto", "parallel_tool_calls": True}
OF_CALLS = ("function_call", "tool_call")  # roles of what `tool_calls` of an assistant's turn holds
READ_HERE = (*ROLE_KEYS, *CONTENT_KEYS, "tool_calls", *REASONING, *FLAGS)


def is_conversation(value: Any) -> bool:
    """Tell whether a value is a list that begins with a message of somebody."""
    first = value[0] if isinstance(value, list) and value else None
    speakers = ("system", *ROLES.values())
    return isinstance(first, dict) and any(_role(first.get(key)) in speakers for key in ROLE_KEYS)


@dataclass
class _Arguments:
    """What the objects at one place in the arguments of all calls have."""

    keys: set[frozenset[str]] = field(default_factory=set)  # of each of them
    said: set[str] = field(default_factory=set)  # keys that aren't null in one of them
    functions: set[str] = field(default_factory=set)  # those called with one


@dataclass(frozen=True)
class Calls:
    """The tool calls of all rows: they tell a null that is meant from one that fills a table.

    A table gives the arguments of all calls the keys of all functions.
    """

    rows: Sequence[Mapping[str, Any]]

    @cached_property
    def objects(self) -> dict[tuple[str, ...], _Arguments]:
        """What arguments hold, by the keys that lead there."""
        found: dict[tuple[str, ...], _Arguments] = defaultdict(_Arguments)
        for row in self.rows:
            for messages in map(parsed_json, row.values()):
                for message in messages if isinstance(messages, list) else ():
                    calls = message.get("tool_calls") if isinstance(message, dict) else None
                    for call in calls if isinstance(calls, list) else ():
                        function = _function_of(call)
                        self._note(found, (), function.get("arguments"), str(function.get("name")))
        return found

    def _note(
        self, found: dict[tuple[str, ...], _Arguments], path: tuple[str, ...], value: Any, name: str
    ) -> None:
        for each in value if isinstance(value, list) else ():
            self._note(found, (*path, "[]"), each, name)
        if isinstance(value, Mapping):
            found[path].keys.add(frozenset(value))
            found[path].functions.add(name)
            found[path].said |= {key for key, each in value.items() if each is not None}
            for key, each in value.items():
                self._note(found, (*path, key), each, name)

    def meant(self, value: Any, path: tuple[str, ...] = ()) -> Any:
        """Return arguments without the nulls that fill a table.

        Raises:
            RowError: It can't be told whether one fills the table.
        """
        if isinstance(value, list):
            return [self.meant(each, (*path, "[]")) for each in value]
        if not isinstance(value, Mapping):
            return value
        fills: set[str] = set()
        if None in value.values() and len((here := self.objects[path]).keys) == 1:
            fills = {key for key, each in value.items() if each is None} & here.said
            if fills and len(here.functions) == 1:
                what = f"the argument {min(fills)!r} of a tool call is null, which a table writes"
                raise RowError(
                    f"{what} for one that isn't given, too: leave it out, or write the arguments "
                    "as JSON text"
                )
        kept = {key: each for key, each in value.items() if key not in fills}
        return {key: self.meant(each, (*path, key)) for key, each in kept.items()}


def read_messages(value: Any, calls: Calls | None = None) -> tuple[dict[str, Any], ...]:
    """Read a list of messages: of each the role, the content and the reasoning beside it.

    Others write `from` and `value`, or `speaker` and `text`, for `role` and `content`; content may
    be a list of parts; and the list may be JSON text. A message that isn't to be trained has
    `train: False`. What else it says is handed to the chat template as it is. The `calls` are those
    of all rows, by default of this list alone.
    """
    value = row_json(value)
    if not isinstance(value, list):
        raise RowError("no list of messages")
    known = calls or Calls([{"messages": value}])
    return tuple(_message(message, place, known) for place, message in enumerate(value))


def _message(message: Any, place: int, known: Calls) -> dict[str, Any]:
    message = message if isinstance(message, dict) else {}
    role = _one_of({key: _role(message.get(key)) for key in ROLE_KEYS}, place)
    content = _one_of({key: message.get(key) for key in CONTENT_KEYS}, place)
    if message.get("function_call") or role in OF_CALLS:
        what = "`function_call`" if message.get("function_call") else f"the role {role!r}"
        raise RowError(
            f"message {place}: {what} is an old form; write an assistant's message with "
            '`tool_calls`: [{"type": "function", "function": {"name": …, "arguments": {…}}}]'
        )
    calls = _calls(message.get("tool_calls"), place, known)
    if content is None and calls:
        content = ""
    thoughts = {key: message.get(key) for key in REASONING}
    if isinstance(content, list):
        thoughts["content"], content = _from_parts(content, place)
    thinking = _one_of(thoughts, place)
    if not isinstance(role, str) or not isinstance(content, str):
        others = ", ".join(f"`{key}`" for key in message if key not in READ_HERE)
        rename = f"; rename {others}, where they are meant" if others else ""
        raise RowError(f"message {place} has no text as `role` and `content`{rename}")
    if role == TOOLS:
        raise RowError(f"message {place}: tools aren't a message; write them into a column `tools`")
    read: dict[str, Any] = {"role": role, "content": content}
    if isinstance(thinking, str) and role == "assistant":
        read["reasoning_content"] = thinking
    elif thinking not in SAYS_NOTHING:
        what = "a reasoning that is no text" if role == "assistant" else f"a {role}'s reasoning"
        raise RowError(f"message {place} holds {what}; leave it out, or write it into the content")
    if calls:
        read["tool_calls"] = calls
    if not _is_trained(message, read["role"], f"message {place}"):
        read["train"] = False
    # False says something: it may be somebody's word for a turn that isn't to be trained.
    further = {k: v for k, v in message.items() if k not in READ_HERE and v not in SAYS_NOTHING}
    return read | further


def _role(value: Any) -> Any:
    return ROLES.get(value.lower(), value.lower()) if isinstance(value, str) else value


def _one_of(found: Mapping[str, Any], place: int) -> Any:
    """Return what a message says under one of several keys; None where it says nothing."""
    given = {key: value for key, value in found.items() if value is not None}
    said = {key: value for key, value in given.items() if value not in SAYS_NOTHING} or given
    values = list(said.values())
    if any(value != values[0] for value in values):
        names = " and ".join(f"`{key}`" for key in said)
        raise RowError(f"message {place} says different things as {names}; leave one out")
    return values[0] if values else None


def _is_trained(message: Mapping[str, Any], role: str, where: str) -> bool:
    """Tell whether a message, or a row, may have a loss, as far as it says so itself."""
    trained = True
    for key in FLAGS:
        value = message.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise RowError(
                f"{where}: `{key}` is {value!r}, expected true or false; weights are "
                "`loss_on` of a stage"
            )
        if value and role != "assistant":
            raise RowError(f"{where}: `{key}` asks for a loss on a message of the {role}")
        trained = trained and bool(value)
    return trained


def _calls(value: Any, place: int, known: Calls) -> list[dict[str, Any]]:
    """Read the tool calls of a message; templates want their arguments as a mapping."""
    as_text, value = isinstance(value, str), row_json(value)
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise RowError(f"message {place}: `tool_calls` is no list of calls")
    calls = []
    for call in value:
        function = dict(_function_of(call))
        if not isinstance(function.get("name"), str):
            raise RowError(f"message {place}: a tool call has no `name`")
        arguments = function.pop("arguments", None) or {}
        # In a text of JSON a null is meant; in a table it may fill a cell.
        is_json = as_text or isinstance(arguments, str)
        read = row_json(arguments) if is_json else known.meant(arguments)
        function = {**_without_nulls(function), "arguments": read}
        inside = call.get("function") is not None
        calls.append({**_without_nulls(call), "function": function} if inside else function)
    return calls


def _function_of(tool: Any) -> Mapping[str, Any]:
    """Return the function that a tool, or the call of one, holds or is; empty where it is none."""
    function = (tool.get("function") or tool) if isinstance(tool, dict) else {}
    return function if isinstance(function, dict) else {}


def _without_nulls(value: Any) -> Any:
    """Return a value without the nulls by which tables fill the keys that other rows have."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Read a row's tools: one description or a list, or JSON of such; words are something else."""
    tools = row_json(value) if isinstance(value, str) else _without_nulls(value)
    if isinstance(tools, Mapping) and tools:
        tools = [tools]
    tools = list(map(row_json, tools)) if isinstance(tools, list) else []
    if not all(isinstance(each, dict) for each in tools):
        return []
    if not all("name" in _function_of(each) for each in tools):
        raise RowError("`tools` holds the description of a tool without a `name`")
    return tools


def is_named(column: str, data: DataSection) -> bool:
    """Tell whether a line of the section names a column."""
    texts = " ".join(text for text in (data.prompt, data.thinking, data.answer) if text)
    return column in (data.response, data.system_column) or bool(re.search(rf"{{{column}\b", texts))


def columns_beside(
    columns: Sequence[str], data: DataSection, rows: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """List the columns that other trainers read beside the messages, and that no line names.

    Those whose first value describes tools are some of them, whatever their names are.
    """
    settled = {"system", "system_column"} & data.model_fields_set
    # A number `loss` beside the messages is what somebody measured.
    known = {*NOT_READ, *FLAGS, *(() if settled else SYSTEM)} - {"loss"}
    for column in {*columns} - known - {"tools"}:
        first = next((row[column] for row in rows if row.get(column) not in SAYS_NOTHING), None)
        known |= {column} if _describes_tools(parsed_json(first)) else set()
    return [column for column in columns if column in known and not is_named(column, data)]


def _describes_tools(value: Any) -> bool:
    """Tell whether a value is a list of tools, each with a name and what it takes."""
    tools = value if isinstance(value, list) and value else [None]
    return all("name" in each and not TAKES.isdisjoint(each) for each in map(_function_of, tools))


def check_beside(
    row: Mapping[str, Any],
    columns: Sequence[str],
    prompts: Sequence[Any],
    template_kwargs: Mapping[str, Any],
) -> None:
    """See that what a row says in the `columns_beside` is used, or said already.

    The prompts of its turns are messages, or a text: beside a text there may be all kinds of
    columns, and functions alone are no question of taste.
    """
    chats = [prompt for prompt in prompts if not isinstance(prompt, str)]
    for column in columns:
        value = _said(row_json(row.get(column)))
        if value is None or value == DEFAULTS.get(column, ...):
            continue
        if column == "functions":
            named = (isinstance(each, Mapping) and "name" in each for each in value)
            if not isinstance(value, list) or not all(named):
                continue  # words, and no descriptions
        elif not chats:
            continue
        if column in FLAGS:
            if not _is_trained({column: value}, "assistant", "the row"):
                raise RowError("a row that isn't to be trained", "not-trained")
        elif column in NOT_READ:
            now = ""
            if column in OF_TEMPLATE and template_kwargs:
                given = value if column == "chat_template_kwargs" else {column: value}
                if isinstance(given, Mapping) and given.items() <= template_kwargs.items():
                    continue  # the recipe says the same
                now = f"; now it is {inline(dict(template_kwargs))}"
            raise RowError(f"`{column}` {NOT_READ[column]}{now}; leave the column out")
        elif _describes_tools(value) and value != row_json(row.get("tools")):
            what = "describes tools, which are read in a column `tools` alone"
            raise RowError(f"`{column}` {what}: call it so, or leave it out")
        elif isinstance(value, str):
            own = [each["content"].strip() for each in chats[0][:1] if each["role"] == "system"]
            if value.strip() not in own:
                what = f"`{column}` isn't read: write data.system_column: {column}, or data.system:"
                raise RowError(f"{what} null to leave it out")


def system_of(row: Mapping[str, Any], data: DataSection) -> str | None:
    """Return the system message that is put before the row's prompt."""
    if data.system_column is None:
        return data.system
    text = row.get(data.system_column)
    if text is not None and not isinstance(text, str):
        raise RowError(f"`{data.system_column}` holds a {type(text).__name__}, not text")
    return text if text and text.strip() else data.system


def _said(value: Any) -> Any:
    """Return a value without what says nothing: tables fill absent keys with nulls."""
    if isinstance(value, Mapping):
        value = {key: each for key, each in value.items() if each not in SAYS_NOTHING}
    return None if value in SAYS_NOTHING else value


def _from_parts(parts: Sequence[Any], place: int) -> tuple[str | None, str]:
    """Join the parts of a message: those of reasoning, and those of text."""
    found: dict[str, list[str]] = {"text": [], "thinking": []}
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        part = part if isinstance(part, dict) else {"type": "unknown"}
        own = part.get("type", "text")
        kind = PARTS.get(own, own)
        key = next((key for key in (kind, own) if key in part), "text")
        text = part.get(key) if kind in found else None
        if not isinstance(text, str):
            raise RowError(f"message {place} holds a part of the type {kind!r}, which is no text")
        found[kind].append(text)
        for name, value in part.items():
            if name in FLAGS and value not in (None, 1):
                what = "a message is trained as a whole; weights are `loss_on` of a stage"
                raise RowError(f"message {place}: `{name}` of a part: {what}")
            if name not in (key, *OF_PARTS, *FLAGS) and value not in SAYS_NOTHING:
                what = "which nothing reads; leave it out"
                raise RowError(f"message {place}: `{name}` of a part, {what}")
    return "".join(found["thinking"]) or None, "".join(found["text"])


def check_trained(turn: Mapping[str, Any]) -> None:
    """See that a turn can be trained, and that all that it says is."""
    if turn.get("train") is False:
        raise RowError("a turn that isn't to be trained", "not-trained")
    if "tool_calls" in turn:
        raise RowError("a turn that calls a tool, and answers nothing yet", "not-trained")
    read = ("role", "content", "reasoning_content")
    further = next(
        (key for key in turn if key not in read and not _repeats(turn[key], turn["content"])), None
    )
    if further:
        near = did_you_mean(further, READ_HERE)
        raise RowError(f"`{further}` of a trained turn, which nothing reads; leave it out{near}")


def _repeats(value: Any, content: str) -> bool:
    """Tell whether a value says no more than a content: parts of it, and where it comes from."""
    if isinstance(value, Mapping):
        rest = (each for key, each in value.items() if key not in OF_INFO)
        return all(_repeats(each, content) for each in rest)
    if value in SAYS_NOTHING or not isinstance(value, str):
        return value in SAYS_NOTHING
    part = rf"(?:\A|[>\n])\s*{re.escape(value.strip())}\s*(?:[<\n]|\Z)"  # as between tags
    return re.search(part, content) is not None


def unmarked(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message of a prompt, which has no loss whether it is marked or not."""
    return {key: value for key, value in message.items() if key != "train"}
