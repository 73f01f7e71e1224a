"""Messages of a conversation, in the forms that data sets write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sftkey.data.values import RowError, parsed_json

# What data sets and APIs call the roles.
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
REASONING = ("reasoning_content", "thinking", "reasoning")


def read_messages(value: Any) -> tuple[dict[str, str], ...]:
    """Read a list of messages: of each the role, the content and the reasoning beside it.

    ShareGPT writes `from` and `value` for `role` and `content`; content may be a list of parts; and
    the list may be JSON text.
    """
    value = parsed_json(value)
    if not isinstance(value, list):
        raise RowError("no list of messages")
    return tuple(_message(message, place) for place, message in enumerate(value))


def _message(message: Any, place: int) -> dict[str, str]:
    message = message if isinstance(message, dict) else {}
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    texts = {key: message[key] for key in REASONING if isinstance(message.get(key), str)}
    thinking = next((text for text in texts.values() if text.strip()), None)
    if isinstance(content, list):
        inside, content = _from_parts(content, place)
        thinking = thinking or inside
    if message.get("tool_calls"):
        raise RowError(f"message {place} calls a tool, which no template of ours writes")
    if not isinstance(role, str) or not isinstance(content, str):
        raise RowError(f"message {place} has no text as `role` and `content`")
    read = {"role": ROLES.get(role.lower(), role.lower()), "content": content}
    if thinking is None and texts:
        thinking = next(iter(texts.values()))
    return read if thinking is None else {**read, "reasoning_content": thinking}


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
