"""Examples into rows of tokens, each token with its segment.

A row is one string, `prompt + bridge + completion + end`, tokenized once. Where its segments begin
is known from how the string was put together, never searched for: the texts may hold the tags, and
on byte-level tokenizers the last `>` of a tag merges with the line's end behind it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from sftkey.data.frame import Frame
from sftkey.data.response import Example, Segment
from sftkey.errors import FrameError

if TYPE_CHECKING:
    from tokenizers import Encoding

BATCH_SIZE = 1000
# A token that touches several segments belongs to the first of them here, so that nothing of the
# thinking gets into the key, and everything of the answer into the answer.
PRECEDENCE = (
    Segment.THINKING,
    Segment.ANSWER,
    Segment.ANSWER_TAG,
    Segment.END,
    Segment.PROMPT,
)


@dataclass
class Row:
    """One row of tokens.

    Args:
        input_ids: (T,) token ids; the last one is the end of turn.
        segment_ids: (T,) values of `Segment`.
        index: The example's row in source order.
    """

    input_ids: list[int]
    segment_ids: list[int]
    index: int


@dataclass
class Refusal:
    """A row that can't be used: its place in source order, why, and the split it was meant for."""

    index: int
    reason: str
    split: str = ""


@dataclass(frozen=True)
class _Text:
    """The texts of a row: `pieces` follow the prompt, each with its segment."""

    prompt: str
    pieces: list[tuple[Segment, str]]

    @property
    def rest(self) -> str:
        return "".join(text for _, text in self.pieces)


def tokenize(examples: Sequence[Example], frame: Frame) -> list[Row | Refusal]:
    """Make a row of each example, or say why it can't be one; in order.

    Raises:
        FrameError: The template drops or raises on a system message.
    """
    rows: list[Row | Refusal] = []
    for start in range(0, len(examples), BATCH_SIZE):
        rows += _tokenize_batch(examples[start : start + BATCH_SIZE], frame)
    return rows


def _tokenize_batch(examples: Sequence[Example], frame: Frame) -> Iterator[Row | Refusal]:
    written = [_write(example, frame) for example in examples]
    texts = [text for text in written if isinstance(text, _Text)]
    prompts = iter(frame.encode([text.prompt for text in texts]))
    wholes = iter(frame.encode([text.prompt + text.rest for text in texts]))
    for example, text in zip(examples, written, strict=True):
        outcome = text if isinstance(text, str) else _row(text, next(prompts), next(wholes), frame)
        if isinstance(outcome, str):
            yield Refusal(example.index, outcome)
        else:
            yield Row(*outcome, example.index)


def _write(example: Example, frame: Frame) -> _Text | str:
    """Give the texts of a row, or why there are none."""
    for name, text in _texts(example, frame):
        token = frame.special_pattern.search(text)
        if token:
            return f"the {name} holds the text of the special token {token[0]!r}"
    try:
        prompt = frame.prompt_text(example.prompt)
    except FrameError as error:
        if isinstance(example.prompt, str) or frame.kind == "plain":
            raise
        if any(message["role"] == "system" for message in example.prompt):
            raise
        return error.problems[0].what
    pieces = frame.response.pieces(example.thinking, example.answer)
    return _Text(prompt, [(Segment.THINKING, frame.bridge), *pieces, (Segment.END, frame.end)])


def _texts(example: Example, frame: Frame) -> Iterator[tuple[str, str]]:
    """Give the texts that may not hold special tokens: a plain prompt may, it is its own frame."""
    yield "thinking", example.thinking
    yield "answer", example.answer
    if frame.kind == "chat":
        prompt = example.prompt
        messages = [{"content": prompt}] if isinstance(prompt, str) else prompt
        yield from (("prompt", message["content"]) for message in messages)


def _row(
    text: _Text, prompt: Encoding, whole: Encoding, frame: Frame
) -> tuple[list[int], list[int]] | str:
    """Give ids and segments of a row, or why there are none."""
    lost = frame.lost_character(text.rest)
    if lost:
        return f"the completion holds {lost!r}, which the tokenizer would lose"
    start = len(prompt.ids)
    ids, spans = whole.ids[start:], whole.offsets[start:]
    pieces = [(Segment.PROMPT, text.prompt), *text.pieces]
    changed = whole.ids[:start] != prompt.ids
    # A special token may swallow the white space behind it, here the completion's first. And a
    # character that is lost makes the offsets behind it wrong.
    swallowed = not changed and start and whole.offsets[start - 1][1] > len(text.prompt)
    if changed or swallowed or frame.lost_character(text.prompt):
        apart = _apart(text, prompt, None if swallowed else whole, frame)
        if apart is None:
            return (
                "the ids do not begin with the prompt's, "
                "and the rest tokenized apart decodes to another text"
            )
        (ids, spans), pieces = apart, text.pieces
    fault = _fault(ids, spans, pieces, frame)
    if fault:
        return fault
    before = [*frame.bos_before(text.prompt), *prompt.ids]
    segments = _segments(spans, pieces)
    return [*before, *ids], [*[int(Segment.PROMPT)] * len(before), *segments]


def _apart(
    text: _Text, prompt: Encoding, whole: Encoding | None, frame: Frame
) -> tuple[list[int], list[tuple[int, int]]] | None:
    """Tokenize what follows the prompt on its own, so that no character gets lost or comes in.

    SentencePiece sets a blank before a text: behind an anchor, which is cut off again, it doesn't.
    """
    wanted = {_decode(prompt.ids, frame) + text.rest}
    wanted |= {_decode(whole.ids, frame)} if whole else set()
    for anchor in ("", frame.end_token, "\n", "x"):
        head, both = frame.encode([anchor, anchor + text.rest])
        ids = both.ids[len(head.ids) :]
        if [*head.ids, *ids] == both.ids and _decode([*prompt.ids, *ids], frame) in wanted:
            shift = len(anchor)
            spans = both.offsets[len(head.ids) :]
            return ids, [(max(start - shift, 0), stop - shift) for start, stop in spans]
    return None


def _segments(spans: Sequence[tuple[int, int]], pieces: Sequence[tuple[Segment, str]]) -> list[int]:
    """Give each token's segment from the characters it stands for.

    Tokens that are bytes of one character all stand for it; a token of no character (the blank that
    SentencePiece sets before a text) goes with the character it stands before.
    """
    starts = [start for start, _ in spans]
    stops = [max(stop, start + 1) for start, stop in spans]
    ends = list(accumulate(len(text) for _, text in pieces))
    found = [int(Segment.PROMPT)] * len(spans)
    for segment in reversed(PRECEDENCE):
        for (owner, text), end in zip(pieces, ends, strict=True):
            if owner == segment and text:
                first, last = bisect_right(stops, end - len(text)), bisect_left(starts, end)
                found[first:last] = [int(segment)] * (last - first)
    return found


def _fault(
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    pieces: Sequence[tuple[Segment, str]],
    frame: Frame,
) -> str | None:
    """Tell what is wrong with the special tokens behind the prompt, if anything is."""
    length = sum(len(text) for _, text in pieces)
    token = frame.end_token
    if not ids or ids[-1] != frame.end_id:
        return f"the end of turn {token!r} is not the last token"
    if spans[-1] != (length - len(token), length):
        return f"the end of turn {token!r} swallows white space before it"
    special = [n for n, number in enumerate(ids) if number in frame.special_lengths]
    if [ids[n] for n in special] != frame.written_special_ids:
        return "a special token arises that nobody wrote: a character is unknown to the tokenizer"
    for number, (start, stop) in ((ids[n], spans[n]) for n in special):
        if stop - start != frame.special_lengths[number]:
            swallowing = frame.tokenizer.convert_ids_to_tokens(number)
            return f"the special token {swallowing!r} swallows white space beside it"
    return None


def _decode(ids: Sequence[int], frame: Frame) -> str:
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return str(frame.tokenizer.decode(list(ids), **options))
