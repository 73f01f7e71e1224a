"""Messages of a conversation, in the forms that data sets write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sftkey.data.values import RowError, parsed_json

# What data sets and APIs call the roles.
ROLES = {
    **{"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"},
    **{"observation": "tool", "function": "tool"},
}
REASONING = ("reasoning_content", "thinking", "reasoning")
# Whether a message is trained, in the words of several trainers.
FLAGS = ("train", "trainable", "weight", "loss_mask")
READ_HERE = ("role", "from", "content", "value", "tool_calls", *REASONING, *FLAGS)


def read_messages(value: Any) -> tuple[dict[str, Any], ...]:
    """Read a list of messages: of each the role, the content and the reasoning beside it.

    ShareGPT writes `from` and `value` for `role` and `content`; content may be a list of parts; and
    the list may be JSON text. A message that isn't to be trained has `train: False`. What else it
    says is handed to the chat template as it is.

    Raises:
        RowError: A message can't be read, or asks for a loss that it can't have.
    """
    value = parsed_json(value)
    if not isinstance(value, list):
        raise RowError("no list of messages")
    return tuple(_message(message, place) for place, message in enumerate(value))


def _message(message: Any, place: int) -> dict[str, Any]:
    message = message if isinstance(message, dict) else {}
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    calls = _calls(message.get("tool_calls"), place)
    if content is None and calls:
        content = ""
    texts = {key: message[key] for key in REASONING if isinstance(message.get(key), str)}
    thinking = next((text for text in texts.values() if text.strip()), None)
    if isinstance(content, list):
        inside, content = _from_parts(content, place)
        thinking = thinking or inside
    if not isinstance(role, str) or not isinstance(content, str):
        raise RowError(f"message {place} has no text as `role` and `content`")
    read: dict[str, Any] = {"role": ROLES.get(role.lower(), role.lower()), "content": content}
    if thinking is None and texts:
        thinking = next(iter(texts.values()))
    if thinking is not None:
        read["reasoning_content"] = thinking
    if calls:
        read["tool_calls"] = calls
    if not _is_trained(message, read["role"], place):
        read["train"] = False
    return read | dict(_further(message))


def _is_trained(message: Mapping[str, Any], role: str, place: int) -> bool:
    """Tell whether a message may have a loss, as far as it says so itself."""
    trained = True
    for key in FLAGS:
        value = message.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise RowError(
                f"message {place}: `{key}` is {value!r}, expected true or false; weights are "
                "`loss_on` of a stage"
            )
        if value and role != "assistant":
            raise RowError(f"message {place}: `{key}` asks for a loss on a message of the {role}")
        trained = trained and bool(value)
    return trained


def _further(message: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what a message says beside what is read here; null and empty values say nothing.

    False does: it may be somebody's word for a turn that isn't to be trained.
    """
    for key, value in message.items():
        if key not in READ_HERE and value is not None and value not in ("", [], {}):
            yield key, value


def _calls(value: Any, place: int) -> list[dict[str, Any]]:
    """Read the tool calls of a message; templates want their arguments as a mapping."""
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise RowError(f"message {place}: `tool_calls` is no list of calls")
    calls = []
    for each in value:
        call = dict(each.get("function") or each)
        if not isinstance(call.get("name"), str):
            raise RowError(f"message {place}: a tool call has no `name`")
        call["arguments"] = parsed_json(call.get("arguments") or {})
        calls.append({**each, "function": call} if "function" in each else call)
    return calls


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Read a row's tools: a list of descriptions, or JSON of such; words are something else.

    Raises:
        RowError: A description has no name.
    """
    tools = parsed_json(value)
    if not isinstance(tools, list) or not all(isinstance(each, dict) for each in tools):
        return []
    if not all("name" in (each.get("function") or each) for each in tools):
        raise RowError("`tools` holds the description of a tool without a `name`")
    return tools


def _from_parts(parts: Sequence[Any], place: int) -> tuple[str | None, str]:
    """Join the parts of a message: those of reasoning, and those of text."""
    found: dict[str, list[str]] = {"text": [], "thinking": []}
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "unknown"
        kind = "thinking" if kind == "reasoning" else kind
        text = part.get(kind, part.get("text")) if kind in found else None
        if not isinstance(text, str):
            raise RowError(f"message {place} holds a part of the type {kind!r}, which is no text")
        found[kind].append(text)
    return "".join(found["thinking"]) or None, "".join(found["text"])


def check_trained(turn: Mapping[str, Any]) -> None:
    """See that a turn can be trained, and that all that it says is.

    Raises:
        RowError: It isn't to be trained, is a tool call, or says what nothing reads.
    """
    if turn.get("train") is False:
        raise RowError("a turn that isn't to be trained", "not-trained")
    if "tool_calls" in turn:
        raise RowError("a turn that calls a tool, and answers nothing yet", "not-trained")
    read = ("role", "content", "reasoning_content", "name")
    if further := [key for key in turn if key not in read]:
        raise RowError(f"`{further[0]}` of a trained turn, which nothing reads; leave it out")


def unmarked(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message of a prompt, which has no loss whether it is marked or not."""
    return {key: value for key, value in message.items() if key != "train"}
