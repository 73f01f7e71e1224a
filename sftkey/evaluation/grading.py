"""Is an answer right? One function for each grader that a recipe may name; none needs a model."""

# ruff: noqa: RUF001  (quotes and dashes as models write them)

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

from sftkey.errors import Problem, RecipeError
from sftkey.evaluation.numbers import last_number, same_number

MAX_PROBLEMS = 20  # an error names so many rows, and counts the others


def grade(answer: str | None, reference: str, grader: str) -> bool:
    """Tell whether an answer is right; None, the answer of a text without one, is wrong.

    Args:
        answer: The answer's text, as `Response.parse` found it.
        reference: The data set's answer.
        grader: `number`, `choice`, `exact` or `math`.

    Raises:
        RecipeError: `math` without the package that does it.
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
