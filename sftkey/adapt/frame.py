"""Which tags a model's responses get, and what its chat template is told: by probing, in order."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from sftkey.adapt.data import DataChoice, choose_data, choose_grader, measure
from sftkey.checks.mask_proof import Oracle, trained
from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Response, Segment
from sftkey.data.sources import load_examples
from sftkey.data.template import (
    QUESTION,
    SENTINEL,
    TEMPLATE_ERRORS,
    closing_of,
    probe_template,
    render,
    special_ids,
    special_pattern,
)
from sftkey.data.tokenization import Row, fit, tokenize
from sftkey.errors import FrameError, Problem, RecipeError
from sftkey.models.facts import ModelFacts, read_facts
from sftkey.recipe.rules import UNDECIDED
from sftkey.recipe.schema import DataSection, ModelSection, ResponseSection

THINK = ResponseSection(thinking=("<think>\n", "\n</think>"), answer=("\n\n", ""))
OPENED = ResponseSection(thinking=("", "\n</think>"), answer=("\n\n", ""))
CHANNELS = ResponseSection(
    thinking=("<|channel|>analysis<|message|>", "<|end|>"),
    answer=("<|start|>assistant<|channel|>final<|message|>", ""),
)
TAGS = ResponseSection()
# Thinkings and answers that end and begin as real ones do.
SEAMS = [("So 3 * 4 = 12", "12"), ("It is done.", "Yes."), ("x)", "\\frac{1}{2}"), ("", "B")]
THINKS: dict[bool | None, str] = {  # by the template's `enable_thinking`
    True: "thinking is on, or the prompt would end it at once",
    False: "thinking is off: the tags are others",
}
DATE = "26 Jul 2024"  # what Llama 3's templates write where nobody gives a date


@dataclass(frozen=True)
class FrameChoice:
    """The frame of a model, and why it is this one."""

    section: ResponseSection  # the recipe's `response`
    kwargs: dict[str, Any]  # the recipe's `model.chat_template_kwargs`
    renderer: Renderer | None  # what was probed with them; None where none could be
    # Reasons by key: frame, thinking, answer, end, chat_template_kwargs.
    why: dict[str, str] = field(default_factory=dict)
    # Values that the user must choose, by dotted key.
    undecided: dict[str, str] = field(default_factory=dict)


def choose_frame(tokenizer: PreTrainedTokenizerBase, stops: tuple[int, ...]) -> FrameChoice:
    """Choose frame and tags for a tokenizer.

    The template's own tags for thinking come first, since the model has learned them; then the
    default ones. Of the writings of a pair of tags the first is taken that no token straddles.
    `stops` are the published ids that stop generation.
    """
    if not tokenizer.chat_template:
        return _plain(tokenizer, stops, "the tokenizer has no chat template")
    # Of several named ones the one in use, without its comments.
    template = re.sub(r"\{#.*?#\}", "", tokenizer.get_chat_template(), flags=re.DOTALL)
    date, reason = _date(tokenizer, template)
    failed: FrameError | None = None
    for section, thinks, why in _candidates(tokenizer, template):
        kwargs = thinks | date
        try:
            section, renderer, seam = _clean(tokenizer, section, kwargs)
        except FrameError as error:
            failed = error
            continue
        turns = f"the chat template's turns, which end with {renderer.end_token}"
        if "strftime_now" in template and not date:
            turns += "; it writes today's date into prompts, and nothing fixes it"
        whys = {"frame": turns, "thinking": why, "answer": seam}
        said = [THINKS.get(thinks.get("enable_thinking"), ""), reason]
        whys["chat_template_kwargs"] = "; ".join(filter(None, said))
        return FrameChoice(section, kwargs, renderer, whys)
    assert failed is not None  # there is always a candidate
    if _is_borrowed(tokenizer, date):
        return _plain(tokenizer, stops, "the template's end of turn is no token of this tokenizer")
    problem = failed.problems[0].what
    undecided = {
        "model.chat_template": f"{UNDECIDED} a template of your own; the model's: {problem}"
    }
    return FrameChoice(TAGS, date, None, {"chat_template_kwargs": reason}, undecided)


def _candidates(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> Iterator[tuple[ResponseSection, dict[str, Any], str]]:
    """Return tags with what the template is told, the best first, and why."""
    switch = "enable_thinking" in template
    if "<|channel|>" in template:
        yield CHANNELS, {}, "the model's own channels"
    if "</think>" in template:
        for kwargs in ({}, {"enable_thinking": True})[: 1 + switch]:
            yield THINK, kwargs, "the model's own thinking tags"
            yield OPENED, kwargs, "the model's own; its prompt has opened the thinking already"
    elif written := _written_tags(tokenizer):
        yield written, {}, "the model's own thinking tags"
    for kwargs in ({"enable_thinking": False}, {})[1 - switch :]:
        yield TAGS, kwargs, "the model has no thinking tags of its own"
    if closing := _opened_tag(tokenizer):
        opened = OPENED.model_copy(update={"thinking": ("", closing)})
        yield opened, {}, "the model's own; its prompt has opened the thinking already"


def _written_tags(tokenizer: PreTrainedTokenizerBase) -> ResponseSection | None:
    """Return the tags that the template itself writes around a turn's reasoning, if it does."""
    question = [{"role": "user", "content": "Q"}]
    turn = {"role": "assistant", "content": SENTINEL, "reasoning_content": QUESTION}
    try:
        prompt = render(tokenizer, question, {})
        text = render(tokenizer, [*question, turn], {}, add_generation_prompt=False)
    except TEMPLATE_ERRORS:
        return None
    opening, found, rest = text.removeprefix(prompt).partition(QUESTION)
    between, answer, _ = rest.partition(SENTINEL)
    closing = between.rstrip()
    if not (text.startswith(prompt) and found and answer and opening.strip() and closing.strip()):
        return None
    return ResponseSection(thinking=(opening, closing), answer=(between[len(closing) :], ""))


def _opened_tag(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return what closes the thinking that the prompt opens with a tag of any name, if it does."""
    with suppress(*TEMPLATE_ERRORS):
        return closing_of(render(tokenizer, [{"role": "user", "content": "Q"}], {}))
    return None


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
    section, renderer, seam = _clean(tokenizer, section, {})
    whys |= {"thinking": "the model has no thinking tags of its own", "answer": seam}
    return FrameChoice(section, {}, renderer, whys)


def _clean(
    tokenizer: PreTrainedTokenizerBase, section: ResponseSection, kwargs: dict[str, Any]
) -> tuple[ResponseSection, Renderer, str]:
    """Probe these tags in the first writing that no token straddles; the text stays the same."""
    renderer = Renderer.read(tokenizer, section, kwargs)
    if _is_clean(renderer):
        return section, renderer, "no token straddles the end of the thinking"
    opening = section.answer[0]
    blank = opening[: len(opening) - len(opening.lstrip())]
    update = {
        "thinking": (section.thinking[0], section.thinking[1] + blank),
        "answer": (opening[len(blank) :], section.answer[1]),
    }
    other = section.model_copy(update=update)
    moved = Renderer.read(tokenizer, other, kwargs) if blank else renderer
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


@dataclass(frozen=True)
class Foreign:
    """Somebody's model, and the rows that it is asked."""

    section: ModelSection  # the model, as it is: not quantized by us
    renderer: Renderer  # what stands around its responses
    examples: list[Example]  # those of the rows
    rows: list[Row]  # their tokens
    grader: str  # that fits the answers
    max_new_tokens: int  # that a response may have
    chosen: tuple[str, ...]  # lines that say what was chosen


def read_foreign(name_or_path: str, source: str, seed: int) -> Foreign:
    """Choose frame, tags, columns and grader for a model and rows, as `adapt` does.

    All rows are taken, of a validation split if there is one.

    Raises:
        SFTKeyError: The model or the rows can't be read, or something must be decided first.
    """
    facts = read_facts(name_or_path)
    choice = choose_frame(facts.tokenizer, facts.published_stops)
    data = choose_data(source, seed, choice.section.frame == "plain")
    open_choices = choice.undecided | {f"data.{key}": data.fields[key] for key in data.undecided}
    if open_choices or choice.renderer is None:
        what = [
            Problem(key, f"to be decided: {value.removeprefix(UNDECIDED).strip()}")
            for key, value in open_choices.items()
        ]
        ask = f"`sftkey adapt {name_or_path} --data {source} -o my.yaml` writes a recipe"
        raise RecipeError(name_or_path, what, f"{ask}: decide there, then diagnose my.yaml")
    renderer = _with_tags_of(data, choice, choice.renderer, facts)
    examples = data.examples
    if data.fields.get("validation") == "validation":
        examples = load_examples(DataSection(**data.fields), seed, "validation").examples
    lengths = measure(examples, renderer, facts.skeleton.most_tokens)
    fitted = fit(tokenize(examples, renderer), examples, renderer, lengths.max_length, False)
    pairs = [(e, row) for e, row in zip(examples, fitted, strict=True) if isinstance(row, Row)]
    grader, why = choose_grader(examples)
    return Foreign(
        facts.section.model_copy(
            update={"quantization": "none", "attn_implementation": facts.skeleton.attention}
        ),
        renderer,
        [example for example, _ in pairs],
        [row for _, row in pairs],
        grader,
        lengths.max_new_tokens,
        (*_said(renderer, data), f"grader {grader}: {why}"),
    )


def _said(renderer: Renderer, data: DataChoice) -> Iterator[str]:
    """Say which frame, tags and columns were chosen."""
    tags = " ".join(repr(tag) for tag in vars(renderer.response).values())
    yield f"frame {renderer.kind}; tags {tags}"
    read = ("prompt", "thinking", "answer", "split_rule")
    columns = [f"{key} {data.fields[key]!r}" for key in read if key in data.fields]
    yield ", ".join(columns) or "built-in columns"


def _with_tags_of(
    data: DataChoice, choice: FrameChoice, renderer: Renderer, facts: ModelFacts
) -> Renderer:
    """Take the rows' own tags where the template has none: the model was trained on such rows."""
    if data.fields.get("split_rule") != "think_tags" or choice.section.thinking != TAGS.thinking:
        return renderer
    kept = {"frame": choice.section.frame, "end": choice.section.end}
    return Renderer.read(facts.tokenizer, THINK.model_copy(update=kept), choice.kwargs)
