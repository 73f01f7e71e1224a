"""What a prompt's messages say, and whether the chat template writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

from sftkey.data.messages import READ_HERE
from sftkey.data.response import TOOLS
from sftkey.data.template import (
    QUESTION,
    SENTINEL,
    TEMPLATE_ERRORS,
    Messages,
    Reads,
    name_of,
    reads_of,
    render,
    special_pattern,
)
from sftkey.errors import FrameError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_TAG = re.compile(r"[<\[]/?think(?:ing)?[>\]]", re.IGNORECASE)
# Read by every template, or said with a count where it isn't.
ALWAYS_READ = ("role", "content", "reasoning_content")
# They repeat what the call before says; most templates go by the order alone.
OF_TOOL_ANSWERS = ("name", "tool_call_id")
DROPS_SYSTEM = "the chat template drops the system message"
OF_CALLS = {"id", "index", "type", "function", "name", "arguments"}  # keys of any tool call
OWN_FLAGS = re.compile(r"/\w+")  # `/no_think` in a message
IN_EVERY_TOOL = ("*", "function", "parameters", "properties")  # keys that need no telling
QUESTION_ASKED = {"role": "user", "content": QUESTION}


def _tried(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, kwargs: Mapping[str, Any]
) -> str | None:
    """Render messages; None where the template raises on them."""
    try:
        return render(tokenizer, messages, kwargs)
    except TEMPLATE_ERRORS:
        return None


@dataclass(frozen=True)
class Habits:
    """A chat template, and what it does with all prompts alike: found out once."""

    tokenizer: PreTrainedTokenizerBase  # has the template
    kwargs: Mapping[str, Any]  # handed to it
    found: dict[str, bool] = field(default_factory=dict)  # by role: whether it is an assistant's
    # By the keys that lead to a part of a tool's description: whether it is written.
    written: dict[tuple[str, ...], bool] = field(default_factory=dict)
    unwritten: dict[str, list[str]] = field(default_factory=dict)  # by tools as JSON

    def reads(self, messages: Messages) -> Reads:
        """Return what the template in use reads: of several named ones, tools choose."""
        tools = messages[0]["role"] == TOOLS or self.kwargs.get("tools")
        return reads_of(self.tokenizer, tools or None)

    @cached_property
    def asked(self) -> str:
        """The prompt of a question alone."""
        return render(self.tokenizer, [QUESTION_ASKED], self.kwargs)

    @cached_property
    def around(self) -> str:
        """The text that is written around any question; it may hold a message's, too."""
        return self.asked.replace(QUESTION, "")

    def takes_for_answers(self, role: str) -> bool:
        """Tell whether a role's messages are written as an assistant's are."""
        if role not in self.found:
            before = [] if role == "system" else [QUESTION_ASKED]
            written = [
                _tried(
                    self.tokenizer,
                    [*before, {"role": each, "content": SENTINEL}, QUESTION_ASKED],
                    self.kwargs,
                )
                for each in (role, "assistant")
            ]
            self.found[role] = written[0] is not None and written[0] == written[1]
        return self.found[role]


def render_prompt(habits: Habits, messages: Messages) -> str:
    """Render a prompt, and see that nothing that its messages say was lost.

    The thinking of earlier turns may be: many templates mean to drop it.

    Raises:
        FrameError: The template raises on these messages, drops or rewrites the text of one, takes
            one for an answer, or never reads a key of theirs.
    """
    tokenizer, kwargs = habits.tokenizer, habits.kwargs
    name = name_of(tokenizer)
    tools, own = kwargs.get("tools"), messages[0]["role"] == TOOLS
    if tools and own and json.loads(messages[0]["content"]) != tools:
        what = "the row has `tools` beside those of model.chat_template_kwargs"
        raise FrameError(name, what, "leave one of them out")
    try:
        text = render(tokenizer, messages, kwargs)
    except TEMPLATE_ERRORS as error:
        raise _raised(habits, messages, error) from error
    reads = habits.reads(messages)
    for message in messages:
        lost = _lost(reads, message, text)
        if lost and lost.startswith(DROPS_SYSTEM):
            other = {**message, "content": SENTINEL}
            others = [other if each is message else each for each in messages]
            if _tried(tokenizer, others, kwargs) != text:
                lost = lost.replace("drops", "rewrites")
        if lost:
            raise FrameError(name, lost, _hint(message["role"]))
        role = message["role"]
        if role not in ("user", "assistant", TOOLS) and habits.takes_for_answers(role):
            what = f"the chat template writes a {role} message as an assistant's"
            raise FrameError(name, what, _hint(role))
    if own and _tried(tokenizer, messages[1:], kwargs) == text:
        what = "the chat template drops `tools` beside these messages"
        raise FrameError(name, what, _hint(TOOLS))
    if len(messages) - own > 1 and not _stand_in_order(messages[own:], text, habits.around):
        _check_each_is_read(habits, messages, text)
    for key, without in _less(messages, text):
        if _tried(tokenizer, without, kwargs) == text:
            near = did_you_mean(key, {*reads.keys, *READ_HERE} - {key})
            raise FrameError(
                name,
                f"the chat template never reads `{key}` of a message{near}",
                "leave it out, or give a model.chat_template that reads it",
            )
    return text


def check_tools(habits: Habits) -> None:
    """Refuse tools of the recipe that the template doesn't write as it would a row's.

    Raises:
        FrameError: Says what of them is dropped.
    """
    if tools := habits.kwargs.get("tools"):
        told = {"role": TOOLS, "content": json.dumps(tools, ensure_ascii=False)}
        others = {key: value for key, value in habits.kwargs.items() if key != "tools"}
        render_prompt(Habits(habits.tokenizer, others), (told, QUESTION_ASKED))


def unwritten_of_tools(habits: Habits, messages: Messages) -> list[str]:
    """Name what the template leaves out of its tools' descriptions, such as `enum`.

    Whatever is there is changed, once for all tools that have it: the prompt must change, too.
    """
    own = messages[0]["role"] == TOOLS
    tools = json.loads(messages[0]["content"]) if own else habits.kwargs.get("tools")
    if not tools:
        return []
    told = json.dumps(tools, ensure_ascii=False)
    if told not in habits.unwritten:
        others = {key: value for key, value in habits.kwargs.items() if key != "tools"}

        def prompt_of(tools: Any) -> str | None:
            message = {"role": TOOLS, "content": json.dumps(tools, ensure_ascii=False)}
            return _tried(habits.tokenizer, (message, QUESTION_ASKED), others)

        text, names = prompt_of(tools), []
        for path in _told(tools):
            name = tuple("*" if type(key) is int else str(key) for key in path)
            name = tuple(
                "*" if before == "properties" else key
                for before, key in zip(("", *name), name, strict=False)
            )
            if name not in habits.written:
                habits.written[name] = text is None or prompt_of(_with_another(tools, path)) != text
            if not habits.written[name]:
                inner = "properties.*." if name.count("properties") > 1 else ""
                names.append(inner + ".".join(key for key in name if key not in IN_EVERY_TOOL))
        habits.unwritten[told] = list(dict.fromkeys(names))
    return habits.unwritten[told]


def _told(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the keys that lead to each text and number in a value."""
    inner: Any = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, each in inner:
        if isinstance(each, Mapping | list):
            yield from _told(each, (*path, key))
        elif (key, each) not in (("type", "function"), ("type", "object")):
            yield (*path, key)


def _with_another(value: Any, path: Sequence[Any]) -> Any:
    """Return a value with something else at one place in it."""
    if not path:
        return f"{value}x" if isinstance(value, str) or value is None else not value
    copied = copy(value)
    copied[path[0]] = _with_another(value[path[0]], path[1:])
    return copied


def _raised(habits: Habits, messages: Messages, error: Exception) -> FrameError:
    """Say on which messages the template raises."""
    name, roles = name_of(habits.tokenizer), ", ".join(message["role"] for message in messages)
    others = [message for message in messages if message["role"] != "system"]
    alone = len(others) < len(messages)
    if alone and _tried(habits.tokenizer, others, habits.kwargs) is not None:
        what = f"the chat template raises on the system message: {error}"
        return FrameError(name, what, _hint("system"))
    if _takes_no_tools(habits.reads(messages), messages):
        what = f"the chat template takes no tools, and raises on a prompt of {roles}: {error}"
        return FrameError(name, what, _hint(TOOLS))
    return FrameError(name, f"the chat template raises on a prompt of {roles}: {error}")


def _stand_in_order(messages: Messages, text: str, around: str) -> bool:
    """Tell whether each message's text stands behind the one before: then none hides another."""
    place = 0
    for message in messages:
        content = message["content"].strip()
        place = text.find(content, place)
        if place < 0 or (content and content in around):
            return False
        place += len(content)
    return True


def _check_each_is_read(habits: Habits, messages: Messages, text: str) -> None:
    """Refuse a message whose text stands in the prompt only since another one holds it.

    One that says nothing, or asks by a flag for what the template does anyway, may be left out.
    """
    own, reads = messages[0]["role"] == TOOLS, habits.reads(messages)
    for place, message in enumerate(messages[own:], own):
        others = [*messages[:place], *messages[place + 1 :]]
        said = len(message) > 2 or "".join(_between_flags(reads, message["content"])).strip()
        if said and others and _tried(habits.tokenizer, others, habits.kwargs) == text:
            what = f"the chat template drops the {message['role']} message {place - own}"
            raise FrameError(name_of(habits.tokenizer), what, _hint(message["role"]))


def _hint(role: str) -> str:
    if role == "system":
        return "write it into data.prompt, or choose another model.chat_template"
    if role == TOOLS:
        return "leave tools and their calls out, or choose another model.chat_template"
    return "give a model.chat_template that keeps it, or leave these messages out"


def _takes_no_tools(reads: Reads, messages: Messages) -> bool:
    """Tell whether messages hold tools, of which the template in use never speaks, as Gemma's."""
    if not any(each["role"] in (TOOLS, "tool") or "tool_calls" in each for each in messages):
        return False
    return {"tools", "tool_calls", "tool"}.isdisjoint(reads.variables | reads.names)


def _lost(reads: Reads, message: Mapping[str, Any], text: str) -> str | None:
    """Say what of a message isn't in the rendered prompt, if anything isn't."""
    role, content = message["role"], message["content"]
    if role == TOOLS:
        tools = json.loads(content)
        if "tools" not in reads.variables:
            return "the chat template never reads `tools`"
        for what, said in chain.from_iterable(map(_said_of, tools)):
            if not _is_written(said, text):
                return f"the chat template drops `{what}` of `tools`"
        return None
    if role == "assistant" and THINK_TAG.search(content):
        content = THINK_TAG.split(content)[-1]
    if not _is_kept(reads, content, text):
        if role == "system":
            return DROPS_SYSTEM
        return f"the chat template drops or rewrites a message of the {role}"
    for call in message.get("tool_calls", ()):
        if call.get("function", call).get("name", "") not in text:
            return "the chat template drops `tool_calls` of a message"
    return None


def _said_of(tool: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names and the description that a tool has, with what each is."""
    function = tool.get("function") or tool
    yield "name", function.get("name", "")
    described = function.get("description")
    yield from (("description", line) for line in str(described or "").splitlines())
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    yield from (("parameters", name) for name in properties or ())


def _is_written(said: Any, text: str) -> bool:
    """Tell whether a value stands in a text, be it as JSON."""
    forms = [json.dumps(said, ensure_ascii=plain) for plain in (False, True)]
    forms += [said.strip(), *(form[1:-1] for form in forms)] if isinstance(said, str) else []
    return any(form in text for form in forms)


def _is_kept(reads: Reads, content: str, text: str) -> bool:
    """Tell whether a text was written: trimmed, as JSON, or without the template's own flags."""
    if content.strip() in text or json.dumps(content, ensure_ascii=False)[1:-1] in text:
        return True
    pieces = _between_flags(reads, content)
    return len(pieces) > 1 and all(piece.strip() in text for piece in pieces)


def _between_flags(reads: Reads, content: str) -> list[str]:
    """Split a text at the template's own flags."""
    flags = [name for name in reads.names if OWN_FLAGS.fullmatch(name)]
    return special_pattern(flags).split(content)


def _less(messages: Messages, text: str) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Yield messages less what a template may not read of them, with its name.

    That is a key of all messages of a role, and the arguments of a call, or the whole call beside
    others, of which the rendered text doesn't show all values.
    """
    found: dict[tuple[str, str], None] = {}
    for place, message in enumerate(messages):
        if len(message) == 2:
            continue
        known = ALWAYS_READ + (OF_TOOL_ANSWERS if message["role"] == "tool" else ())
        found |= dict.fromkeys((message["role"], key) for key in message if key not in known)
        calls = message.get("tool_calls", [])
        for number, call in enumerate(calls):
            for key in {*call, *call.get("function", ())} - OF_CALLS:
                less = {**message, "tool_calls": [_without_key(each, key) for each in calls]}
                yield key, [*messages[:place], less, *messages[place + 1 :]]
            function = call.get("function", call)
            arguments = function.get("arguments")
            values = arguments.values() if isinstance(arguments, Mapping) else [arguments]
            if not all(_is_written(value, text) for value in values if value):
                empty = {**function, "arguments": {}}
                put = [{**call, "function": empty} if "function" in call else empty]
                for changed in (put, []) if len(calls) > 1 else (put,):
                    others = [*calls[:number], *changed, *calls[number + 1 :]]
                    less = {**message, "tool_calls": others}
                    yield "tool_calls", [*messages[:place], less, *messages[place + 1 :]]
    for role, key in found:
        yield (
            key,
            [
                {k: v for k, v in message.items() if k != key or message["role"] != role}
                for message in messages
            ],
        )


def _without_key(call: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a tool call without a key, be it of the function that it calls."""
    less = {name: value for name, value in call.items() if name != key}
    if "function" in less:
        less["function"] = {k: v for k, v in call["function"].items() if k != key}
    return less


def num_dropped_thinkings(messages: Messages, text: str) -> int:
    """Count the earlier turns whose thinking isn't in the rendered prompt."""
    return sum(
        message.get("reasoning_content", "").strip() not in text
        or (bool(THINK_TAG.search(message["content"])) and message["content"].strip() not in text)
        for message in messages
        if message["role"] == "assistant"
    )
