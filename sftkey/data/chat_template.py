"""What a chat template writes around an assistant's text, read from two renderings of a stand-in.

The template never sees a real completion: it might rewrite it (Qwen3 and R1 take thinking out of
it) or set blocks of its own beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from sftkey.data.response import Response
from sftkey.errors import FrameError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]

QUESTION = "question4f1c"
SENTINEL = "sentinel9b27"
# What a template raises by itself, and what it trips over when it meets a message it doesn't know.
TEMPLATE_ERRORS = (TemplateError, AttributeError, KeyError, TypeError, ValueError)


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give the name by which an error speaks of a tokenizer."""
    return tokenizer.name_or_path or "tokenizer"


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Give the special tokens by their texts."""
    added = tokenizer.added_tokens_decoder.items()
    special = {token.content: number for number, token in added if token.special}
    return special | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def special_pattern(special: Mapping[str, int]) -> re.Pattern[str]:
    """Give a pattern that finds special tokens in a text, the longest first."""
    tokens = sorted(special, key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in tokens) or r"(?!)")


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    kwargs: Mapping[str, Any],
    add_generation_prompt: bool = True,
) -> str:
    """Render messages with the tokenizer's own template."""
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **kwargs,
    )
    assert isinstance(text, str)  # tokenize=False, one conversation
    return text


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, kwargs: Mapping[str, Any]
) -> str:
    """Render a prompt, and see that nothing of a system message was lost.

    Raises:
        FrameError: The template raises on these messages, or drops a system message.
    """
    hint = "write it into data.prompt, or choose another model.chat_template"
    name = name_of(tokenizer)
    try:
        text = render(tokenizer, messages, kwargs)
    except TEMPLATE_ERRORS as error:
        if _raises_on_system(tokenizer, messages, kwargs):
            what = f"the chat template raises on the system message: {error}"
            raise FrameError(name, what, hint) from error
        roles = ", ".join(message["role"] for message in messages)
        what = f"the chat template raises on a prompt of {roles}: {error}"
        raise FrameError(name, what) from error
    for message in messages:
        if message["role"] == "system" and message["content"].strip() not in text:
            raise FrameError(name, "the chat template drops the system message", hint)
    return text


def _raises_on_system(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, kwargs: Mapping[str, Any]
) -> bool:
    """Tell whether messages that can't be rendered can be without their system message."""
    others = [message for message in messages if message["role"] != "system"]
    if len(others) == len(messages):
        return False
    try:
        render(tokenizer, others, kwargs)
    except TEMPLATE_ERRORS:
        return False
    return True


def probe_template(
    tokenizer: PreTrainedTokenizerBase, response: Response, kwargs: Mapping[str, Any]
) -> tuple[str, str]:
    """Give the text between generation prompt and completion, and all the text after it.

    Raises:
        FrameError: There is no template, or its training text doesn't go on where its generation
            prompt ends.
    """
    name = name_of(tokenizer)
    if not tokenizer.chat_template:
        raise FrameError(
            name,
            "expected a chat template, the tokenizer has none",
            hint="a base model takes response.frame: plain; else give model.chat_template",
        )
    question = [{"role": "user", "content": QUESTION}]
    try:
        closed = render(tokenizer, question, kwargs, add_generation_prompt=False)
        prompt = render(tokenizer, question, kwargs)
        turn = [*question, {"role": "assistant", "content": SENTINEL}]
        text = render(tokenizer, turn, kwargs, add_generation_prompt=False)
    except TEMPLATE_ERRORS as error:
        raise FrameError(
            name,
            f"the chat template raises on a question and its answer: {error}",
            hint="give another model.chat_template",
        ) from error
    if QUESTION not in prompt or text.count(SENTINEL) != 1:
        raise FrameError(
            name,
            "the chat template doesn't write the user's and the assistant's text once each",
            hint="give another model.chat_template",
        )
    before, _, after = text.partition(SENTINEL)
    header = prompt[len(commonprefix([closed, prompt])) :]  # noqa: RUF071 (by character)
    _check_header(name, header, response)
    bridge = _bridge(name, before, prompt, header, response)
    if closed == prompt and special_pattern(special_ids(tokenizer)).search(bridge):
        raise FrameError(
            name,
            f"the chat template has no generation prompt: the model itself would write {bridge!r}",
            hint="give a model.chat_template that heeds add_generation_prompt",
        )
    return bridge, after


def _check_header(name: str, header: str, response: Response) -> None:
    """Refuse tags of the thinking that the generation prompt has written already."""
    opening, closing = response.thinking_open.strip(), response.thinking_close.strip()
    if closing and closing in header:
        raise FrameError(
            name,
            f"the generation prompt ends the thinking already: {header!r}",
            hint="model.chat_template_kwargs: {enable_thinking: true}, where the template knows it",
        )
    if opening and opening in header:
        raise FrameError(
            name,
            f"the generation prompt opens the thinking already: {header!r}",
            hint=f'response.thinking: ["", {json.dumps(response.thinking_close)}]',
        )


def _bridge(name: str, before: str, prompt: str, header: str, response: Response) -> str:
    """Give what stands between the prompt and the completion.

    What the template writes about thinking is left out where the response has tags of its own for
    it: Qwen3 sets an empty block beside every answer, and the native tags take its place.
    """
    opening, closing = response.thinking_open.strip(), response.thinking_close.strip()
    common = commonprefix([before, prompt])  # noqa: RUF071 (by character)
    inserted, opened = before[len(common) :], prompt[len(common) :]
    if opened:
        if not opening and closing and (not inserted or closing in inserted):
            return ""
        raise FrameError(
            name,
            "the generation prompt is no prefix of the training text: "
            f"one goes on with {opened!r}, the other with {inserted!r}",
            hint=_hint_for(header),
        )
    if closing and closing in inserted:
        return inserted.partition(opening)[0] if opening and opening in inserted else ""
    # gpt-oss: the native answer tag writes what the template would write before an answer.
    written_by_tag = inserted.strip() and inserted.strip() in response.answer_open
    return "" if written_by_tag else inserted


def _hint_for(header: str) -> str:
    own = "give a model.chat_template of your own"
    tag = re.search(r"<(\w+)>\s*$", header)
    if tag is None:
        return own
    return f'the prompt opens the thinking: response.thinking: ["", "\\n</{tag[1]}>"]; or {own}'
