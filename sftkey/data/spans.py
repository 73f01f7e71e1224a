"""Which characters tokens stand for, and so which segments they belong to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from sftkey.data.response import Segment

if TYPE_CHECKING:
    from tokenizers import Encoding

# A token that touches several segments belongs to the first of them here, so that nothing of the
# thinking gets into the key, and everything of the answer into the answer.
PRECEDENCE = (
    Segment.THINKING,
    Segment.ANSWER,
    Segment.ANSWER_TAG,
    Segment.END,
    Segment.PROMPT,
)


@dataclass(frozen=True)
class Tokens:
    """The tokens behind a prompt, and the characters that they stand for.

    The encoding is asked for the few tokens that count: lists of all offsets cost more than all
    else that Python does for a row.

    Args:
        ids: (T,) token ids.
        encoding: Holds these tokens at its end.
        first: The number of its tokens before them.
        shift: The number of characters before the text that offsets count in.
    """

    ids: list[int]
    encoding: Encoding
    first: int
    shift: int = 0

    def span(self, place: int) -> tuple[int, int]:
        """Give where a token's characters begin and end; -1 is the last token before these."""
        span: Any = self.encoding.token_to_chars(self.first + place)
        return max(span[0] - self.shift, 0), span[1] - self.shift

    def place_of(self, character: int) -> int:
        """Give the first token that begins at a character or behind it."""
        if character == 0:
            return 0
        key: Any = self.encoding.token_to_chars  # (start, stop), which compares by its start
        places = range(self.first, self.first + len(self.ids))
        return bisect_left(places, (character + self.shift,), key=key)


def segments_of(tokens: Tokens, pieces: Sequence[tuple[Segment, str]]) -> list[int]:
    """Give each token's segment from the characters it stands for.

    Tokens that are bytes of one character all stand for it; a token of no character (the blank that
    SentencePiece sets before a text) goes with the character it stands before.

    Args:
        tokens: What the pieces became.
        pieces: The texts that follow one another, each with its segment.
    """
    cuts = [0, *accumulate(len(text) for _, text in pieces)]
    behind = [tokens.place_of(cut) for cut in cuts]  # the first tokens wholly behind the cuts
    owned: dict[Segment, list[slice]] = {segment: [] for segment in PRECEDENCE}
    for (segment, text), cut, (first, last) in zip(pieces, cuts, pairwise(behind), strict=False):
        if text:
            while first and tokens.span(first - 1)[1] > cut:
                first -= 1
            owned[segment].append(slice(first, last))
    found = [int(Segment.PROMPT)] * len(tokens.ids)
    for segment in reversed(PRECEDENCE):
        for part in owned[segment]:
            found[part] = [int(segment)] * (part.stop - part.start)
    return found
