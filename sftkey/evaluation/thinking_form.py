"""Is there a thinking at all: valid, empty, truncated or missing, and what of it a stage lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict

from sftkey.data.response import Parsed, Response
from sftkey.evaluation.conversations import (
    difference_with_interval,
    one_sided_p,
    share_interval,
    two_sided_p,
)
from sftkey.evaluation.statistics import discordant
from sftkey.tables import FittedTable

Form = Literal["valid", "empty", "truncated", "missing"]
PASSED = "right and valid"
RATES = {"valid": "VR", "empty": "ER", "truncated": "TR", "missing": "MR", PASSED: "Rpass@1"}


def thinking_form(text: str, found: Parsed, response: Response) -> Form:
    """Tell which of four forms the thinking of a generated text has; each text has one.

    They are those of ThinkPack (arXiv 2605.21127), whose rates are VR, ER, TR and MR:

    - `valid`: it was closed, and holds more than white space.
    - `empty`: it was closed, and holds nothing else.
    - `truncated`: it was opened and never closed, whether the model ran out of tokens or ended.
      With a format whose opening tag the prompt holds, every thinking that isn't closed is.
    - `missing`: neither tag stands in the text. In a format without tags: no end was found.

    Rpass@1 is the share of answers that are right and stand behind a valid thinking.

    Args:
        text: As the model wrote it.
        found: What the response's tags find in it.
        response: These tags.

    >>> response = Response("<think>", "</think>", "", "")
    >>> texts = ["<think>so</think>4", "<think> </think>4", "<think>so 4", "4"]
    >>> [thinking_form(text, response.parse(text), response) for text in texts]
    ['valid', 'empty', 'truncated', 'missing']
    """
    if found.thinking is not None:
        return "valid" if found.thinking.strip() else "empty"
    opening, closing = response.thinking_open.strip(), response.thinking_close.strip()
    opened = opening in text if opening else bool(closing)
    return "truncated" if opened else "missing"


class Formed(Protocol):
    """A question's flags; the form is None in results that were written without."""

    @property
    def index(self) -> int:
        """The row."""

    @property
    def correct(self) -> bool:
        """Whether the answer is right."""

    @property
    def form(self) -> Form | None:
        """The thinking's."""


class Rate(BaseModel):
    """A share of questions with its 95% interval."""

    model_config = ConfigDict(frozen=True)

    rate: float
    interval: tuple[float, float]

    def text(self, line_end: str = " ") -> str:
        """Return both, as tables show them."""
        return f"{self.rate:.3f}{line_end}[{self.interval[0]:.3f}, {self.interval[1]:.3f}]"


def form_flags(questions: Sequence[Formed]) -> dict[str, list[bool]]:
    """Return a flag a question for each rate; nothing where a form isn't known."""
    if any(question.form is None for question in questions):
        return {}
    flags = {name: [each.form == name for each in questions] for name in get_args(Form)}
    return flags | {PASSED: [each.correct and each.form == "valid" for each in questions]}


def form_rates(questions: Sequence[Formed]) -> dict[str, Rate] | None:
    """Return the rates of forms and of right answers behind a valid thinking, by name."""
    rows = [question.index for question in questions]
    return {
        name: Rate(rate=sum(flags) / len(flags), interval=share_interval(flags, rows))
        for name, flags in form_flags(questions).items()
    } or None


@dataclass(frozen=True)
class ValidChange:
    """How many thinkings were valid in two stages, question by question.

    `p` is McNemar's, one-sided: how likely chance alone loses so many more than it gains.
    """

    num_before: int
    num_after: int
    num_lost: int
    num_gained: int
    p: float

    def text(self) -> str:
        """Say it in words."""
        fell = f"valid thinkings went from {self.num_before} to {self.num_after}"
        return f"{fell} ({self.num_lost} lost, {self.num_gained} gained, one-sided {self.p_text()})"

    def p_text(self) -> str:
        """Return p, as short as it may be."""
        return "p<0.001" if self.p < 0.001 else f"p {self.p:.3f}"


def valid_change(pairs: Iterable[tuple[Formed, Formed]]) -> ValidChange | None:
    """Pair the forms of two stages on the same questions; None where one isn't known."""
    pairs = list(pairs)
    if not pairs or any(old.form is None or new.form is None for old, new in pairs):
        return None
    before, after = ([each[side].form == "valid" for each in pairs] for side in (0, 1))
    gained, lost = discordant(before, after)
    p = one_sided_p(before, after, [old.index for old, _ in pairs])
    return ValidChange(sum(before), sum(after), lost, gained, p)


@dataclass(frozen=True)
class PassedChange:
    """How much more of the same questions a stage answers right behind a valid thinking.

    `difference` and its 95% interval are shares of the questions; `p` is two-sided, like that of
    the right answers.
    """

    difference: float
    interval: tuple[float, float]
    p: float

    def text(self) -> str:
        """Say it in points."""
        p = "p<0.001" if self.p < 0.001 else f"p {self.p:.3f}"
        low, high = (100 * end for end in self.interval)
        return f"{100 * self.difference:+.1f} points [{low:+.1f}, {high:+.1f}], {p}"


def passed_change(pairs: Iterable[tuple[Formed, Formed]]) -> PassedChange | None:
    """Pair the answers that are right behind a valid thinking; None where a form isn't known."""
    pairs = list(pairs)
    if not pairs:
        return None
    flags = [form_flags([each[side] for each in pairs]).get(PASSED) for side in (0, 1)]
    if flags[0] is None or flags[1] is None:
        return None
    rows = [old.index for old, _ in pairs]
    difference, low, high = difference_with_interval(flags[0], flags[1], rows)
    return PassedChange(difference, (low, high), two_sided_p(flags[0], flags[1], rows))


def form_table(
    rows: Iterable[tuple[str, Mapping[str, Rate] | None, ValidChange | None]],
) -> FittedTable | None:
    """Return the table of the forms, a row for each stage that has them; None without any."""
    known = [(name, rates, change) for name, rates, change in rows if rates]
    if not known:
        return None
    headers = ["valid VR\n[95%]", "empty\nER", "truncated\nTR", "missing\nMR"]
    headers += ["Rpass@1\n[95%]", "lost, gained\nvalid, p"]
    grid = FittedTable("thinking\nafter", headers)
    for name, rates, change in known:
        cells = [rates["valid"].text("\n")]
        cells += [f"{rates[form].rate:.3f}" for form in ("empty", "truncated", "missing")]
        lost = f"{change.num_lost}, {change.num_gained}\n{change.p_text()}" if change else ""
        grid.add([name, *cells, rates[PASSED].text("\n"), lost])
    return grid
