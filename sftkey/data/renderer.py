"""A tokenizer's chat template as text around prompt and response."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from sftkey.data.prompt import Habits, check_tools, render_prompt, unwritten_of_tools
from sftkey.data.response import TOOLS, Parsed, Response, as_messages
from sftkey.data.template import (
    QUESTION,
    TEMPLATE_ERRORS,
    TOOL,
    Probe,
    name_of,
    probe_template,
    render,
    special_ids,
    special_pattern,
)
from sftkey.errors import FrameError
from sftkey.recipe.schema import ResponseSection

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

ANCHOR = "x"  # decoded before a completion
# In a byte-level vocabulary what can be shown stands for itself, the other bytes stand behind.
SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(0x100) if byte not in SHOWN]
SIGNS = {byte: chr(byte) for byte in SHOWN}
SIGNS |= {byte: chr(0x100 + place) for place, byte in enumerate(OTHERS)}
BYTES = {sign: byte for byte, sign in SIGNS.items()}


class Spelling(dict[int, bytes]):
    """The bytes of each token by its id, as the byte-level decoder reads them."""

    def __init__(self, token_of: Callable[[int], str | None]) -> None:
        super().__init__()
        self.token_of = token_of

    def __missing__(self, number: int) -> bytes:
        token = self.token_of(number) or ""
        known = all(sign in BYTES for sign in token)  # an added token is mostly text as it is
        self[number] = bytes(BYTES[sign] for sign in token) if known else token.encode()
        return self[number]

    def of(self, ids: Sequence[int]) -> bytes:
        """Return what ids stand for."""
        # The fastest way; a getter of one key would return no tuple.
        return b"".join(itemgetter(*ids, ids[0])(self)[:-1]) if ids else b""


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
        header: The generation prompt, which every chat must end in.
        tail: What the template writes in its place where no answer is asked for, mostly nothing.

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
    header: str = ""
    tail: str = ""

    @classmethod
    def read(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        response: ResponseSection | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Renderer:
        """Find out what stands between prompt and completion, and what ends a turn.

        Args:
            tokenizer: A fast tokenizer.
            response: The completion's tags; default a recipe's.
            chat_template_kwargs: Handed to the template: `{"enable_thinking": False}`, for one.

        Raises:
            FrameError: The tokenizer or its template can't carry the response.
        """
        section, kwargs = response or ResponseSection(), dict(chat_template_kwargs or {})
        tags = Response.from_section(section)
        if not tokenizer.is_fast:
            raise FrameError(
                name_of(tokenizer),
                "expected a fast tokenizer, got a slow one, which doesn't say where its tokens "
                "stand",
                hint="put a tokenizer.json beside the model, or choose a model that has one",
            )
        if section.frame == "plain":
            if kwargs:
                what = "response.frame: plain renders no chat template; got "
                what += "model.chat_template_kwargs"
                raise FrameError(name_of(tokenizer), what, "leave them out")
            end = section.end or tokenizer.eos_token or ""
            found = cls(tokenizer, tags, "", end, _plain_end(tokenizer, end), {}, "plain")
            return _checked(replace(found, bos_ids=ids_set_before(tokenizer)))
        probe = probe_template(tokenizer, tags, kwargs)
        end, token = _end_of_turn(tokenizer, probe)
        number = special_ids(tokenizer)[token]
        found = cls(tokenizer, tags, probe.assistant_prefix, end, number, kwargs)
        check_tools(found._habits)
        return _checked(replace(found, header=probe.header, tail=probe.tail))

    def prompt_text(self, prompt: str | Sequence[Mapping[str, str]]) -> str:
        """Return the text that inference feeds, up to where the model begins to write.

        Raises:
            FrameError: The template drops or raises on what the prompt holds, or writes another
                generation prompt for it; or `plain` got chat messages.
        """
        if self.kind == "chat":
            messages = as_messages(prompt)
            text = render_prompt(self._habits, messages)
            self._check_header(messages, text)
            return text
        if not isinstance(prompt, str):
            raise FrameError(
                "response.frame",
                "plain takes a prompt as text, got chat messages",
                hint="take response.frame: chat, or write data.prompt as one text without a system",
            )
        return prompt

    def _check_header(self, messages: Sequence[Mapping[str, Any]], text: str) -> None:
        """Refuse a chat whose generation prompt isn't the one that completions were probed with.

        Where the template's syntax tree shows that no row can change it, none is asked.
        """
        chosen = messages[0]["role"] == TOOLS and isinstance(self.tokenizer.chat_template, dict)
        if chosen and self._fault_of_named:
            raise FrameError(name_of(self.tokenizer), *self._fault_of_named)
        if self._habits.reads(messages).fixed_header:
            return
        try:
            closed = render(self.tokenizer, messages, self.chat_template_kwargs, False)
        except TEMPLATE_ERRORS as error:
            what = f"the chat template raises where no answer is asked for: {error}"
            raise FrameError(name_of(self.tokenizer), what) from error
        if text != closed.removesuffix(self.tail) + self.header:
            raise FrameError(
                name_of(self.tokenizer),
                f"the generation prompt isn't {self.header!r} here, as for a question alone",
                "leave out what switches it in the messages (`/no_think` for one), and set "
                "model.chat_template_kwargs for all rows",
            )

    @cached_property
    def _fault_of_named(self) -> tuple[str, str | None] | None:
        """What is wrong where tools choose another of several named templates, and a hint."""
        kwargs = {**self.chat_template_kwargs, "tools": [TOOL]}
        try:
            probe = probe_template(self.tokenizer, self.response, kwargs)
        except FrameError as error:
            return error.problems[0].what, error.hint
        own = (self.assistant_prefix, self.header, self.tail)
        theirs = (probe.assistant_prefix, probe.header, probe.tail)
        if theirs == own and probe.after.startswith(self.end):
            return None
        what = "the chat template that tools choose writes other text around an answer"
        return what, "give one model.chat_template for all rows"

    def unwritten_of_tools(self, prompt: str | Sequence[Mapping[str, str]]) -> list[str]:
        """Name what the template leaves out of a prompt's tools, such as `enum`."""
        return unwritten_of_tools(self._habits, as_messages(prompt)) if self.kind == "chat" else []

    @cached_property
    def _habits(self) -> Habits:
        return Habits(self.tokenizer, self.chat_template_kwargs)

    def prompt_ids(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Return the very ids that inference feeds and that training rows begin with."""
        text = self.prompt_text(prompt)
        return [*self.bos_before(text), *self.encode([text])[0].ids]

    def bos_before(self, prompt_text: str) -> tuple[int, ...]:
        """Return the ids to set before a prompt: none where its text begins with them already."""
        bos = self.tokenizer.bos_token
        return () if bos and prompt_text.startswith(bos) else self.bos_ids

    def bare(self, text: str) -> str:
        """Return what was written behind a prompt, without what template and engine put around."""
        return text.removeprefix(self.assistant_prefix).removesuffix(self.end)

    def parse(self, text: str) -> Parsed:
        """Find thinking and answer in what was written behind a prompt."""
        return self.response.parse(self.bare(text))

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenize texts as they are: nothing is added, cut or padded."""
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def encode_rows(
        self, prompts: Sequence[str], wholes: Sequence[str]
    ) -> list[tuple[list[int], list[int], Encoding]]:
        """Tokenize the prompts of rows and the whole rows.

        Returns:
            Of each row the ids of its prompt alone, (T,) the ids of the whole, and their offsets.
        """
        encodings = self.encode(wholes)
        ids = [encoding.ids for encoding in encodings]
        fronts = [
            self._front(prompt, *row)
            for prompt, row in zip(prompts, zip(ids, encodings, strict=True), strict=True)
        ]
        alone = [prompt for prompt, front in zip(prompts, fronts, strict=True) if front is None]
        others = iter(self._backend.encode_batch_fast(alone, add_special_tokens=False))
        found = (next(others).ids if front is None else front for front in fronts)
        return list(zip(found, ids, encodings, strict=True))

    def _front(self, prompt: str, ids: list[int], encoding: Encoding) -> list[int] | None:
        """Return a prompt's ids as they stand in its row's; None where it must be tokenized alone.

        A special token parts a text: what stands before it becomes the same tokens whatever follows
        it. So it is enough that those behind it, up to the prompt's end, are the header's.
        """
        if self._header_end is None or self.lost_character(prompt):
            return None
        text, last, *behind = self._header_end
        place = encoding.char_to_token(len(prompt) - len(text) - 1)
        if place is None or not prompt.endswith(text):
            return None
        end = place + 1 + len(behind)
        return ids[:end] if ids[place:end] == [last, *behind] else None

    @cached_property
    def _header_end(self) -> tuple[Any, ...] | None:
        """The header's text behind its last special token; its ids, and those of the text."""
        header = self.header
        if self.kind == "chat" and not header:  # Mistral's; then it is what closes a question
            header = self._habits.asked.rpartition(QUESTION)[2]
        found = list(self.special_pattern.finditer(header))
        added = self.tokenizer.added_tokens_decoder.values()
        if not found or any(token.single_word or token.lstrip for token in added):
            return None
        text = header[found[-1].end() :]
        ids = self.encode([found[-1][0] + text])[0].ids
        return (text, *ids) if ids[0] == self.special_ids[found[-1][0]] else None

    def backend_state(self) -> str:
        """Return all that tokenizing depends on, as JSON."""
        return self._backend.to_str()

    @cached_property
    def end_token(self) -> str:
        """The special token that ends generation."""
        return str(self.tokenizer.convert_ids_to_tokens(self.end_id))

    @cached_property
    def end_ids(self) -> list[int]:
        """The special tokens that end a turn, of which the last ends a row; mostly one."""
        return [self.special_ids[token] for token in self.special_pattern.findall(self.end)]

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The special tokens by their texts."""
        return special_ids(self.tokenizer)

    @cached_property
    def special_numbers(self) -> frozenset[int]:
        """The ids of the special tokens."""
        return frozenset(self.special_ids.values())

    def special_in(self, ids: Iterable[int]) -> list[int]:
        """Return the special tokens among ids, in order."""
        return list(filter(self.special_numbers.__contains__, ids))

    @cached_property
    def swallowing_lengths(self) -> dict[int, int]:
        """The lengths in characters, by their ids, of tokens that may swallow white space."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {n: len(token.content) for n, token in added if token.lstrip or token.rstrip}

    def decode_behind(self, ids: Sequence[int]) -> str:
        """Decode what follows a prompt: SentencePiece takes a first blank away elsewhere."""
        text = self._backend.decode([*self._anchor, *ids], skip_special_tokens=False)
        return text.lstrip().removeprefix(ANCHOR)

    def spells(self, ids: Sequence[int], text: str) -> bool:
        """Tell whether ids are seen to be a text, byte by byte; where not, decoding tells."""
        return self._spelling is not None and self._spelling.of(ids) == text.encode()

    @cached_property
    def _spelling(self) -> Spelling | None:
        from tokenizers.decoders import ByteLevel

        bytewise = isinstance(self._backend.decoder, ByteLevel)
        return Spelling(self._backend.id_to_token) if bytewise else None

    @cached_property
    def _anchor(self) -> list[int]:
        return list(self.encode([ANCHOR])[0].ids)

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
        id_of = self._backend.token_to_id
        lost = bytes(byte for byte, sign in SIGNS.items() if id_of(sign) is None)
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


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> tuple[str, str]:
    """Return the text that ends a turn, and the special token that it ends with.

    Cohere's turns end with two: the response's end and the turn's. What stands only at the end of
    a whole conversation (Phi-4-mini's `<|endoftext|>`) is no part of a turn.
    """
    pattern, after = special_pattern(special_ids(tokenizer)), probe.after
    found = pattern.search(after)
    if found is None:
        raise FrameError(
            name_of(tokenizer),
            f"expected a special token that ends a turn, the chat template writes {after!r}, "
            "which holds none of this tokenizer's",
            hint="a base model takes response.frame: plain; "
            "else give a model.chat_template whose turns end with a special token",
        )
    while found[0] != tokenizer.eos_token:
        behind = after[found.end() :]
        another = pattern.match(after, len(after) - len(behind.lstrip()))
        if another is None or not probe.before_next.startswith(after[: another.end()]):
            break
        if after[another.end() :][:1].isalpha():  # a role's name: the next turn begins
            break
        if another[0] in after[: found.end()]:  # generation stops at the first of them
            break
        found = another
    return after[: found.end()], found[0]


def _checked(renderer: Renderer) -> Renderer:
    """Refuse a frame whose end stands in it before the end: generation would stop there."""
    tokens = renderer.tokenizer.convert_ids_to_tokens(renderer.end_ids)
    for text in (renderer.assistant_prefix, *vars(renderer.response).values()):
        if token := next((each for each in tokens if each in text), None):
            raise FrameError(
                name_of(renderer.tokenizer),
                f"the end of turn {token!r} stands in {text!r} too, where generation would stop",
                hint="choose response.thinking and response.answer without it",
            )
    _check_returns(renderer)
    return renderer


def _check_returns(renderer: Renderer) -> None:
    """Refuse a tokenizer that no answer comes back from: it sets blanks, or rewrites the tags."""
    answer = "a1b"
    written = renderer.response.render(answer, answer)
    read = renderer.decode_behind(renderer.encode([written])[0].ids).lstrip(" ")
    if renderer.response.parse(read).answer != answer:
        raise FrameError(
            name_of(renderer.tokenizer),
            f"the tokenizer rewrites every response: {written!r} is read as {read!r}",
            hint="choose response.thinking and response.answer as they are read, or take the "
            "tokenizer.json that belongs to the model",
        )


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


def ids_set_before(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that the tokenizer sets before a text by itself."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    starts = range(len(whole) - len(bare) + 1)
    start = next((n for n in starts if whole[n : n + len(bare)] == bare), 0)
    return tuple(whole[:start])


def stop_ids(renderer: Renderer, published: int | Iterable[int] | None = None) -> list[int]:
    """Return the ids that must stop generation: the trained end of turn, then the published ones.

    Where several tokens end a turn, the text is over at the first. What is published is the
    `eos_token_id` of the model's generation config.
    """
    others = [published] if isinstance(published, int) else list(published or ())
    return list(dict.fromkeys([renderer.end_id, *others, *renderer.end_ids]))
