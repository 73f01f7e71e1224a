"""Formulas: which forms are equal, and that none is evaluated for ever."""

# ruff: noqa: RUF001  (signs as models write them)
import sys
import threading

import pytest

from sftkey.errors import RecipeError
from sftkey.evaluation.grading import Grade, grade, same_formula


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("$x^2 + 1$", "1 + x^{2}", True),
        ("The answer is $\\frac12$.", "1/2", True),
        ("The answer is 42.", "42", True),
        ("x = 5", "5", True),
        ("ln 2", "\\ln 2", True),
        ("−½", "-\\frac{1}{2}", True),
        ("3½", "\\frac{7}{2}", True),
        ("½", "2", False),
        ("ln 3", "\\ln 2", False),
        ("(1, 2)", "(1,2)", True),
        ("\\$42", "42", True),
        ("42 euros", "42", True),
        ("They have 42 apples together.", "42", True),
        ("42 cm^2", "42", True),
        ("\\boxed{42", "42", True),
        ("\\boxed{4} and \\boxed{2}", "2, 4", True),
        ("$42$, because $40 + 2 = 42$", "42", True),
        ("3*pi/2", "\\frac{3\\pi}{2}", True),
        ("exp(3) + sqrt(5)", "e^3 + \\sqrt{5}", True),
        ("2√5 + x²", "x^2 + 2\\sqrt{5}", True),
        ("2 1/4", "2.25", True),
        ("0.1\\overline{6}", "\\frac{1}{6}", True),
        ("3 + -1.0i", "3 - i", True),
        ("4 < x < 9", "(4, 9)", True),
        ("\\varnothing", "\\emptyset", True),
        ("e^{-x^2}", "\\exp(-x^2)", True),
        ("x**2 + 1", "x^2 + 1", True),
        ("3:4", "\\frac{3}{4}", False),
        ("(4, 9)", "\\{4, 9\\}", False),
        ("[4, 9]", "(4, 9)", False),
        ("(7, 8] \\cup (4, 5)", "(4, 5) \\cup (7, 8]", True),
        ("3\\sqrt{2}", "3", False),
        ("\\frac{1}{3^{50}}", "\\frac{1}{3^{51}}", False),
        ("10^{-20}", "10^{-21}", False),
        ("(-∞, 3] ∪ [7, ∞)", "(-\\infty, 3] \\cup [7, \\infty)", True),
        ("\\frac{3 \\pm \\sqrt{7}}{2}", "x = \\frac{3 \\pm \\sqrt7}{2}", True),
        ("\\frac{3+\\sqrt{7}}{2}, \\frac{3-\\sqrt{7}}{2}", "\\frac{3 \\pm \\sqrt{7}}{2}", True),
        ("\\frac{3+\\sqrt{7}}{2}", "\\frac{3 \\pm \\sqrt{7}}{2}", False),
        ("\\frac\\pi6", "\\frac{\\pi}{6}", True),
        ("\\log_e 5", "\\ln 5", True),
        ("1\\,600", "1600", True),
        ("½ ln 7", "\\frac{\\ln 7}{2}", True),
        ("{2, 4}", "\\{4, 2\\}", True),
        ("1.6e-19", "1.6 \\times 10^{-19}", True),
        ("4:6:10", "2:3:5", True),
        ("2:5:3", "2:3:5", False),
        ("211_3", "211_4", False),
        ("211_{3}", "211_3", True),
        ("2 + 3*i", "2+3i", True),
        ("0.5 - 1.5i", "\\frac{1-3i}{2}", True),
        ("e^{i\\pi}", "-1", True),
        ("2 - 3*i", "2+3i", False),
        ("1.6 x 10^-4", "1.6 \\times 10^{-4}", True),
        ("（４，９）", "(4, 9)", True),
        ("4、9", "9, 4", True),
        ("–７", "-7", True),
        ("≈ £42", "42", True),
        ("23 456 789", "23456789", True),
        ("42π cm^2", "42\\pi", True),
        ("$4$, $7$, and $9$", "4, 7, 9", True),
        ("x < 4 or x ≥ 9", "(-\\infty, 4) \\cup [9, \\infty)", True),
        ("$x < 4$ or $x > 9$", "x<4 \\text{ or } x>9", True),
        ("x < 4 or x > 9", "(-\\infty, 4) \\cup [9, \\infty)", False),
        ("x < 4 or y > 9", "(-\\infty, 4) \\cup (9, \\infty)", False),
        ("(1, 4) U (7, 9)", "(1, 4) \\cup (7, 9)", True),
        ("all real numbers", "(-\\infty, \\infty)", True),
        ("May 21", "\\text{May 21}", True),
        ("May 21", "\\text{May 22}", False),
        ("\\sqrt{x +1}", "\\sqrt{x} +1", False),
        ("hello", "5", False),
        ("", "5", False),
        ("", "", False),
    ],
)
def test_math_compares(answer: str, reference: str, right: bool) -> None:
    """Equal forms of one value are right, with and without LaTeX's marks."""
    assert grade(answer, reference, "math").right is right


@pytest.mark.parametrize(
    "endless",
    [
        "8^{8^{8^8}}",
        "8^{8^{8}}",
        "(8^{9999})^{9999}",
        "(300000)!",
        "9999!!",
        "\\binom{90000000}{40000000}",
        "3" * 5000,
        "\\frac{1}{" * 100 + "2" + "}" * 100,
        "{" * 400,
        "x + " * 200 + "x",
    ],
)
def test_what_would_be_evaluated_for_ever_is_not_read(
    monkeypatch: pytest.MonkeyPatch, endless: str
) -> None:
    """Such a text doesn't reach math-verify, on either side; equal texts are right all the same."""
    pytest.importorskip("math_verify")
    reached: list[str] = []
    monkeypatch.setattr("math_verify.parse", lambda text, **_: reached.append(text))
    assert grade(endless, "5", "math") == Grade(False, None)
    assert not grade("5", endless, "math")
    assert grade(endless, endless, "math")
    assert reached == []


def test_whatever_math_verify_raises_is_a_text_that_it_cannot_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error in sympy, or in its parser, doesn't end an evaluation."""
    pytest.importorskip("math_verify")

    def fail(*_: object, **__: object) -> None:
        raise RecursionError

    monkeypatch.setattr("math_verify.verify", fail)
    assert grade("x + 1", "x", "math") == Grade(False, None)


def test_math_grades_in_any_thread() -> None:
    """Only the main thread can have math-verify's timeout; the others go without."""
    pytest.importorskip("math_verify")
    grades: list[Grade] = []
    thread = threading.Thread(target=lambda: grades.append(grade("1/2", "0.5", "math")))
    thread.start()
    thread.join()
    assert grades == [Grade(True, "$1/2$")]


def test_math_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra that brings math-verify."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RecipeError) as caught:
        same_formula("1", "1")
    assert str(caught.value) == (
        "eval.grader: `math` needs the package math-verify, which isn't installed\n"
        'hint: python -m pip install "sftkey[math]"'
    )
