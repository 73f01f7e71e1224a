"""Which tags a model's responses get, and what its chat template is told: by probing, in order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sftkey.checks.mask_proof import Oracle, trained
from sftkey.checks.recipe import UNDECIDED
from sftkey.data.renderer import Renderer, probe_renderer
from sftkey.data.response import Example, Response, Segment
from sftkey.data.template import (
    TEMPLATE_ERRORS,
    probe_template,
    render,
    special_ids,
    special_pattern,
)
from sftkey.data.tokenization import Row, tokenize
from sftkey.errors import FrameError
from sftkey.recipe.schema import ResponseSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


THINK = ResponseSection(thinking=("<think>\n", "\n</think>"), answer=("\n\n", ""))
OPENED = ResponseSection(thinking=("", "\n</think>"), answer=("\n\n", ""))
CHANNELS = ResponseSection(
    thinking=("<|channel|>analysis<|message|>", "<|end|>"),
    answer=("<|start|>assistant<|channel|>final<|message|>", ""),
)
TAGS = ResponseSection()
# Thinkings and answers that end and begin as real ones do.
SEAMS = [("So 3 * 4 = 12", "12"), ("It is done.", "Yes."), ("x)", "\\frac{1}{2}"), ("", "B")]
DATE = "26 Jul 2024"  # what Llama 3's templates write where nobody gives a date


@dataclass(frozen=True)
class FrameChoice:
    """The frame of a model, and why it is this one.

    Args:
        section: The recipe's `response`.
        kwargs: The recipe's `model.chat_template_kwargs`.
        renderer: What was probed with them; None where none could be.
        why: Reasons by key: frame, thinking, answer, end, chat_template_kwargs.
        undecided: Values that the user must choose, by dotted key.
    """

    section: ResponseSection
    kwargs: dict[str, Any]
    renderer: Renderer | None
    why: dict[str, str] = field(default_factory=dict)
    undecided: dict[str, str] = field(default_factory=dict)


def choose_frame(tokenizer: PreTrainedTokenizerBase, stops: tuple[int, ...]) -> FrameChoice:
    """Choose frame and tags for a tokenizer.

    The template's own tags for thinking come first, since the model has learned them; then the
    default ones. Of the writings of a pair of tags the first is taken that no token straddles.

    Args:
        tokenizer: With its chat template, if it has one.
        stops: The published ids that stop generation.
    """
    if not tokenizer.chat_template:
        return _plain(tokenizer, stops, "the tokenizer has no chat template")
    template = str(tokenizer.chat_template)
    date, reason = _date(tokenizer, template)
    failed: FrameError | None = None
    for section, thinks, why in _candidates(template):
        kwargs = thinks | date
        try:
            renderer = probe_renderer(tokenizer, section, kwargs)
        except FrameError as error:
            failed = error
            continue
        section, renderer, seam = _clean(tokenizer, section, kwargs, renderer)
        turns = f"the chat template's turns, which end with {renderer.end_token}"
        if "strftime_now" in template and not date:
            turns += "; it writes today's date into prompts, and nothing fixes it"
        whys = {"frame": turns, "thinking": why, "answer": seam}
        said = [_thinks(thinks), reason]
        whys["chat_template_kwargs"] = "; ".join(part for part in said if part)
        return FrameChoice(section, kwargs, renderer, whys)
    assert failed is not None  # there is always a candidate
    if _is_borrowed(tokenizer, date):
        return _plain(tokenizer, stops, "the template's end of turn is no token of this tokenizer")
    problem = failed.problems[0].what
    undecided = {
        "model.chat_template": f"{UNDECIDED} a template of your own; the model's: {problem}"
    }
    return FrameChoice(TAGS, date, None, {"chat_template_kwargs": reason}, undecided)


def _candidates(template: str) -> Iterator[tuple[ResponseSection, dict[str, Any], str]]:
    """Return tags with what the template is told, the best first, and why."""
    switch = "enable_thinking" in template
    if "<|channel|>" in template:
        yield CHANNELS, {}, "the model's own channels"
    if "</think>" in template:
        for kwargs in ({}, {"enable_thinking": True})[: 1 + switch]:
            yield THINK, kwargs, "the model's own thinking tags"
            yield OPENED, kwargs, "the model's own; its prompt has opened the thinking already"
    for kwargs in ({"enable_thinking": False}, {})[1 - switch :]:
        yield TAGS, kwargs, "the model has no thinking tags of its own"


def _thinks(kwargs: Mapping[str, Any]) -> str:
    if not kwargs:
        return ""
    if kwargs["enable_thinking"]:
        return "thinking is on, or the prompt would end it at once"
    return "thinking is off: the tags are others"


def _date(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[dict[str, Any], str]:
    """Fix the date that a template writes, where it lets itself be told."""
    if "date_string" not in template:
        return {}, ""
    found = re.search(r"date_string = \"([^\"]+)\"", template)
    given = {"date_string": found[1] if found else DATE}
    try:
        read = given["date_string"] in render(tokenizer, [{"role": "user", "content": "Q"}], given)
    except TEMPLATE_ERRORS:  # the probe says it better
        read = False
    return (given, "a fixed date: the template writes today's otherwise") if read else ({}, "")


def _is_borrowed(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> bool:
    """Tell whether the template ends turns, but not with a token that this tokenizer has."""
    try:
        after = probe_template(tokenizer, Response.from_section(TAGS), kwargs).after
    except FrameError:
        return False
    return bool(after.strip()) and not special_pattern(special_ids(tokenizer)).search(after)


def _plain(tokenizer: PreTrainedTokenizerBase, stops: tuple[int, ...], why: str) -> FrameChoice:
    """Choose the plain frame, with the token that ends a text."""
    special = special_ids(tokenizer)
    published = [token for token, number in special.items() if number in stops]
    end = tokenizer.eos_token if tokenizer.eos_token in special else None
    end = end if end in published or not published else published[0]
    section = TAGS.model_copy(update={"frame": "plain", "end": end})
    whys = {"frame": why, "end": "the model's end of text"}
    if end is None:
        known = ", ".join(special) or "none"
        undecided = {"response.end": f"{UNDECIDED} the special token that ends a text; of {known}"}
        return FrameChoice(section, {}, None, whys, undecided)
    renderer = probe_renderer(tokenizer, section)
    section, renderer, seam = _clean(tokenizer, section, {}, renderer)
    whys |= {"thinking": "the model has no thinking tags of its own", "answer": seam}
    return FrameChoice(section, {}, renderer, whys)


def _clean(
    tokenizer: PreTrainedTokenizerBase,
    section: ResponseSection,
    kwargs: dict[str, Any],
    renderer: Renderer,
) -> tuple[ResponseSection, Renderer, str]:
    """Take the first writing of these tags that no token straddles; the text stays the same."""
    if _is_clean(renderer):
        return section, renderer, "no token straddles the end of the thinking"
    opening = section.answer[0]
    blank = opening[: len(opening) - len(opening.lstrip())]
    update = {
        "thinking": (section.thinking[0], section.thinking[1] + blank),
        "answer": (opening[len(blank) :], section.answer[1]),
    }
    other = section.model_copy(update=update)
    moved = probe_renderer(tokenizer, other, kwargs) if blank else renderer
    if blank and _is_clean(moved):
        why = "the line's end goes with the thinking: this tokenizer joins it to the tag before"
        return other, moved, why
    return section, renderer, "a token straddles the end of the thinking, and stays out of the key"


def _is_clean(renderer: Renderer) -> bool:
    """Tell whether the key always begins with a token of its own."""
    examples = [Example("Q", thinking, answer, n) for n, (thinking, answer) in enumerate(SEAMS)]
    oracle = Oracle(renderer)
    for example, row in zip(examples, tokenize(examples, renderer), strict=True):
        if not isinstance(row, Row):
            return False
        ids, key = row.input_ids, oracle.texts(example)[1]
        start = trained(row, "key")[0]
        prompt = row.segment_ids.count(Segment.PROMPT)
        whole, before = oracle.decode(ids[prompt:]), oracle.decode(ids[prompt:start])
        if whole[len(before) :] != oracle.normal(key):
            return False
    return True
