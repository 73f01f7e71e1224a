"""Numbers as people write them, read as exact fractions."""

# ruff: noqa: RUF001  (minus, times and fraction signs as models write them)

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 100  # a model that repeats itself writes thousands; no answer is that long
TOLERANCE = Fraction(1, 10**6)  # relative, where one side is a rounded decimal

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"""
    (?:(?<![\w)\]%])(?P<sign>[+-])(?:[$€£¥₹]\s?)?)?    # 10-5 is a difference, (-5) and -$5 aren't
    (?<![\w^])                                         # no part of a name such as CO2
    (?:
      (?:(?P<mixed>{_WHOLE})\s+)?                      # 1 3/4
      (?<!/)(?P<above>{_WHOLE})\s*/\s*(?P<below>{_WHOLE})(?![\d/])
    | (?P<decimal>{_WHOLE}(?:\.\d+)?|(?<!\w\.)\.\d+)
      (?:[eE](?P<power>[+-]?\d{{1,3}})(?!\w)|\^\s*\{{?(?P<raised>-?\d{{1,2}})\}}?)?
    )
    (?P<percent>\s*(?:%|percent\b|per\ cent\b))?
    """,
    re.VERBOSE,
)


class Number(NamedTuple):
    """A number that stood in a text; `rounded` if it was written with decimals."""

    value: Fraction
    rounded: bool
    percent: bool


def last_number(text: str) -> Number | None:
    """Give the last number of a text; None without one.

    Read are signs, thousands separators, decimals after a point, powers, fractions (3/4,
    ½, LaTeX's), mixed numbers and percent; currencies and units around a number don't matter. A
    comma is never a decimal point.

    >>> last_number("The answer is $1,234.50.").value
    Fraction(2469, 2)
    """
    matches = list(_NUMBER.finditer(plain(text)))
    return _number(matches[-1]) if matches else None


def first_number(text: str) -> Number | None:
    """Give the first number of a text, read as `last_number` does; None without one."""
    match = _NUMBER.search(plain(text))
    return _number(match) if match else None


def same_number(answer: Number, reference: Number) -> bool:
    """Compare exactly, or within a millionth of the reference where one side has decimals.

    A percent sign on one side only may be there or not: 25% is as right as 25 and as 0.25.
    """
    pairs = [(answer.value, reference.value)]
    if answer.percent and not reference.percent:
        pairs.append((answer.value / 100, reference.value))
    if reference.percent and not answer.percent:
        pairs.append((answer.value, reference.value / 100))
    rounded = answer.rounded or reference.rounded
    return any(abs(a - b) <= (TOLERANCE * abs(b) if rounded else 0) for a, b in pairs)


def _number(match: re.Match[str]) -> Number | None:
    if sum(character.isdigit() for character in match[0]) > MAX_DIGITS:
        return None
    if match["decimal"]:
        value = Fraction(match["decimal"].replace(",", ""))
        raised = int(match["raised"] or 1)
        if value == 0 and raised < 0:
            return None
        value = value**raised * Fraction(10) ** int(match["power"] or 0)
    else:
        mixed, above, below = (
            int((match[name] or "0").replace(",", "")) for name in ("mixed", "above", "below")
        )
        if below == 0:
            return None
        value = mixed + Fraction(above, below)
    rounded = "." in (match["decimal"] or "")
    return Number(-value if match["sign"] == "-" else value, rounded, bool(match["percent"]))


def plain(text: str) -> str:
    """Write a text's numbers with ASCII signs, such as `1/2` for `½` and `e5` for `x 10^5`."""
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = re.sub(r"(⁻?[⁰¹²³⁴-⁹]+)", r"^\1", text)
    # Separators of thousands other than the comma; NFKC would turn most of them into blanks.
    separator = r"(?:\{,\}|,?\\[,!]|[\u00a0\u202f\u2009'’_])"
    text = re.sub(rf"(?<=\d){separator}(?=\d{{3}}(?!\d))", "", text)
    text = unicodedata.normalize("NFKC", text).translate(str.maketrans("−‐⁄", "--/"))
    text = text.replace("\\%", "%").replace("\\$", "$")
    text = re.sub(r"(?<=\d)\s*\\([dtc]?frac)", r" \\\1", text)
    text = re.sub(r"\\[dtc]?frac\s*(?:\{(-?\d+)\}\s*\{(\d+)\}|(\d)\s*(\d))", r"\1\3/\2\4", text)
    ten = r"(?<=\d)\s*(?:[x*×·]|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*\{?([+-]?\d{1,3})\}?"
    text = re.sub(ten, r"e\1", text)
    return re.sub(r"(?<=[^\W\d])\^\s*\{?-?\d+\}?", "", text)  # cm^2: no number of its own
