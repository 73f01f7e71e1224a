"""Graders: which ways of writing an answer are right, and which aren't."""

# ruff: noqa: RUF001  (characters that look like others are what is tested)

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftkey.errors import RecipeError
from sftkey.evaluation.grading import grade, last_number, normalize, unreadable

GRADERS = ["number", "choice", "exact", "math"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("The answer is 42.", 42),
        ("5 and then 42 apples", 42),
        ("**42**", 42),
        ("$\\boxed{42}$", 42),
        ("1,234,567", 1234567),
        ("1{,}234 and 12,\\!345", 12345),
        ("1\u00a0234", 1234),
        ("1'234", 1234),
        ("1,2,3", 3),
        ("1,2345", 2345),
        ("$1,234.50", Fraction(2469, 2)),
        ("Rs.500", 500),
        ("-$5", -5),
        ("$-5", -5),
        ("−5 °C", -5),
        ("(-5)", -5),
        ("+7", 7),
        ("10-5", 5),
        ("10 - 5", 5),
        ("x=-3", -3),
        (".5", Fraction(1, 2)),
        ("-.5", Fraction(-1, 2)),
        ("3.", 3),
        ("3/4", Fraction(3, 4)),
        ("1,200 / 4", 300),
        ("-1 3/4 cups", Fraction(-7, 4)),
        ("1½", Fraction(3, 2)),
        ("-½", Fraction(-1, 2)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("2\\dfrac{1}{2}", Fraction(5, 2)),
        ("-\\frac12", Fraction(-1, 2)),
        ("2e3", 2000),
        ("3 \\times 10^{5}", 300000),
        ("3×10⁻²", Fraction(3, 100)),
        ("2^10", 1024),
        ("12 cm^2", 12),
        ("12 m³", 12),
        ("7 g of CO2", 7),
        ("60 km/h", 60),
        ("２５", 25),
        ("12/25/2024", 2024),
        ("no number", None),
        ("", None),
        ("3/0", None),
        ("0^-1", None),
        ("9" * 5000, None),
    ],
)
def test_last_number_reads(text: str, value: Fraction | int | None) -> None:
    """The last number of a text counts, however it is written."""
    number = last_number(text)
    assert (number and number.value) == value


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("42.0", "42", True),
        ("42.1", "42", False),
        ("43", "42", False),
        ("16 legs", "16", True),
        ("3/4", "0.75", True),
        ("6/8", "3/4", True),
        ("0.3333", "1/3", False),
        ("0.3333333", "1/3", True),
        ("1000000", "1000001", False),
        ("25%", "25%", True),
        ("25%", "25", True),
        ("25%", "0.25", True),
        ("0.25", "25%", True),
        ("0.25%", "25%", False),
        ("25", "0.25", False),
        ("fourteen", "14", False),
    ],
)
def test_number_compares(answer: str, reference: str, right: bool) -> None:
    """Whole numbers and fractions are compared exactly, decimals within a millionth."""
    assert grade(answer, reference, "number") is right


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "${}", "{:,} apples", "It is {:,}."]))
def test_number_is_right_however_it_is_dressed(value: int, form: str) -> None:
    """Separators, currency and words around an integer don't change its grade."""
    assert grade(form.format(value), str(value), "number")
    assert not grade(form.format(value + 1), str(value), "number")


@given(st.fractions(-1000, 1000, max_denominator=999))
def test_number_reads_any_fraction(value: Fraction) -> None:
    """What `Fraction` writes is read as the same value."""
    number = last_number(f"so it is {value}")
    assert number is not None
    assert number.value == value


@pytest.mark.parametrize(
    "answer",
    [
        *["B", "b", "(B)", "[B]", "B.", "b)", "B) Paris", "B: Paris", "B - Paris", "(B) Paris."],
        *["**B**", "\\boxed{B}", "$\\boxed{\\text{B}}$", "Option B", "The answer is (B).", "B\n"],
        *["the correct choice is B", "So, the answer is: **B**.", "I choose (B), since it fits."],
    ],
)
def test_choice_reads_a_letter(answer: str) -> None:
    """Every usual way to name option B is right for B and wrong for A."""
    assert grade(answer, "B", "choice")
    assert grade(answer, "(B) Paris", "choice")
    assert not grade(answer, "A", "choice")


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("True", "true", True),
        ("The answer is true.", "true", True),
        ("True, because it rained.", "true", True),
        ("It is not true.", "true", False),
        ("Yes.", "yes", True),
        ("yes", "no", False),
        ("Paris", "B) Paris", True),
        ("B) Paris", "Paris", True),
        ("A) Paris", "B) Paris", False),
        ("A dog", "A", False),
        ("(A) or (B)", "A", False),
        ("B and C", "B", False),
        ("", "yes", False),
        ("", "", False),
    ],
)
def test_choice_compares(answer: str, reference: str, right: bool) -> None:
    """Letters count where both sides have one, else texts; an ambiguous answer is wrong."""
    assert grade(answer, reference, "choice") is right


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("  New   York. ", "new york", True),
        ('"New York"', "New York", True),
        ("ＮＥＷ York", "new york", True),
        ("STRASSE", "straße", True),
        ("the New York", "New York", False),
        ("-5", "5", False),
        (".5", "5", False),
        ("5%", "5", False),
        ("C#", "C", False),
        ("", "", False),
    ],
)
def test_exact_compares(answer: str, reference: str, right: bool) -> None:
    """Case, white space, quotes and final stops are overlooked, nothing else."""
    assert grade(answer, reference, "exact") is right


@given(st.text())
def test_normalize_again_changes_nothing(text: str) -> None:
    """A normalized text is its own normal form."""
    assert normalize(normalize(text)) == normalize(text)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("$x^2 + 1$", "1 + x^{2}", True),
        ("The answer is $\\frac12$.", "1/2", True),
        ("The answer is 42.", "42", True),
        ("x = 5", "5", True),
        ("(1, 2)", "(1,2)", True),
        ("3\\sqrt{2}", "3", False),
        ("hello", "5", False),
        ("", "5", False),
    ],
)
def test_math_compares(answer: str, reference: str, right: bool) -> None:
    """Equal forms of one value are right, with and without LaTeX's marks."""
    assert grade(answer, reference, "math") is right


def test_math_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra that brings math-verify."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RecipeError) as caught:
        grade("1", "1", "math")
    assert str(caught.value) == (
        "eval.grader: `math` needs the package math-verify, which isn't installed\n"
        'hint: python -m pip install "sftkey[math]"'
    )


@pytest.mark.parametrize("grader", GRADERS)
def test_no_answer_is_wrong(grader: str) -> None:
    """A text without an answer is wrong for each grader."""
    assert grade(None, "5", grader) is False


@pytest.mark.parametrize("grader", GRADERS[:3])
@pytest.mark.parametrize(
    "piece", ["9", "1,", "1 ", "1/", " ", "*", "$", "\\boxed{", "(A", "^{", "-"]
)
def test_a_model_that_repeats_itself_is_graded_at_once(grader: str, piece: str) -> None:
    """No pattern takes more than linear time on a degenerate answer."""
    assert not grade(piece * 20_000, "17", grader)


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


def test_grading_needs_no_torch() -> None:
    """`compare` starts in no time: nothing of the evaluation imports torch or transformers."""
    modules = "grading, statistics, results, comparison"
    code = (
        f"import sys\nfrom sftkey.evaluation import {modules}\n"
        "assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
