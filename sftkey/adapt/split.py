"""The rule that splits texts into thinking and answer, found by what the texts look like."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sftkey.data.examples import make_rule

ENOUGH = 0.9  # of the rows must be read well
EMPTY = "the thinking is empty"
NUM_SEEN = 1000
# A tag that opens a text: <think>, <|begin_of_thought|>, ◁think▷, [THINK].
OPENING = re.compile(r"\s*(<\|?[A-Za-z][\w:-]*\|?>|◁\w+▷|\[[A-Z_]+\])")
HAS_TAG = re.compile(r"</?(?:answer|output|solution|response|think\w*|thought|reasoning)\b", re.I)
BOX = re.compile(r"\\(?:boxed|fbox)\b")
# What may stand behind the last box: the end of its formula and of its sentence.
BEHIND_BOX = re.compile(r"[\s.$\\\])}*!]*\Z")
# The last line, without the marks that make it bold and without its dot.
LAST_LINE = r"\**\s*(?P<answer>[^\n]+?)[.\s*]*\Z"
PHRASES = (
    # MetaMathQA says the answer twice.
    rf"\A(?P<thinking>.*\S)\s*\n####[^\n]*\n\s*The answer is:?\s*{LAST_LINE}",
    rf"\A(?P<thinking>.*\S)\s+\**[Tt]he (?:final )?answer is:?\s*{LAST_LINE}",
    rf"\A(?P<thinking>.*\S)\s*\n\**(?:Final )?[Aa]nswer\**:\s*{LAST_LINE}",
)


@dataclass(frozen=True)
class Fit:
    """How well a rule reads texts.

    Args:
        rule: As `data.split_rule` has it.
        num_texts: How many were seen.
        odd: Places of texts that it doesn't split, or not well, with the reason.
        explicit: Tags mark the thinking, so it is no guess where it ends.
    """

    rule: str
    num_texts: int
    odd: dict[int, str]
    explicit: bool = False

    @property
    def share(self) -> float:
        """The share of texts that are split well."""
        return 1 - len(self.odd) / max(self.num_texts, 1)

    @property
    def good(self) -> bool:
        """It may be taken."""
        return self.num_texts > 0 and self.share >= ENOUGH


def find_rule(texts: Sequence[str]) -> Fit:
    """Find the rule that reads texts; where none does well enough, the best of them.

    Rules whose signs are clearer come first: tags, then a sentence that says the answer, then the
    last line with hash marks, then a box.
    """
    some = texts[:NUM_SEEN]
    tagged = _tags(some)
    names = [*([tagged] if tagged else []), "think_tags", *PHRASES, "hash_marks", "boxed"]
    explicit = {"think_tags", tagged}
    fits = [_fit(name, some, name in explicit) for name in names]
    return next((fit for fit in fits if fit.good), max(fits, key=lambda fit: fit.share))


def closing_of(opening: str) -> str:
    """Return the tag that closes what another opens."""
    if opening.startswith("<|"):
        return opening.replace("begin_of", "end_of").replace("start", "end")
    return f"{opening[0]}/{opening[1:]}"


def _tags(texts: Sequence[str]) -> str | None:
    """Make a rule of the tags that most texts are written in, if `think_tags` doesn't know them."""
    found: Counter[tuple[str, str | None]] = Counter()
    for text in texts:
        match = OPENING.match(text)
        if match is None:
            continue
        _, closed, rest = text[match.end() :].partition(closing_of(match[1]))
        second = OPENING.match(rest)
        if second is not None and not rest.rstrip().endswith(closing_of(second[1])):
            second = None
        if closed and closing_of(match[1]) != match[1]:
            found[match[1], second[1] if second else None] += 1
    if not found:
        return None
    (opening, inner), _ = found.most_common(1)[0]
    if (opening, inner) == ("<think>", None):
        return None
    ends = (opening, closing_of(opening), inner or "", closing_of(inner) if inner else "")
    first, last, answer_first, answer_last = map(re.escape, ends)
    before, after = (rf"{answer_first}\s*", rf"{answer_last}\s*") if inner else ("", "")
    return (
        rf"\A\s*{first}\s*(?P<thinking>.*?)\s*{last}\s*{before}"
        rf"(?P<answer>.*?)\s*{after}\Z"
    )


def _fit(name: str, texts: Sequence[str], explicit: bool) -> Fit:
    rule = make_rule(name)
    odd = {}
    for place, text in enumerate(texts):
        parts = rule(text)
        reason = parts if isinstance(parts, str) else _oddity(name, text, *parts)
        if reason:
            odd[place] = reason
    return Fit(name, len(texts), odd, explicit)


def _oddity(name: str, text: str, thinking: str, answer: str) -> str | None:
    """Say what speaks against a split, if anything does."""
    if not answer.strip():
        return "no answer is left"
    if not thinking.strip():
        return EMPTY
    if HAS_TAG.search(answer) or HAS_TAG.search(thinking):
        return "tags stand inside a part"
    if name == "hash_marks" and "\n" in answer:
        return "the last `####` is a heading"
    if name in PHRASES and BOX.search(answer):
        return "the answer is a box"
    if name in PHRASES and "**" in answer:
        return "a part of the answer is bold"
    if name == "boxed":
        last = text.rindex(r"\boxed{")
        if text[max(text.rfind("\n", 0, last), 0) : last].count(r"\boxed{"):
            return "its last line has several boxes"
        if not BEHIND_BOX.match(text[last:].partition(answer)[2]):
            return "text stands behind the box"
    return None
