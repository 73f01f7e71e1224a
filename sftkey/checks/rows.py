"""What the gate reads off the rows as texts: those left out, and those that a template changes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sftkey.checks.findings import Finding, of_rows
from sftkey.data.refused import left_out
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example
from sftkey.data.splits import Splits
from sftkey.errors import FrameError
from sftkey.recipe.schema import DataSection

THINK_TAG = re.compile(r"[<\[]/?think(?:ing)?[>\]]", re.IGNORECASE)
SPLITS = ("train", "validation", "test")


def lenient(data: DataSection) -> DataSection:
    """Drop where the recipe says error, so that all that is wrong comes to light at once."""
    too_long = "drop" if data.too_long == "error" else data.too_long
    return data.model_copy(update={"unsplit_rows": "drop", "overlap": "drop", "too_long": too_long})


def dropped_findings(data: DataSection, dropped: Mapping[str, Any]) -> Iterator[Finding]:
    """Find the rows that are left out; they refuse the recipe if it doesn't allow it.

    Args:
        data: The recipe's section.
        dropped: By "split: reason", as `Prepared.counts` has them.
    """
    for each in left_out(data, dropped):
        message = f"{each.split}: {each.what}"
        yield Finding(each.code, each.rows, message, each.hint, each.hint is not None)


def empty_findings(rows: Mapping[str, Sequence[int]]) -> Iterator[Finding]:
    """Find the rows that are trained with an empty thinking, few enough to be let through."""
    for split, numbers in rows.items():
        hint = "data.empty_thinking: drop leaves these rows out"
        what = f"{split}: the thinking is empty"
        yield of_rows("empty-thinking", what, numbers, hint, refuses=False)


def frame_findings(renderer: Renderer) -> Iterator[Finding]:
    """Find thinking that the template writes itself, beside the response's own."""
    if not THINK_TAG.search(renderer.assistant_prefix):
        return
    opening = "<think>\n" if "<think>" in renderer.assistant_prefix else ""
    native = f"response.thinking: {json.dumps([opening, chr(10) + '</think>'])}"
    switch = "model.chat_template_kwargs: {enable_thinking: false}; or "
    knows = "enable_thinking" in str(renderer.tokenizer.chat_template)
    yield Finding(
        "template-inserts",
        (),
        f"the chat template inserts {renderer.assistant_prefix!r} before every answer, beside the "
        "response's own thinking",
        f"{switch if knows else ''}the template's own tags, {native}",
    )


def template_findings(splits: Splits, renderer: Renderer) -> tuple[list[Finding], Splits]:
    """Find messages that the template drops or rewrites, one prompt of each shape rendered.

    Returns:
        The findings, and the splits without the rows that can't be rendered at all.
    """
    findings: list[Finding] = []
    kept: dict[str, Any] = {}
    for split in SPLITS:
        examples, unusable = getattr(splits, split), set()
        for alike in _by_shape(examples):
            found, usable = _shape_findings(split, alike, renderer)
            findings += found
            unusable |= set() if usable else {id(example) for example in alike}
        kept[split] = [example for example in examples if id(example) not in unusable]
    return findings, replace(splits, **kept)


def _by_shape(examples: Sequence[Example]) -> list[list[Example]]:
    """Group examples by what a template can treat differently: roles, thinking in the messages."""
    shapes: dict[Any, list[Example]] = {}
    for example in examples:
        prompt, shape = example.prompt, None
        if not isinstance(prompt, str):
            shape = tuple(
                (each["role"], bool(THINK_TAG.search(each["content"])), "reasoning_content" in each)
                for each in prompt
            )
        shapes.setdefault(shape, []).append(example)
    return list(shapes.values())


def _shape_findings(
    split: str, examples: Sequence[Example], renderer: Renderer
) -> tuple[list[Finding], bool]:
    """Render the first of these examples; tell also whether such rows can be tokenized."""
    prompt, rows = examples[0].prompt, [example.index for example in examples]
    if isinstance(prompt, str):
        return [], True
    try:
        text = renderer.prompt_text(prompt)
    except FrameError as error:
        # Without a system message the tokenizer refuses row by row, and the rows are counted there.
        if renderer.kind == "chat" and all(message["role"] != "system" for message in prompt):
            return [], True
        what = f"{split}: {error.problems[0]}"
        return [of_rows("template", what, rows, error.hint or "")], False
    return list(_lost(split, prompt, rows, text)), True


def _lost(
    split: str, prompt: Sequence[Mapping[str, str]], rows: Sequence[int], text: str
) -> Iterator[Finding]:
    """Find the messages whose text isn't in the rendered prompt."""
    same = "inference gets the same prompt; give a model.chat_template that keeps it, if it counts"
    for message in prompt:
        role, content = message["role"], message["content"]
        thinking = message.get("reasoning_content", "").strip()
        if content.strip() not in text and not THINK_TAG.search(content):
            what = f"{split}: the chat template drops or rewrites the text of a {role} message"
            hint = "give a model.chat_template that keeps it, or leave these messages out"
            yield of_rows("template", what, rows, hint)
        elif content.strip() not in text or thinking not in text:
            what = f"{split}: the chat template drops the thinking of an earlier {role} message"
            yield of_rows("template-drops-thinking", what, rows, same, refuses=False)
