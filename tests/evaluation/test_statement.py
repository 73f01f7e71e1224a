"""The part of a text that is its answer, and what two equal texts may differ in."""

# ruff: noqa: RUF001  (characters that look like others are what is tested)

import doctest

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sftkey.evaluation import statement as module
from sftkey.evaluation.grading import grade
from sftkey.evaluation.statement import concluded, normalize, stated


def test_doctests_hold() -> None:
    """The examples in the docstrings are true."""
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7 apples", "7 apples"),
        ("The answer is 7", "7"),
        ("my answer: 7", "7"),
        ("#### 7", "7"),
        ("## Answer\n7", "7"),
        ("The answer is 6. Sorry, the answer is 7", "7"),
        ("6. No, wait: 7", "7"),
        ("an answer", "an answer"),
        ("the answer is", "the answer is"),
        ("\\boxed{7}, and so the answer is 7.", "7"),
        ("\\boxed{6} and then \\boxed{7}", "7"),
        ("\\boxed{6} and \\boxed{7}", "6 and 7"),
        ("\\boxed{6}, $\\boxed{7}$", "6 , 7"),
        ("\\boxed{\\boxed{7}}", "\\boxed{7}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\frac{1}{2}", "\\frac{1}{2}"),
        ("$\\boxed 7$", "7"),
    ],
)
def test_the_answer_is_found(text: str, answer: str) -> None:
    """Boxes come first, then the last "answer is" or correction; without them all is the answer."""
    assert stated(text) == answer


def test_a_conclusion_is_what_stands_behind_the_last_so() -> None:
    """Words that begin with `so` don't conclude."""
    assert concluded("2 dogs, so 8 legs, and therefore 8 shoes") == "8 shoes"
    assert concluded("some sofas") is None


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("  New   York. ", "new york", True),
        ('"New York"', "New York", True),
        ("**New York**", "New York", True),
        ("The answer is New York.", "New York", True),
        ("The final answer is **New York**.", "New York", True),
        ("\\boxed{\\text{New York}}", "New York", True),
        ("ＮＥＷ York", "new york", True),
        ("STRASSE", "straße", True),
        ("don’t", "don't", True),
        ("left‑hand", "left-hand", True),
        ("1914–1918", "1914-1918", True),
        ("New\u00a0York\u200b", "New York", True),
        ("「京都」", "京都。", True),
        ("½", "1/2", True),
        ("#### New York", "New York", True),
        ("_New York_", "New York", True),
        ("__New York__.", "New York", True),
        ("„New York“", "New York", True),
        ("Die Antwort ist: New York", "New York", True),
        ("答案：京都", "京都", True),
        ("정답: 교토", "교토", True),
        ("Нью-Йоркʼs", "Нью-Йорк's", True),
        ("New York", "The answer is New York.", True),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", True),
        ("\\(\\frac{1}{2}\\)", "\\frac{1}{2}", True),
        ("\\sqrt{2} x", "\\sqrt{2 x}", False),
        ("```python\nf(x, y)\n```", "f(x, y)", True),
        ("```\nf(x)\n```\nf(y)", "f(x)", False),
        ("...", "...", True),
        ("?", "?", True),
        ("the New York", "New York", False),
        ("New York, America", "New York", False),
        ("not New York", "New York", False),
        ("-5", "5", False),
        (".5", "5", False),
        ("5%", "5", False),
        ("6!", "6", False),
        ("3²", "32", False),
        ("10⁵", "105", False),
        ("C#", "C", False),
        ("B*", "B", False),
        ("*rest", "rest", False),
        ("__name__", "name", False),
        ("4'", "4", False),
        ("$5", "5", False),
        ("", "", False),
    ],
)
def test_exact_compares(answer: str, reference: str, right: bool) -> None:
    """Case, white space, forms of a character, quotes and final stops are overlooked, no more."""
    assert grade(answer, reference, "exact").right is right


@example("「 」")
@given(st.text() | st.text(st.sampled_from(" .!?*'\"$n5⁵’。「」")))
def test_normalize_again_changes_nothing(text: str) -> None:
    """A normalized text is its own normal form."""
    assert normalize(normalize(text)) == normalize(text)
