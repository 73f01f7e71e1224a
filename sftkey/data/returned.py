"""Does a row come back: what is read from its completion, against what was put in."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, Parsed

OWN_TAGS = "the response's own tags stand inside"
NUM_SHOWN = 60  # characters of a text in a message


@dataclass(frozen=True)
class Change:
    """What of a row doesn't come back."""

    what: str  # the kind of change, for people
    shown: str  # one example of it
    in_answer: bool  # whether the answer is another one, and not the thinking alone


def change_of(example: Example, ids: list[int], renderer: Renderer) -> Change | None:
    """Read a completion as grading does, and say what differs from the example, if anything does.

    Texts are the same where Unicode calls them so (NFC), but for white space around them. The ids
    (T,) reach from behind the prompt to the end of turn.
    """
    written = renderer.response.render(example.thinking, example.answer)
    whole = renderer.assistant_prefix + written + renderer.end
    decoded = whole if renderer.spells(ids, whole) else renderer.decode_behind(ids)
    who = OWN_TAGS if _same(decoded, whole) else "the tokenizer changes"
    if decoded.strip() != whole.strip():  # as the tokenizer writes it, be it NFC alone
        inner = decoded.strip().removesuffix(renderer.end.strip())
        written = inner.removeprefix(renderer.assistant_prefix.strip())
    return _difference(example, renderer.response.parse(written), who)


def _difference(example: Example, found: Parsed, who: str) -> Change | None:
    answer, thinking = found.answer or "", found.thinking or ""
    if not _same(answer, example.answer):
        return Change(f"{who} the answer", _arrow(example.answer, answer), True)
    if not _same(thinking, example.thinking) or not found.strict:
        return Change(f"{who} the thinking", _arrow(example.thinking, thinking), False)
    return None


def _same(one: str, other: str) -> bool:
    one, other = one.strip(), other.strip()
    return one == other or unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def _arrow(before: str, after: str) -> str:
    """Show two texts from a little before the place where they part; the same text once."""
    if before == after:
        return repr(before[:NUM_SHOWN])
    pairs = enumerate(zip(before, after, strict=False))
    place = next((n for n, (a, b) in pairs if a != b), min(len(before), len(after)))
    start = max(place - NUM_SHOWN // 3, 0)
    parts = (repr(text[start : start + NUM_SHOWN]) for text in (before, after))
    return " is read as ".join(parts)
