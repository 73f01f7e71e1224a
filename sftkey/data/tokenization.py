"""Examples into rows of tokens, each token with its segment.

A row is one string, `prompt + bridge + completion + end`, tokenized once. Where its segments begin
is known from how the string was put together, never searched for: the texts may hold the tags, and
on byte-level tokenizers the last `>` of a tag merges with the line's end behind it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftkey.data.frame import Frame
from sftkey.data.response import Example, Segment
from sftkey.data.spans import Tokens, segments_of
from sftkey.errors import FrameError

if TYPE_CHECKING:
    from tokenizers import Encoding

    _Encoded = tuple[list[Encoding], list[Encoding]]

BATCH_SIZE = 250  # rows that a thread tokenizes at a time


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
    return [row for batch in tokenize_batches(examples, frame) for row in batch]


def tokenize_batches(examples: Sequence[Example], frame: Frame) -> Iterator[list[Row | Refusal]]:
    """Do as `tokenize`, batch by batch.

    The tokenizer works outside of Python's lock: while its threads are at the next batches, one on
    each core, this thread makes rows of the last.

    Raises:
        FrameError: The template drops or raises on a system message.
    """
    num_threads = _num_cores()
    batches = (examples[n : n + BATCH_SIZE] for n in range(0, len(examples), BATCH_SIZE))
    waiting: deque[tuple[Sequence[Example], list[_Text | str], Future[_Encoded]]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for batch in batches:
            written = [_write(example, frame) for example in batch]
            texts = [text for text in written if isinstance(text, _Text)]
            prompts = [text.prompt for text in texts]
            wholes = [text.prompt + text.rest for text in texts]
            future = pool.submit(frame.encode_rows, prompts, wholes)
            waiting.append((batch, written, future))
            if len(waiting) > num_threads:
                yield _rows(*waiting.popleft(), frame)
        while waiting:
            yield _rows(*waiting.popleft(), frame)


def _num_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _rows(
    examples: Sequence[Example],
    written: Sequence[_Text | str],
    encoded: Future[_Encoded],
    frame: Frame,
) -> list[Row | Refusal]:
    """Make the rows of a batch when its tokens are there."""
    prompts, wholes = map(iter, encoded.result())
    rows: list[Row | Refusal] = []
    for example, text in zip(examples, written, strict=True):
        outcome = text if isinstance(text, str) else _row(text, next(prompts), next(wholes), frame)
        if isinstance(outcome, str):
            rows.append(Refusal(example.index, outcome))
        else:
            rows.append(Row(*outcome, example.index))
    return rows


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
    prompt_ids, ids = prompt.ids, whole.ids
    start = len(prompt_ids)
    tokens = Tokens(ids[start:], whole, start)
    pieces = [(Segment.PROMPT, text.prompt), *text.pieces]
    changed = ids[:start] != prompt_ids
    # A special token may swallow the white space behind it, here the completion's first. And a
    # character that is lost makes the offsets behind it wrong.
    swallowed = not changed and start and tokens.span(-1)[1] > len(text.prompt)
    if changed or swallowed or frame.lost_character(text.prompt):
        apart = _apart(text, prompt_ids, None if swallowed else ids, frame)
        if apart is None:
            return (
                "the ids do not begin with the prompt's, "
                "and the rest tokenized apart decodes to another text"
            )
        tokens, pieces = apart, text.pieces
    fault = _fault(tokens, pieces, frame)
    if fault:
        return fault
    before = [*frame.bos_before(text.prompt), *prompt_ids]
    segments = segments_of(tokens, pieces)
    return [*before, *tokens.ids], [*[int(Segment.PROMPT)] * len(before), *segments]


def _apart(
    text: _Text, prompt_ids: list[int], whole_ids: list[int] | None, frame: Frame
) -> Tokens | None:
    """Tokenize what follows the prompt on its own, so that no character gets lost or comes in.

    SentencePiece sets a blank before a text: behind an anchor, which is cut off again, it doesn't.
    """
    wanted = {_decode(prompt_ids, frame) + text.rest}
    wanted |= {_decode(whole_ids, frame)} if whole_ids else set()
    for anchor in ("", frame.end_token, "\n", "x"):
        head, both = frame.encode([anchor, anchor + text.rest])
        ids = both.ids[len(head.ids) :]
        if [*head.ids, *ids] == both.ids and _decode([*prompt_ids, *ids], frame) in wanted:
            return Tokens(ids, both, len(head.ids), len(anchor))
    return None


def _fault(tokens: Tokens, pieces: Sequence[tuple[Segment, str]], frame: Frame) -> str | None:
    """Tell what is wrong with the special tokens behind the prompt, if anything is."""
    length = sum(len(text) for _, text in pieces)
    ids, token = tokens.ids, frame.end_token
    if not ids or ids[-1] != frame.end_id:
        return f"the end of turn {token!r} is not the last token"
    if tokens.span(len(ids) - 1) != (length - len(token), length):
        return f"the end of turn {token!r} swallows white space before it"
    special = list(filter(frame.special_lengths.__contains__, ids))
    if special != frame.written_special_ids:
        return "a special token arises that nobody wrote: a character is unknown to the tokenizer"
    place = -1
    for number in special:
        place = ids.index(number, place + 1)
        start, stop = tokens.span(place)
        if stop - start != frame.special_lengths[number]:
            swallowing = frame.tokenizer.convert_ids_to_tokens(number)
            return f"the special token {swallowing!r} swallows white space beside it"
    return None


def _decode(ids: Sequence[int], frame: Frame) -> str:
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return str(frame.tokenizer.decode(list(ids), **options))
