"""Rows that are longer than `data.max_length`: dropped, or shortened where nothing is the key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sftkey.data.frame import Frame
from sftkey.data.response import Example
from sftkey.data.tokenization import Refusal, Row, tokenize
from sftkey.errors import DataError

NUM_LISTED = 20  # row numbers in a message


def fit(
    rows: Sequence[Row | Refusal],
    examples: Sequence[Example],
    frame: Frame,
    max_length: int,
    too_long: str,
) -> list[Row | Refusal]:
    """Deal with the rows that are longer than `max_length` tokens; the key is never cut.

    Args:
        rows: What `tokenize` gave for the examples.
        examples: The rows' examples, in the same order.
        frame: The run's frame.
        max_length: Tokens that a row may have, prompt and end of turn included.
        too_long: `drop` refuses such a row; `trim_thinking` takes text off the end of its thinking,
            before the closing tag, and tokenizes it anew; `error` raises.

    Raises:
        DataError: A row is too long, and `too_long` is `error`.
    """
    if too_long == "error":
        lengths = [(row.index, len(row.input_ids)) for row in rows if isinstance(row, Row)]
        refuse_long([each for each in lengths if each[1] > max_length], max_length)
    fitted = list(rows)
    for place, row in enumerate(rows):
        if isinstance(row, Row) and len(row.input_ids) > max_length:
            if too_long == "drop":
                fitted[place] = Refusal(row.index, f"longer than {max_length} tokens")
            else:
                fitted[place] = _trim(row, examples[place], frame, max_length)
    return fitted


def refuse_long(long: Sequence[tuple[int, int]], max_length: int) -> None:
    """Refuse rows that are too long, given their numbers and lengths, if there are any.

    Raises:
        DataError: Names the first of them.
    """
    if long:
        numbers = [str(index) for index, _ in long[:NUM_LISTED]] + ["…"] * (len(long) > NUM_LISTED)
        raise DataError(
            "data.max_length",
            f"expected rows of at most {max_length} tokens; got {len(long)} "
            f"of up to {max(length for _, length in long)}: {', '.join(numbers)}",
            hint="rows count from 0; raise data.max_length, "
            "or choose data.too_long: drop or trim_thinking",
        )


def _trim(row: Row, example: Example, frame: Frame, max_length: int) -> Row | Refusal:
    """Shorten the thinking until the row fits; tokenized anew, since cut text has other tokens."""
    thinking = example.thinking
    while len(row.input_ids) > max_length:
        if not thinking:
            return Refusal(row.index, f"longer than {max_length} tokens even without thinking")
        spans = frame.encode([thinking])[0].offsets
        kept = max(len(spans) - (len(row.input_ids) - max_length), 0)
        cut = spans[kept][0] if spans else 0
        thinking = thinking[: min(cut, len(thinking) - 1)]
        (shorter,) = tokenize([replace(example, thinking=thinking)], frame)
        if isinstance(shorter, Refusal):
            return shorter
        row = shorter
    return row
