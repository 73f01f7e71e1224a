"""Messages are read in the forms that data sets write them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sftkey.data.messages import read_messages
from sftkey.data.values import RowError

PLAIN = ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "7"})
THOUGHT = (PLAIN[0], {**PLAIN[1], "reasoning_content": "c"})


def parts(*items: Any) -> list[dict[str, Any]]:
    """Make a conversation whose answer has these parts."""
    return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": list(items)}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (list(PLAIN), PLAIN),
        (json.dumps(PLAIN), PLAIN),
        (str(list(PLAIN)), PLAIN),
        ([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "7"}], PLAIN),
        ([{"role": "User", "content": "Q"}, {"role": "model", "content": "7"}], PLAIN),
        (parts({"type": "text", "text": "7"}), PLAIN),
        (parts("7"), PLAIN),
        (parts({"type": "thinking", "thinking": "c"}, {"type": "text", "text": "7"}), THOUGHT),
        (parts({"type": "reasoning", "text": "c"}, {"type": "text", "text": "7"}), THOUGHT),
        ([PLAIN[0], {**PLAIN[1], "thinking": "c"}], THOUGHT),
        ([PLAIN[0], {**PLAIN[1], "reasoning": "c", "reasoning_content": None}], THOUGHT),
        (
            [PLAIN[0], {**PLAIN[1], "reasoning_content": ""}],
            (PLAIN[0], {**PLAIN[1], "reasoning_content": ""}),
        ),
    ],
)
def test_forms_of_messages(value: Any, expected: tuple[dict[str, str], ...]) -> None:
    """Other keys, other roles, parts, JSON text: the same messages."""
    assert read_messages(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Q", "no list of messages"),
        (["Q"], "message 0 has no text as `role` and `content`"),
        ([{"role": "user", "content": None}], "message 0 has no text as `role` and `content`"),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{}]}],
            "message 0 calls a tool, which no template of ours writes",
        ),
        (
            parts({"type": "image_url"}),
            "message 1 holds a part of the type 'image_url', which is no text",
        ),
        (parts(7), "message 1 holds a part of the type 'unknown', which is no text"),
    ],
)
def test_what_is_no_message(value: Any, message: str) -> None:
    """The place of the first one is named."""
    with pytest.raises(RowError) as raised:
        read_messages(value)
    assert str(raised.value) == message
