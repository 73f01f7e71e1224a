"""A tokenizer's chat template as text around prompt and response."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from sftkey.data.response import Response
from sftkey.errors import FrameError
from sftkey.recipe.schema import ResponseSection

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase


Messages = Sequence[Mapping[str, str]]

QUESTION = "question4f1c"
SENTINEL = "sentinel9b27"
# What a template raises by itself, and what it trips over when it meets a message it doesn't know.
TEMPLATE_ERRORS = (TemplateError, AttributeError, KeyError, TypeError, ValueError)


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name by which an error speaks of a tokenizer."""
    return tokenizer.name_or_path or "tokenizer"


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the special tokens by their texts."""
    added = tokenizer.added_tokens_decoder.items()
    special = {token.content: number for number, token in added if token.special}
    return special | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def special_pattern(special: Mapping[str, int]) -> re.Pattern[str]:
    """Return a pattern that finds special tokens in a text, the longest first."""
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
    """Return the text between generation prompt and completion, and all the text after it.

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
    assistant_prefix = _assistant_prefix(name, before, prompt, header, response)
    if closed == prompt and special_pattern(special_ids(tokenizer)).search(assistant_prefix):
        raise FrameError(
            name,
            "the chat template has no generation prompt: the model itself would write "
            f"{assistant_prefix!r}",
            hint="give a model.chat_template that heeds add_generation_prompt",
        )
    return assistant_prefix, after


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


@dataclass(frozen=True)
class Renderer:
    """The texts and ids around every completion of a run.

    Args:
        tokenizer: A fast tokenizer: it says where its tokens stand in a text.
        response: The completion's tags.
        assistant_prefix: What the template writes between generation prompt and assistant's text.
        end: What ends the turn: its last token is `end_id`, mostly its only one.
        end_id: The special token that ends generation.
        chat_template_kwargs: Handed to the template in training and inference alike.
        kind: `chat` renders prompts with the template, `plain` takes them as they are.
        bos_ids: Ids that the tokenizer sets before a plain text by itself.

    >>> renderer = Renderer.read(tokenizer)
    >>> renderer.end, len(renderer.prompt_ids("2 + 2?")) > 6
    ('<|im_end|>', True)
    """

    tokenizer: PreTrainedTokenizerBase
    response: Response
    assistant_prefix: str
    end: str
    end_id: int
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    kind: Literal["chat", "plain"] = "chat"
    bos_ids: tuple[int, ...] = ()

    @classmethod
    def read(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        response: ResponseSection | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Renderer:
        """Return the renderer of a tokenizer and its chat template.

        Args:
            tokenizer: A fast tokenizer.
            response: The completion's tags; default a recipe's.
            chat_template_kwargs: Handed to the template: `{"enable_thinking": False}`, for one.

        Raises:
            FrameError: The tokenizer or its template can't carry the response.
        """
        return probe_renderer(tokenizer, response or ResponseSection(), chat_template_kwargs)

    def prompt_text(self, prompt: str | Sequence[Mapping[str, str]]) -> str:
        """Return the text that inference feeds, up to where the model begins to write.

        Raises:
            FrameError: The template drops or raises on what the prompt holds, or `plain` got chat
                messages.
        """
        if self.kind == "chat":
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return render_prompt(self.tokenizer, messages, self.chat_template_kwargs)
        if not isinstance(prompt, str):
            raise FrameError(
                "response.frame",
                "plain takes a prompt as text, got chat messages",
                hint="take response.frame: chat, or write data.prompt as one text without a system",
            )
        return prompt

    def prompt_ids(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Return the very ids that inference feeds and that training rows begin with."""
        text = self.prompt_text(prompt)
        return [*self.bos_before(text), *self.encode([text])[0].ids]

    def bos_before(self, prompt_text: str) -> tuple[int, ...]:
        """Return the ids to set before a prompt: none where its text begins with them already."""
        bos = self.tokenizer.bos_token
        return () if bos and prompt_text.startswith(bos) else self.bos_ids

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenize texts as they are: nothing is added, cut or padded."""
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def encode_rows(
        self, prompts: Sequence[str], wholes: Sequence[str]
    ) -> tuple[list[Encoding], list[Encoding]]:
        """Tokenize the prompts of rows and the whole rows; of the prompts no offsets are known."""
        encode_prompts = self._backend.encode_batch_fast
        return encode_prompts(list(prompts), add_special_tokens=False), self.encode(wholes)

    def backend_state(self) -> str:
        """Return all that tokenizing depends on, as JSON."""
        return self._backend.to_str()

    @property
    def end_token(self) -> str:
        """The special token that ends generation."""
        return str(self.tokenizer.convert_ids_to_tokens(self.end_id))

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The special tokens by their texts."""
        return special_ids(self.tokenizer)

    @cached_property
    def special_lengths(self) -> dict[int, int]:
        """The numbers of characters of the special tokens by their ids."""
        return {number: len(token) for token, number in self.special_ids.items()}

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Finds special tokens in a text."""
        return special_pattern(self.special_ids)

    def lost_character(self, text: str) -> str | None:
        """Return the first character of a text that the tokenizer would lose, if it has one."""
        lost = self._lost_bytes
        if lost is None or not lost.search(text.encode()):
            return None
        return next(c for c in text if lost.search(c.encode()))

    @cached_property
    def written_special_ids(self) -> list[int]:
        """The special tokens that prefix, tags and end bring into every completion, in order."""
        written = self.assistant_prefix + self.response.render("", "") + self.end
        return [self.special_ids[token] for token in self.special_pattern.findall(written)]

    @cached_property
    def _lost_bytes(self) -> re.Pattern[bytes] | None:
        """Finds bytes that a byte-level vocabulary lacks (SmolLM2's, say): dropped without a word.

        None where it lacks none.
        """
        if "ByteLevel" not in str(self._backend.pre_tokenizer):
            return None
        # What can be shown stands for itself in such a vocabulary, the others stand behind.
        shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(0x100) if byte not in shown]
        signs = {byte: chr(byte) for byte in shown}
        signs |= {byte: chr(0x100 + place) for place, byte in enumerate(others)}
        lost = bytes(b for b, sign in signs.items() if self._backend.token_to_id(sign) is None)
        return re.compile(b"[" + re.escape(lost) + b"]") if lost else None

    @cached_property
    def _backend(self) -> Tokenizer:
        """A copy without post-processor: some trim blanks off the offsets."""
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.post_processor = None
        backend.no_truncation()
        backend.no_padding()
        return backend


def probe_renderer(
    tokenizer: PreTrainedTokenizerBase,
    section: ResponseSection,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Renderer:
    """Find out what stands between prompt and completion, and what ends the turn.

    Raises:
        FrameError: The tokenizer or its template can't carry the response.
    """
    response = Response.from_section(section)
    if not tokenizer.is_fast:
        raise FrameError(
            name_of(tokenizer),
            "expected a fast tokenizer, got a slow one, which doesn't say where its tokens stand",
            hint="put a tokenizer.json beside the model, or choose a model that has one",
        )
    if section.frame == "plain":
        end = section.end or tokenizer.eos_token or ""
        plain = Renderer(tokenizer, response, "", end, _plain_end(tokenizer, end), {}, "plain")
        return _checked(replace(plain, bos_ids=_bos_ids(tokenizer)))
    kwargs = dict(chat_template_kwargs or {})
    assistant_prefix, after = probe_template(tokenizer, response, kwargs)
    special = special_ids(tokenizer)
    found = special_pattern(special).search(after)
    if found is None:
        raise FrameError(
            name_of(tokenizer),
            f"expected a special token that ends a turn, the chat template writes {after!r}, "
            "which holds none of this tokenizer's",
            hint="a base model takes response.frame: plain; "
            "else give a model.chat_template whose turns end with a special token",
        )
    end = after[: found.end()]
    return _checked(Renderer(tokenizer, response, assistant_prefix, end, special[found[0]], kwargs))


def _checked(renderer: Renderer) -> Renderer:
    """Refuse a frame whose end stands in it before the end: generation would stop there."""
    for text in (renderer.assistant_prefix, *vars(renderer.response).values()):
        if renderer.end_token in text:
            raise FrameError(
                name_of(renderer.tokenizer),
                f"the end of turn {renderer.end_token!r} stands in {text!r} too, "
                "where generation would stop",
                hint="choose response.thinking and response.answer without it",
            )
    return renderer


def _plain_end(tokenizer: PreTrainedTokenizerBase, end: str) -> int:
    """Return the id of a plain row's end."""
    special = special_ids(tokenizer)
    if end not in special:
        raise FrameError(
            name_of(tokenizer),
            f"expected one special token that ends a text, got {end!r}",
            hint=f"response.end: one of {', '.join(special) or 'none: this tokenizer has none'}",
        )
    return special[end]


def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that the tokenizer sets before a text by itself."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    start = next((n for n in starts if whole[n : n + len(bare)] == bare), 0)
    return tuple(whole[:start])


def stop_ids(renderer: Renderer, published: int | Iterable[int] | None = None) -> list[int]:
    """Return the ids that must stop generation: the trained end of turn, then the published ones.

    Args:
        renderer: The run's renderer.
        published: `eos_token_id` of the model's generation config.
    """
    others = [published] if isinstance(published, int) else list(published or ())
    return list(dict.fromkeys([renderer.end_id, *others]))
