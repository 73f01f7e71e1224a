"""A tokenizer's chat template: what it reads, what it writes, and what a row loses in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension

from sftkey.data.response import TOOLS, Response
from sftkey.errors import FrameError, Problem, did_you_mean

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
THINK_TAG = re.compile(r"[<\[]/?think(?:ing)?[>\]]", re.IGNORECASE)
TAG = re.compile(r"(<[^<>\s]+>|\[[^\[\]\s]+\])")
# Read by every template, or said with a count where it isn't.
ALWAYS_READ = ("role", "content", "reasoning_content")
# They repeat what the call before says; most templates go by the order alone.
OF_TOOL_ANSWERS = ("name", "tool_call_id")
OWN_FLAGS = re.compile(r"/\w+")  # `/no_think` in a message
ASKED = "add_generation_prompt"
OF_ROWS = ("messages", "tools")  # the variables that a row brings itself
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
    fixed_header: bool  # whether asking for an answer adds the same text to every chat


class _Generation(Extension):
    """`{% generation %}`, by which templates mark an assistant's text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def read_template(template: str) -> Reads:
    """Return what a template reads.

    Raises:
        TemplateError: It is no Jinja.
    """
    env = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    tree = env.parse(template)
    variables = meta.find_undeclared_variables(tree) - set(env.globals)
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    fixed = _has_fixed_header(tree, variables - set(OF_ROWS))
    return Reads(frozenset(variables), frozenset(texts | attributes), fixed)


def _has_fixed_header(tree: nodes.Template, of_run: set[str]) -> bool:
    """Tell whether a template's end alone heeds `add_generation_prompt`, and nothing of the row.

    The variables `of_run` have one value in a whole run.
    """
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, nodes.If):
        return False
    stored = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    asked = [name for name in tree.find_all(nodes.Name) if name.name == ASKED]
    names = list(last.find_all(nodes.Name))
    own = (of_run - stored) | FUNCTIONS | {ASKED}
    return len(asked) == sum(name.name == ASKED for name in names) > 0 and all(
        name.ctx == "load" and name.name in own for name in names
    )


def reads_of(tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> Reads:
    """Return what the template in use reads: of several named ones, tools may choose another."""
    return read_template(tokenizer.get_chat_template(tools=tools))


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    kwargs: Mapping[str, Any],
    add_generation_prompt: bool = True,
) -> str:
    """Render messages with the tokenizer's own template."""
    given = dict(kwargs)
    if messages and messages[0]["role"] == TOOLS:
        given["tools"] = json.loads(messages[0]["content"])
        messages = messages[1:]
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **given,
    )
    assert isinstance(text, str)  # tokenize=False, one conversation
    return text


def _tried(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, kwargs: Mapping[str, Any]
) -> str | None:
    """Render messages; None where the template raises on them."""
    try:
        return render(tokenizer, messages, kwargs)
    except TEMPLATE_ERRORS:
        return None


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, kwargs: Mapping[str, Any]
) -> str:
    """Render a prompt, and see that nothing that its messages say was lost.

    The thinking of earlier turns may be: many templates mean to drop it.

    Raises:
        FrameError: The template raises on these messages, drops or rewrites the text of one, or
            never reads a key of theirs.
    """
    name = name_of(tokenizer)
    try:
        text = render(tokenizer, messages, kwargs)
    except TEMPLATE_ERRORS as error:
        others = [message for message in messages if message["role"] != "system"]
        if len(others) < len(messages) and _tried(tokenizer, others, kwargs) is not None:
            what = f"the chat template raises on the system message: {error}"
            raise FrameError(name, what, _hint("system")) from error
        roles = ", ".join(message["role"] for message in messages)
        if _takes_no_tools(tokenizer, messages):
            what = f"the chat template takes no tools, and raises on a prompt of {roles}: {error}"
            raise FrameError(name, what, _hint(TOOLS)) from error
        what = f"the chat template raises on a prompt of {roles}: {error}"
        raise FrameError(name, what) from error
    for message in messages:
        lost = _lost(tokenizer, message, text)
        if lost:
            raise FrameError(name, lost, _hint(message["role"]))
    if len(messages) > 1 and not _stand_in_order(messages, text):
        _check_each_is_read(tokenizer, messages, kwargs, text)
    for key in _further_keys(messages):
        names = reads_of(tokenizer).names
        without = [{k: v for k, v in message.items() if k != key} for message in messages]
        if key not in names or _tried(tokenizer, without, kwargs) == text:
            near = did_you_mean(key, [name for name in names if name.isidentifier()])
            what = f"the chat template never reads `{key}` of a message{near}"
            raise FrameError(
                name, what, "leave it out, or give a model.chat_template that reads it"
            )
    return text


def _stand_in_order(messages: Messages, text: str) -> bool:
    """Tell whether each message's text stands behind the one before: then none hides another."""
    place = 0
    for message in messages:
        content = message["content"].strip()
        place = text.find(content, place)
        if place < 0:
            return False
        place += len(content)
    return True


def _check_each_is_read(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, kwargs: Mapping[str, Any], text: str
) -> None:
    """Refuse a message whose text stands in the prompt only since another one holds it."""
    for place, message in enumerate(messages):
        others = [*messages[:place], *messages[place + 1 :]]
        if others and _tried(tokenizer, others, kwargs) == text:
            what = f"the chat template drops the {message['role']} message {place}"
            raise FrameError(name_of(tokenizer), what, _hint(message["role"]))


def _hint(role: str) -> str:
    if role == "system":
        return "write it into data.prompt, or choose another model.chat_template"
    if role == TOOLS:
        return "leave tools and their calls out, or choose another model.chat_template"
    return "give a model.chat_template that keeps it, or leave these messages out"


def _takes_no_tools(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> bool:
    """Tell whether messages hold tools, of which the template in use never speaks, as Gemma's."""
    if not any(each["role"] in (TOOLS, "tool") or "tool_calls" in each for each in messages):
        return False
    reads = reads_of(tokenizer, messages[0]["role"] == TOOLS or None)
    return {"tools", "tool_calls", "tool"}.isdisjoint(reads.variables | reads.names)


def _lost(tokenizer: PreTrainedTokenizerBase, message: Mapping[str, Any], text: str) -> str | None:
    """Say what of a message isn't in the rendered prompt, if anything isn't."""
    role, content = message["role"], message["content"]
    if role == TOOLS:
        tools = json.loads(content)
        if "tools" not in reads_of(tokenizer, tools).variables:
            return "the chat template never reads `tools`"
        names = [tool.get("function", tool).get("name", "") for tool in tools]
        return None if all(name in text for name in names) else "the chat template drops `tools`"
    if role == "assistant" and THINK_TAG.search(content):
        content = THINK_TAG.split(content)[-1]
    if not _is_kept(tokenizer, content, text):
        if role == "system":
            return "the chat template drops the system message"
        return f"the chat template drops or rewrites the text of a {role} message"
    for call in message.get("tool_calls", ()):
        if call.get("function", call).get("name", "") not in text:
            return "the chat template drops `tool_calls` of a message"
    return None


def _is_kept(tokenizer: PreTrainedTokenizerBase, content: str, text: str) -> bool:
    """Tell whether a text was written: trimmed, as JSON, or without the template's own flags."""
    if content.strip() in text or json.dumps(content, ensure_ascii=False)[1:-1] in text:
        return True
    flags = [name for name in reads_of(tokenizer).names if OWN_FLAGS.fullmatch(name)]
    pieces = special_pattern(flags).split(content)
    return len(pieces) > 1 and all(piece.strip() in text for piece in pieces)


def _further_keys(messages: Messages) -> list[str]:
    """Return the keys of messages that a template may not read, each once."""
    found: dict[str, None] = {}
    for message in messages:
        if len(message) > 2:
            known = ALWAYS_READ + (OF_TOOL_ANSWERS if message["role"] == "tool" else ())
            found |= dict.fromkeys(key for key in message if key not in known)
    return list(found)


def num_dropped_thinkings(messages: Messages, text: str) -> int:
    """Count the earlier turns whose thinking isn't in the rendered prompt."""
    return sum(
        message.get("reasoning_content", "").strip() not in text
        or (bool(THINK_TAG.search(message["content"])) and message["content"].strip() not in text)
        for message in messages
        if message["role"] == "assistant"
    )


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
    if not tokenizer.chat_template:
        raise FrameError(
            name,
            "expected a chat template, the tokenizer has none",
            hint="a base model takes response.frame: plain; else give model.chat_template",
        )
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
    if QUESTION not in prompt or text.count(SENTINEL) != 1:
        raise FrameError(
            name,
            "the chat template doesn't write the user's and the assistant's text once each",
            hint="give another model.chat_template",
        )
    before, _, after = text.partition(SENTINEL)
    common = len(commonprefix([closed, prompt]))  # noqa: RUF071 (by character)
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
    never = "the chat template never reads it"
    problems = [
        Problem(
            f"model.chat_template_kwargs.{key}",
            "sftkey sets it for each row" if key in own else never + did_you_mean(key, known),
        )
        for key in kwargs
        if key not in known
    ]
    if problems:
        hint = f"its variables are {', '.join(known) or 'none'}"
        raise FrameError(name, problems, hint)


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


def _common(one: str, other: str) -> str:
    """Return how two texts begin alike; `<think>` and `</think>` share nothing, as `[THINK]`s."""
    common = ""
    for part, another in zip(TAG.split(one), TAG.split(other), strict=False):
        if part != another:
            tags = TAG.fullmatch(part) or TAG.fullmatch(another)
            return common + ("" if tags else commonprefix([part, another]))  # noqa: RUF071
        common += part
    return common


def _hint_for(header: str) -> str:
    own = "give a model.chat_template of your own"
    tag = re.search(r"([<\[])(\w+[>\]])\s*$", header)
    if tag is None:
        return own
    closing = f"\\n{tag[1]}/{tag[2]}"
    return f'the prompt opens the thinking: response.thinking: ["", "{closing}"]; or {own}'
