"""Whether an answer is right: numbers, choices, mathematics, or the same text."""

# ruff: noqa: RUF001  (minus, times and fraction signs as models write them)
# ruff: noqa: RUF001  (quotes and dashes as models write them)
from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from sftkey.errors import Problem, RecipeError

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


MAX_PROBLEMS = 20  # an error names so many rows, and counts the others


def grade(answer: str | None, reference: str, grader: str) -> bool:
    """Tell whether an answer is right; None, the answer of a text without one, is wrong.

    Args:
        answer: The answer's text, as `Response.parse` found it.
        reference: The data set's answer.
        grader: `number`, `choice`, `exact` or `math`.

    Raises:
        RecipeError: `math` without the package that does it.

    >>> grade("The answer is 1,200.", "1200", "number")
    True
    """
    if answer is None:
        return False
    if grader == "number":
        written, wanted = last_number(answer), last_number(reference)
        return written is not None and wanted is not None and same_number(written, wanted)
    if grader == "choice":
        return _same_choice(answer, reference)
    if grader == "exact":
        return _same_text(answer, reference)
    if grader == "math":
        return _same_mathematics(answer, reference)
    raise ValueError(f"grader: expected number, choice, exact or math; got {grader!r}")


def unreadable(references: Mapping[int, str], grader: str) -> list[int]:
    """Give the rows whose reference a grader can't read: every answer to them would be wrong.

    Args:
        references: The answers by the index of their row.
        grader: As in `grade`.

    Raises:
        RecipeError: `math` without the package that does it.
    """
    return [row for row, text in references.items() if not grade(text, text, grader)]


def shortened(problems: list[Problem]) -> list[Problem]:
    """Keep the first problems and count the others."""
    left = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], *([Problem("", f"and {left} more")] if left > 0 else [])]


def normalize(text: str) -> str:
    """Give a text without what `exact` overlooks.

    That is: the form of characters (NFKC), upper and lower case, repeated white space, quotes and
    Markdown's marks around the text, and `.,;:!?` at its end. Articles and inner punctuation
    count.

    >>> normalize("  **New   York.** ")
    'new york'
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    marks = "\"'`*_“”‘’«» "
    return " ".join(text.split()).lstrip(marks).rstrip(marks + ".,;:!?")


def _same_text(answer: str, reference: str) -> bool:
    return normalize(answer) == normalize(reference) != ""


class _Choice(NamedTuple):
    letter: str | None
    text: str


_ANSWER_IS = re.compile(
    r"^(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+)?(?:final\s+|correct\s+|right\s+|best\s+)?"
    r"(?:answer|option|choice)\b(?:\s+is\b)?\s*:?\s*",
    re.IGNORECASE,
)
_WRAPPED = re.compile(r"^\\(?:boxed|text|textbf|mathrm)\s*\{(.*)\}\.?$", re.S)
_LETTER = re.compile(r"^[(\[{]?([A-Ja-j])(?:[)\]}][.:]?|[.:](?=\s|$)|\s+[-–—](?=\s)|$)(.*)$", re.S)


def _same_choice(answer: str, reference: str) -> bool:
    """Compare the letters where both sides name one, else the texts.

    `(B)`, `B.`, `b) text`, `Option B` and `The answer is (B).` name the letter B; a text counts
    if it is the reference's, or opens with it and a stop (`True, because …`).
    """
    if _same_text(answer, reference):
        return True
    written, wanted = _choice(answer), _choice(reference)
    if written.letter and wanted.letter:
        return written.letter == wanted.letter
    opening = re.split(r"[.,;:!]\s", written.text, maxsplit=1)[0]
    return any(_same_text(text, wanted.text) for text in (written.text, opening))


def _choice(text: str) -> _Choice:
    bare = _bare(unicodedata.normalize("NFKC", text))
    letters = set(re.findall(r"\(([A-J])\)", bare))
    if match := _LETTER.match(bare):
        letters.add(match[1].upper())
        bare = match[2].strip()
    return _Choice(letters.pop() if len(letters) == 1 else None, bare)  # (A) or (B): neither


def _bare(text: str) -> str:
    r"""Take away `The answer is`, `\boxed{}` and the like around an answer, however nested."""
    marks, bare = "*$_` \n", ""
    while bare != text:
        bare = text
        text = _ANSWER_IS.sub("", text.lstrip(marks).rstrip(marks + "."))
        text = _WRAPPED.sub(r"\1", text).strip()
    return bare


def _same_mathematics(answer: str, reference: str) -> bool:
    """Compare as expressions; math-verify tells equal forms of one value."""
    try:
        from math_verify import verify
    except ImportError:
        raise RecipeError(
            "eval.grader",
            "`math` needs the package math-verify, which isn't installed",
            'python -m pip install "sftkey[math]"',
        ) from None
    return bool(verify(_expressions(reference), _expressions(answer)))


def _expressions(text: str) -> list[Any]:
    """Parse an answer; without LaTeX's own marks all of it is taken as one formula."""
    from math_verify import parse

    marked = re.search(r"\$|\\\(|\\\[|\\boxed", text)
    expressions: list[Any] = parse(text if marked else f"${_bare(text)}$")
    return expressions
