"""What holds of every grader: what it returns, what it can't read, and how long it takes."""

# ruff: noqa: RUF001  (a minus sign that looks like a hyphen)

import doctest
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftkey.evaluation import grading as module
from sftkey.evaluation.grading import Grade, grade, unreadable
from tests.support.timing import takes_linear_time

GRADERS = ["number", "choice", "exact", "math"]


def test_doctests_hold() -> None:
    """The examples in the docstrings are true."""
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("grader", "answer", "reference", "read"),
    [
        ("number", "It is -$7 (minus seven).", "-7", "-7"),
        ("number", "3 to 4", "3-4", "3, 4"),
        ("number", "7 or so, or 8", "7", None),
        ("choice", "(c), not (a)", "C", "C"),
        ("choice", "Yes, it is.", "yes", "yes, it is"),
        ("choice", "A or B", "A", None),
        ("exact", "The answer is **Rome**.", "Rome", "rome"),
        ("exact", "*", "Rome", "*"),
        ("exact", "", "Rome", None),
        ("math", "it is \\boxed{\\frac12}", "0.5", "$\\frac12$"),
    ],
)
def test_a_grade_says_what_was_read(
    grader: str, answer: str, reference: str, read: str | None
) -> None:
    """The reading stands beside the verdict; None where the grader could read nothing."""
    assert grade(answer, reference, grader).read == read


def test_a_grade_is_true_where_the_answer_is_right() -> None:
    """A condition on a grade is one on its verdict."""
    assert Grade(True, "7")
    assert not Grade(False, "7")


@pytest.mark.parametrize("grader", GRADERS)
def test_no_answer_is_wrong(grader: str) -> None:
    """A text without an answer is wrong for each grader, and nothing was read."""
    assert grade(None, "5", grader) == Grade(False, None)


@pytest.mark.parametrize("grader", GRADERS[:3])
@given(
    text=st.text(st.sampled_from("0123456789 .,-+*/^%$\\{}()[]'!?:=aBxI\n½²−√"))
    | st.lists(st.sampled_from(["not ", "and ", "or ", "A", "\\boxed{", "7", "one ", "is "])).map(
        "".join
    )
)
def test_no_text_is_an_error(grader: str, text: str) -> None:
    """A grader reads any text, or doesn't, as an answer and as a reference."""
    grade(text, text, grader)
    assert not grade(text, "no such answer 987654", grader)


PIECES = [
    *["9", "1,", "1.", "1 ", "1/", "1:", "5 to ", "1 apples, ", "one-", "twenty ", "10^", "1!"],
    *[" ", "\n", "x", "_", "*", "**", "$", "\\", "{", "}", "(", "(A", "[", "<", "<<", "-", "'"],
    *["\\boxed{", "\\frac{", "√(", "^{", "A and ", "(A) or ", "Option ", "not ", "so ", "the a"],
    *["answer: ", "answer for a ", "####", "wait, ", "</a", "<|", "."],
]


@pytest.mark.parametrize("grader", GRADERS)
@pytest.mark.parametrize("form", ["{}", "7 {} 7", "\\boxed{{{}}}"])
@pytest.mark.fault("texts that take long to read")
def test_grading_takes_linear_time(grader: str, form: str) -> None:
    """Four times the length takes four times as long, whatever a model repeats."""

    def graded(length: int, piece: str) -> Grade:
        return grade(form.format(piece * (length // len(piece))), "17", grader)

    for piece in PIECES:
        assert takes_linear_time(partial(graded, piece=piece), length=2_000), piece
        assert not graded(4_000, piece)


@pytest.mark.fault("texts that take long to read")
def test_a_word_without_an_end_takes_linear_time() -> None:
    """A model may repeat a letter up to its last token."""
    assert takes_linear_time(lambda length: grade("x" * length, "yes", "choice"), length=6_000)


def test_an_unknown_grader_is_refused() -> None:
    """A grader that a recipe can't name is a mistake of the caller."""
    with pytest.raises(ValueError, match=r"^grader: expected number, .* or math; got 'judge'$"):
        grade("5", "5", "judge")


def test_references_that_a_grader_cannot_read_are_found() -> None:
    """Otherwise every answer to these questions would silently count as wrong."""
    assert unreadable({0: "5", 1: "\\frac{1}{2}"}, "number") == []
    assert unreadable({0: "B", 1: "yes"}, "choice") == []
    assert unreadable({0: "x^2"}, "math") == []
    assert unreadable({0: "5", 3: "Paris", 7: ""}, "number") == [3, 7]
    assert unreadable({0: "", 1: "x"}, "exact") == [0]
