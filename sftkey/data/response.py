"""What a completion looks like: its tags rendered around thinking and answer, and parsed back.

Training masks and grading both stand on this module, so that they can't disagree on what an answer
is. It needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftkey.recipe.schema import ResponseSection


TOOLS = "tools"  # the role of a first message that holds the row's tools, as JSON


class Segment(IntEnum):
    """The part of a row that a token belongs to; `segment_ids` hold these numbers.

    >>> [segment.name for segment in Segment]
    ['PROMPT', 'THINKING', 'ANSWER_TAG', 'ANSWER', 'END']
    """

    PROMPT = 0
    THINKING = 1  # with its tags, and whatever the template puts between prompt and thinking
    ANSWER_TAG = 2  # the opening tag and the closing one
    ANSWER = 3
    END = 4  # the end of turn


class QuestionKey(NamedTuple):
    """Which question an example asks: what was generated and graded is kept under this."""

    row: int  # in the order of the source, before splitting
    # Which of the row's assistant turns is asked for, from 0; `turns: last` has one a row.
    turn: int = 0

    def __str__(self) -> str:
        return f"row {self.row}" + (f", turn {self.turn}" if self.turn else "")


SAYS_NONE = {"", "none", "null", "nan", "n/a", "na", "-", "...", "…"}  # in a column of reasoning


@dataclass(frozen=True)
class Example:
    """One row of a data set, before any tokenizer has seen it.

    A conversation of several turns becomes one example for each assistant turn that is trained:
    the turns before it stand in `prompt`.

    Args:
        prompt: The question as text, or chat messages (`role`, `content`), the last one a user's.
            Tools that the model may call are a first message of the role `tools`, a JSON list.
        thinking: The reasoning, without tags.
        answer: The final answer, without tags.
        index: Row in the order of the source, before splitting.
        turn: Which of the row's assistant turns this is, from 0.

    >>> Example("What is 2 + 2?", "2 and 2 make 4.", "4").answer
    '4'
    """

    prompt: str | tuple[dict[str, Any], ...]
    thinking: str
    answer: str
    index: int = 0
    turn: int = 0

    @property
    def key(self) -> QuestionKey:
        """Row and turn."""
        return QuestionKey(self.index, self.turn)

    @property
    def has_thinking(self) -> bool:
        """Whether the reasoning says anything; what stands for nothing, such as `N/A`, doesn't."""
        return self.thinking.strip().lower() not in SAYS_NONE

    @property
    def question(self) -> str:
        """The prompt for people to read: without the system message, roles where there are turns.

        >>> Example(({"role": "user", "content": "2 + 2?"},), "", "4").question
        '2 + 2?'
        """
        if isinstance(self.prompt, str):
            return self.prompt
        turns = [turn for turn in self.prompt if turn["role"] != "system"]
        named = [f"{turn['role']}: {turn['content']}" for turn in turns]
        return str(turns[0]["content"]) if len(turns) == 1 else "\n\n".join(named)


def as_messages(prompt: str | Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """Return a prompt as chat messages: a text is what one user says."""
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    return tuple(prompt)


def require_text(said: str) -> None:
    """Refuse what no file and no tokenizer can hold."""
    try:
        said.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no text") from None


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of tokens as it is: special ones stand in it, and no blank is tidied away."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(list(ids), **options))


@dataclass(frozen=True)
class Parsed:
    """What was found in a generated text.

    Args:
        thinking: Text between the thinking's tags; None where no closing tag stands.
        answer: Text of the answer; None where no answer was found.
        strict: Whether the text is thinking, then answer, and nothing else (Fmt of the paper).
    """

    thinking: str | None
    answer: str | None
    strict: bool


@dataclass(frozen=True)
class Response:
    r"""The four tags of a completion.

    >>> response = Response("<Thinking>\n", "\n</Thinking>", "\n<Answer>\n", "\n</Answer>")
    >>> text = response.render("2 + 2 = 4", "4")
    >>> text
    '<Thinking>\n2 + 2 = 4\n</Thinking>\n<Answer>\n4\n</Answer>'
    >>> response.parse(text)
    Parsed(thinking='2 + 2 = 4', answer='4', strict=True)
    >>> response.parse("It is <Answer>4")
    Parsed(thinking=None, answer='4', strict=False)
    """

    thinking_open: str
    thinking_close: str
    answer_open: str
    answer_close: str

    @classmethod
    def from_section(cls, section: ResponseSection) -> Response:
        """Take the tags of a recipe's `response` section."""
        return cls(*section.thinking, *section.answer)

    def pieces(self, thinking: str, answer: str) -> list[tuple[Segment, str]]:
        """Return the completion as texts with their segments, in order; nothing is stripped."""
        return [
            (Segment.THINKING, self.thinking_open + thinking + self.thinking_close),
            (Segment.ANSWER_TAG, self.answer_open),
            (Segment.ANSWER, answer),
            (Segment.ANSWER_TAG, self.answer_close),
        ]

    @property
    def ends_thinking(self) -> bool:
        """Whether a tag tells where a thinking ends; white space alone may stand inside of it."""
        return bool(self.thinking_close.strip() or self.answer_open.strip())

    def render(self, thinking: str, answer: str) -> str:
        """Return the completion as one text."""
        return "".join(text for _, text in self.pieces(thinking, answer))

    def parse(self, text: str) -> Parsed:
        """Find thinking and answer in a generated text.

        Strict is what `render` writes, with any white space around the tags (the paper's Fmt
        speaks of tags only), each tag once. Otherwise the last answer found counts. Without tags,
        where white space alone parts the two, the answer is what stands after the last of it.
        """
        boundary = self.thinking_close + self.answer_open
        if boundary and not any(self._tags(strip=True)):
            before, found, after = text.strip().rpartition(boundary)
            return Parsed(before if found else None, after, strict=bool(found))
        for strip in (False, True):
            parts = _split(text, self._tags(strip), strip)
            if parts and not any(map(self.holds_tag, parts)):
                return Parsed(*parts, strict=True)
        return Parsed(self._last_thinking(text), self._last_answer(text), strict=False)

    def _tags(self, strip: bool) -> tuple[str, ...]:
        tags = (self.thinking_open, self.thinking_close, self.answer_open, self.answer_close)
        return _stripped(tags) if strip else tags

    def holds_tag(self, text: str) -> bool:
        """Tell whether a text holds one of the tags."""
        return any(tag and tag in text for tag in self._tags(strip=True))

    def _last_thinking(self, text: str) -> str | None:
        opening, closing, *_ = self._tags(strip=True)
        before, found, _ = text.rpartition(closing) if closing else ("", "", "")
        if not found:
            return None
        return (before.rpartition(opening)[2] if opening else before).strip()

    def _last_answer(self, text: str) -> str | None:
        _, thinking_close, opening, closing = self._tags(strip=True)
        marker = opening or thinking_close
        if not marker:
            return None
        before, found, after = text.rpartition(marker)
        if closing and closing not in after and closing in before:
            # The last answer was begun and not ended: the one before it is whole, if there is one.
            whole = before.rpartition(closing)[0].rpartition(marker)
            after = whole[2] if whole[1] else after
        if not found:
            return None
        return (after.partition(closing)[0] if closing else after).strip()


@cache  # for every row that is made
def _stripped(tags: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(tag.strip() for tag in tags)


def _split(text: str, tags: tuple[str, ...], strip: bool) -> tuple[str, str] | None:
    """Take thinking and answer out of a text that is nothing else; None where it is more or less.

    The first closing tag is where they part: a thinking that holds a tag is refused afterwards. So
    one pass is enough, while a pattern would try every closing tag and every blank around it.
    """
    opening, closing, answer_open, answer_close = tags
    text = text.strip() if strip else text
    if not text.startswith(opening):
        return None
    text = text[len(opening) :]
    boundary = closing + answer_open
    thinking, found, answer = text.partition(boundary) if boundary else ("", "", text)
    if strip and closing and answer_open:  # white space may stand between the two
        thinking, found, rest = text.partition(closing)
        answer = rest.lstrip()
        found = found if answer.startswith(answer_open) else ""
        answer = answer.removeprefix(answer_open)
    if (boundary and not found) or not answer.endswith(answer_close):
        return None
    answer = answer.removesuffix(answer_close)
    return (thinking.strip(), answer.strip()) if strip else (thinking, answer)
