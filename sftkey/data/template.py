"""A tokenizer's chat template: what it reads, and what it writes around question and answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import chain
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension

from sftkey.bounds import SECONDS, Late, bounded
from sftkey.data.response import TOOLS, Response
from sftkey.errors import FrameError, Problem, did_you_mean, shown

if TYPE_CHECKING:
    from jinja2.parser import Parser
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]

QUESTION = "question4f1c"
SENTINEL = "sentinel9b27"
# What a template raises by itself, and what it trips over when it meets a message it doesn't know.
TEMPLATE_ERRORS: tuple[type[Exception], ...] = (
    *(TemplateError, ArithmeticError, LookupError, RuntimeError),  # it may call itself for ever
    *(AttributeError, TypeError, ValueError),
)
TAG = re.compile(r"(<[^<>\s]+>|\[[^\[\]\s]+\])")
# What people write for true and false where they mean no text.
TRUTHS = {**dict.fromkeys(("true", "yes", "on", "1"), True)}
TRUTHS |= dict.fromkeys(("false", "no", "off", "0"), False)
ASKED = "add_generation_prompt"
# A tool as any, whose text plays no part.
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
# Chats of the kinds that templates write otherwise, as their variables tell.
_ASKED = {"role": "user", "content": QUESTION}
_ANSWERED = {"role": "assistant", "content": SENTINEL, "reasoning_content": "So."}
CHATS: tuple[Messages, ...] = (
    (_ASKED,),
    ({"role": "system", "content": "Be brief."}, _ASKED),
    (_ASKED, _ANSWERED, _ASKED, _ANSWERED),
    ({"role": TOOLS, "content": json.dumps([TOOL])}, _ASKED),
)
OF_ROWS = ("messages", "tools")  # the variables that a row brings itself
TOOLS_FORM = "write each as {type: function, function: {name: …, description: …, parameters: …}}"
FUNCTIONS = frozenset({"raise_exception", "strftime_now"})


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name by which an error speaks of a tokenizer."""
    return tokenizer.name_or_path or "tokenizer"


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the special tokens by their texts."""
    added = tokenizer.added_tokens_decoder.items()
    special = {token.content: number for number, token in added if token.special}
    return special | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def special_pattern(special: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds special tokens in a text, the longest first."""
    tokens = sorted(special, key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in tokens) or r"(?!)")


@dataclass(frozen=True)
class Reads:
    """What a chat template reads, by its syntax tree."""

    variables: frozenset[str]  # the names that it looks up in what it is given
    names: frozenset[str]  # its constant texts, and the attributes that it asks for
    keys: frozenset[str]  # those by which it asks for a value: `m.x`, `m["x"]`, `m.get("x")`
    fixed_header: bool  # whether asking for an answer adds the same text to every chat


class _Generation(Extension):
    """`{% generation %}`, by which templates mark an assistant's text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def read_template(template: str) -> Reads:
    """Return what a template reads."""
    env = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    tree = env.parse(template)
    try:
        with bounded():  # jinja2 computes constants, in branches that are never taken, too
            variables = meta.find_undeclared_variables(tree) - set(env.globals)
    except Late:
        raise TemplateError(f"it takes more than {SECONDS:g} seconds to read") from None
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    asked = [node.arg for node in tree.find_all(nodes.Getitem)]
    for call in tree.find_all(nodes.Call):
        asked += call.args[:1] if getattr(call.node, "attr", None) == "get" else []
    keys = attributes | texts & {getattr(node, "value", None) for node in asked}
    fixed = _has_fixed_header(tree, variables - set(OF_ROWS))
    return Reads(frozenset(variables), frozenset(texts | attributes), frozenset(keys), fixed)


def _has_fixed_header(tree: nodes.Template, of_run: set[str]) -> bool:
    """Tell whether a template's end alone heeds `add_generation_prompt`, and nothing of the row.

    One that never asks for it, as Mistral's, writes the same either way. The variables `of_run`
    have one value in a whole run.
    """
    asked = [name for name in tree.find_all(nodes.Name) if name.name == ASKED]
    last = tree.body[-1] if tree.body else None
    if not asked or not isinstance(last, nodes.If):
        return not asked
    stored = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    names = list(last.find_all(nodes.Name))
    own = (of_run - stored) | FUNCTIONS | {ASKED}
    return len(asked) == sum(name.name == ASKED for name in names) and all(
        name.ctx == "load" and name.name in own for name in names
    )


def reads_of(tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> Reads:
    """Return what the template in use reads: of several named ones, tools may choose another."""
    return read_template(tokenizer.get_chat_template(tools=tools))


def strings(value: Any) -> Iterator[str]:
    """Return all texts in a value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in chain(value.keys(), value.values()) if isinstance(value, Mapping) else value:
            yield from strings(inner)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    kwargs: Mapping[str, Any],
    add_generation_prompt: bool = True,
) -> str:
    """Render messages with the tokenizer's own template."""
    given: dict[str, Any] = {**kwargs, "add_generation_prompt": add_generation_prompt}
    if messages and messages[0]["role"] == TOOLS:
        given["tools"] = json.loads(messages[0]["content"])
        messages = messages[1:]
    told = as_taken(tokenizer, messages, given)
    text = tokenizer.apply_chat_template(told, tokenize=False, **given)
    assert isinstance(text, str)  # tokenize=False, one conversation
    return text


def as_taken(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, given: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return messages with the arguments of their calls as the template takes them.

    DeepSeek's wants JSON text, and raises on a mapping; one that writes it as Python does wants
    that, too.
    """
    told, as_text = [dict(message) for message in messages], [dict(message) for message in messages]
    texts = {}  # by how Python writes the arguments
    for message in as_text:
        if "tool_calls" in message:
            message["tool_calls"] = calls = deepcopy(message["tool_calls"])
            for function in (call.get("function", call) for call in calls):
                if isinstance(arguments := function.get("arguments"), Mapping):
                    text = json.dumps(arguments, ensure_ascii=False)
                    texts[str(arguments)] = function["arguments"] = text
    written = _written(tokenizer, told, given) if texts else ""
    if written is None or any(
        python in written and json not in written for python, json in texts.items()
    ):
        return told if _written(tokenizer, as_text, given) is None else as_text
    return told


def _written(
    tokenizer: PreTrainedTokenizerBase, told: list[dict[str, Any]], given: Mapping[str, Any]
) -> str | None:
    """Render messages as they are; None where the template raises on them."""
    try:
        return str(tokenizer.apply_chat_template(told, tokenize=False, **given))
    except TEMPLATE_ERRORS:
        return None


class Probe(NamedTuple):
    """What a template writes around a question and its answer."""

    assistant_prefix: str  # between generation prompt and completion
    after: str  # behind the completion, to the end
    header: str  # the generation prompt: what asking for it adds
    tail: str  # what stands in its place where it isn't asked for, mostly nothing
    before_next: str  # behind the completion where another question follows


def probe_template(
    tokenizer: PreTrainedTokenizerBase, response: Response, kwargs: Mapping[str, Any]
) -> Probe:
    """Return what a template writes around the completion of a question.

    Raises:
        FrameError: There is no template, it never reads one of `kwargs`, or its training text
            doesn't go on where its generation prompt ends.
    """
    name = name_of(tokenizer)
    _check_there_is_one(tokenizer, kwargs)
    question = [{"role": "user", "content": QUESTION}]
    _check_kwargs(tokenizer, kwargs)
    try:
        closed = render(tokenizer, question, kwargs, add_generation_prompt=False)
        prompt = render(tokenizer, question, kwargs)
        turn = [*question, {"role": "assistant", "content": SENTINEL}]
        text = render(tokenizer, turn, kwargs, add_generation_prompt=False)
        more = render(tokenizer, [*turn, *question], kwargs, add_generation_prompt=False)
    except TEMPLATE_ERRORS as error:
        raise FrameError(
            name,
            f"the chat template raises on a question and its answer: {error}",
            hint="give another model.chat_template",
        ) from error
    _check_truths(tokenizer, kwargs, prompt)
    if QUESTION not in prompt or text.count(SENTINEL) != 1:
        raise FrameError(
            name,
            "the chat template doesn't write the user's and the assistant's text once each",
            hint="give another model.chat_template",
        )
    before, _, after = text.partition(SENTINEL)
    common = len(_common(closed, prompt))
    header, tail = prompt[common:], closed[common:]
    _check_header(name, header, response)
    assistant_prefix = _assistant_prefix(name, before, prompt, header, response)
    if closed == prompt and special_pattern(special_ids(tokenizer)).search(assistant_prefix):
        raise FrameError(
            name,
            "the chat template has no generation prompt: the model itself would write "
            f"{assistant_prefix!r}",
            hint="give a model.chat_template that heeds add_generation_prompt",
        )
    return Probe(assistant_prefix, after, header, tail, more.partition(SENTINEL)[2])


def _check_there_is_one(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> None:
    """Refuse a tokenizer without a chat template, or with several of which none is the usual."""
    name = name_of(tokenizer)
    if not tokenizer.chat_template:
        raise FrameError(
            name,
            "expected a chat template, the tokenizer has none",
            hint="a base model takes response.frame: plain; else give model.chat_template",
        )
    named: Any = tokenizer.chat_template
    if isinstance(named, dict) and named.keys().isdisjoint(
        ("default", "tool_use") if kwargs.get("tools") else ("default",)
    ):
        what = f"expected a chat template named default; got {', '.join(sorted(named))}"
        raise FrameError(name, what, "write the one to use into a file: model.chat_template")


def _check_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> None:
    """Refuse what a recipe hands to a template that never looks it up, or that is set for it."""
    name = name_of(tokenizer)
    try:
        reads = reads_of(tokenizer, kwargs.get("tools"))
    except TEMPLATE_ERRORS as error:
        raise FrameError(name, f"the chat template is no Jinja: {error}") from error
    own = {"messages", *signature(tokenizer.apply_chat_template).parameters}
    own -= {"tools", "documents", "kwargs"}
    known = sorted(reads.variables - own)
    special = special_pattern(special_ids(tokenizer))
    problems, hints = [], []
    for key, value in kwargs.items():
        what, hint = "", f"its variables are {', '.join(known) or 'none'}"
        if key not in known:
            never = "the chat template never reads it" + did_you_mean(key, known)
            what = "sftkey sets it for each row" if key in own else never
        elif key == "tools" and not _are_tools(value):
            what = f"expected a list of tools with their names; got {shown(value)}"
            hint = TOOLS_FORM
        elif not key.endswith("_token") and (found := special.search("\n".join(strings(value)))):
            what = f"it holds the text of the special token {found[0]!r}"
            hint = "write it otherwise: it would be a control token of every prompt"
        if what:
            problems.append(Problem(f"model.chat_template_kwargs.{key}", what))
            hints.append(hint)
    if problems:
        raise FrameError(name, problems, "; ".join(dict.fromkeys(hints)))


def _are_tools(value: Any) -> bool:
    """Tell whether a value is a list of descriptions that have names; an empty one is."""
    described = isinstance(value, list) and all(isinstance(each, Mapping) for each in value)
    inner = [each.get("function") or each for each in value] if described else [None]
    return all(isinstance(each, Mapping) and "name" in each for each in inner)


def _check_truths(
    tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], prompt: str
) -> None:
    """Refuse values that the template, which renders `prompt` with them, doesn't know.

    `"false"` and 0 are false to few; other words and numbers are true to many, or nothing at all.
    """
    names = reads_of(tokenizer, kwargs.get("tools")).names
    question = [{"role": "user", "content": QUESTION}]
    for key, value in kwargs.items():
        truth = None if isinstance(value, bool) else TRUTHS.get(str(value).lower())
        what, hint = "", "write true or false, without quotes"
        if value is None:
            what, hint = "expected a value; got null", "leave it out"
        elif isinstance(value, bool | list | dict) or value in names:
            continue
        elif truth is None:
            own = _prompts(tokenizer, kwargs)
            written = any(str(value) in text for text in own if text is not None)
            if own == _without(tokenizer, kwargs, key):
                if written or not isinstance(value, str):
                    continue  # it is the default, or noted
                near = did_you_mean(value, names)
                what = f"the chat template writes the same without it: it knows no {value!r}{near}"
                hint = "write a value that the template reads, or leave it out"
            elif own == _prompts(tokenizer, {**kwargs, key: True}):
                what = f"the chat template takes {value!r} for true, as any text"
        elif render(tokenizer, question, {**kwargs, key: truth}) != prompt:
            what = f"the chat template doesn't take {value!r} for {str(truth).lower()}"
            hint = f"write {str(truth).lower()}, without quotes"
        if what:
            where = f"model.chat_template_kwargs.{key}"
            raise FrameError(name_of(tokenizer), [Problem(where, what)], hint)


def _prompts(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> list[str | None]:
    """Return what a template writes of chats of several kinds; None where it raises."""
    found: list[str | None] = []
    for messages in CHATS:
        for asked in (True, False):
            try:
                found.append(render(tokenizer, messages, kwargs, asked))
            except TEMPLATE_ERRORS:
                found.append(None)
    return found


def _without(
    tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], key: str
) -> list[str | None]:
    return _prompts(tokenizer, {name: value for name, value in kwargs.items() if name != key})


def unused_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> list[str]:
    """Name what changes no chat of any kind, whether it says what it does or the contrary."""
    own = _prompts(tokenizer, kwargs) if kwargs else []
    return [
        key
        for key, value in kwargs.items()
        if key != "tools"
        and not isinstance(value, str)  # a word that isn't known is refused
        and own == _prompts(tokenizer, {**kwargs, key: not value})
        and own == _without(tokenizer, kwargs, key)
    ]


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


def _assistant_prefix(name: str, before: str, prompt: str, header: str, response: Response) -> str:
    """Return what stands between the prompt and the completion.

    What the template writes about thinking is left out where the response has tags of its own for
    it: Qwen3 sets an empty block beside every answer, and the native tags take its place.
    """
    opening, closing = response.thinking_open.strip(), response.thinking_close.strip()
    common = len(_common(before, prompt))
    inserted, opened = before[common:], prompt[common:]
    # gpt-oss: the tags before an answer write what the template would write there.
    tags = response.thinking_close + response.answer_open
    written_by_tag = inserted.strip() and inserted.strip() in tags
    if opened:
        if not opening and closing and (not inserted or written_by_tag or closing in inserted):
            return ""
        raise FrameError(
            name,
            "the generation prompt is no prefix of the training text: "
            f"one goes on with {opened!r}, the other with {inserted!r}",
            hint=_hint_for(header),
        )
    if closing and closing in inserted:
        return inserted.partition(opening)[0] if opening and opening in inserted else ""
    return "" if written_by_tag else inserted


def _common(one: str, other: str) -> str:
    """Return how two texts begin alike; `<think>` and `</think>` share nothing, as `[THINK]`s."""
    common = ""
    for part, another in zip(TAG.split(one), TAG.split(other), strict=False):
        if part != another:
            tags = TAG.fullmatch(part) or TAG.fullmatch(another)
            return common + ("" if tags else commonprefix([part, another]))  # noqa: RUF071
        common += part
    return common


def closing_of(prompt: str) -> str | None:
    """Return the closing tag of the thinking that a prompt opens with its last word, if any."""
    tag = re.search(r"([<\[])(\w+[>\]])\s*$", prompt)
    return f"\n{tag[1]}/{tag[2]}" if tag else None


def _hint_for(header: str) -> str:
    own, closing = "give a model.chat_template of your own", closing_of(header)
    if closing is None:
        return own
    return (
        f'the prompt opens the thinking: response.thinking: ["", {json.dumps(closing)}]; or {own}'
    )
