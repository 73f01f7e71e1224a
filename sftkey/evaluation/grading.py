"""Whether an answer is right: numbers, choices, mathematics, or the same text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from sftkey.data.response import Response
from sftkey.errors import Problem
from sftkey.evaluation.choices import same_choice
from sftkey.evaluation.formulas import same_formula
from sftkey.evaluation.numbers import Stated, same_numbers, stated_numbers
from sftkey.evaluation.statement import cleaned, concluded, normalize, stated, unwrapped

Untagged = Literal["right", "wrong", "unread"]
MAX_PROBLEMS = 20  # an error names so many rows, and counts the others


@dataclass(frozen=True)
class Grade:
    """A verdict, and what it stands on; true where the answer is right.

    Args:
        right: The answer says what the reference says.
        read: What the grader read in the answer; None where it read nothing, or found two things
            and nothing that says which of them is meant. Such an answer is wrong.
    """

    right: bool
    read: str | None

    def __bool__(self) -> bool:
        return self.right


def grade(answer: str | None, reference: str, grader: str) -> Grade:
    """Tell whether an answer is right; None, the answer of a text without one, is wrong.

    Args:
        answer: The answer's text, as `Response.parse` found it.
        reference: The data set's answer.
        grader: `number`, `choice`, `exact` or `math`.

    Raises:
        RecipeError: `math` without the package that does it.

    >>> grade("The answer is 1,200, since 3 * 400 = 1,200.", "1200", "number")
    Grade(right=True, read='1,200')
    >>> grade("3 or 4", "3", "number").right
    False
    """
    graders: dict[str, Callable[[str, str], tuple[bool, str | None]]] = {
        "number": _same_number,
        "choice": same_choice,
        "exact": _same_text,
        "math": same_formula,
    }
    if grader not in graders:
        raise ValueError(f"grader: expected number, choice, exact or math; got {grader!r}")
    if answer is None:
        return Grade(False, None)
    right, read = graders[grader](cleaned(answer), cleaned(reference))
    return Grade(right, read)


def read_untagged(text: str, reference: str, response: Response, grader: str) -> Untagged:
    """Grade a text that holds no answer's tag: all of it, or what stands behind the thinking.

    `exact` reads no more than a whole text that is the answer, so prose isn't read.

    >>> response = Response("<T>", "</T>", "<A>", "</A>")
    >>> read_untagged("3 and 4. The answer is 7.", "7", response, "number")
    'right'
    >>> read_untagged("I cannot tell.", "3", response, "number")
    'unread'
    """
    close = response.thinking_close.strip()
    found = grade(text.rpartition(close)[2] if close else text, reference, grader)
    if found.right:
        return "right"
    return "unread" if found.read is None or grader == "exact" else "wrong"


def unreadable(references: Mapping[int, str], grader: str) -> list[int]:
    """List the rows whose reference a grader can't read: every answer to them would be wrong.

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


def read_number(text: str) -> Stated | None:
    """Read the number, or the numbers, that an answer states; None where that isn't clear."""
    part = stated(cleaned(text))
    if part != text:  # behind "the answer is", the rest of its line
        part = next((line for line in part.splitlines() if re.search(r"\w", line)), "")
    conclusion = concluded(part)
    return (conclusion and stated_numbers(conclusion)) or stated_numbers(part)


def _same_number(answer: str, reference: str) -> tuple[bool, str | None]:
    written, wanted = read_number(answer), read_number(reference)
    right = written is not None and wanted is not None and same_numbers(written, wanted)
    return right, written and written.text


def _same_text(answer: str, reference: str) -> tuple[bool, str | None]:
    wanted = normalize(reference)
    forms = [normalize(answer), normalize(unwrapped(answer))]
    right = wanted != "" and wanted in forms
    return right, (wanted if right else forms[1]) or None
