"""Choices: which option an answer names, by its label or by its text."""

# ruff: noqa: RUF001  (dashes and letters as models write them)

import pytest

from sftkey.evaluation.grading import grade


@pytest.mark.parametrize(
    "answer",
    [
        *["B", "b", "(B)", "[B]", "<B>", "{B}", "B.", "b)", "B,", "“B”", "B!", "Ｂ", "B\n"],
        *["B) Paris", "B: Paris", "B - Paris", "B – Paris", "(B) Paris.", "B Paris", "B\nIt is."],
        *["**B**", "**B.** Paris", "\\boxed{B}", "$\\boxed{\\text{B}}$", "\\boxed B", "\\(B\\)"],
        *["\\boxed{\\textbf{(B)}\\ Paris}", "\\boxed{B}, since (A) is in Spain", "\\text{B}"],
        *["Option B", "choice (B)", "B is right", "B because A is in Spain", "B, not A", "B 👍"],
        *["The answer is (B).", "the correct choice is B", "Answer → B", "ans: b", "### Answer\nB"],
        *["So, the answer is: **B**.", "The answer would be B, as A is in Spain.", "It must be B"],
        *["I choose (B), since it fits.", "I would take B - it fits.", "It is (b)", "Hence B"],
        *["Not A but B", "A is wrong, so B", "(A) cannot be, (B) can", "A. No, wait: B"],
        *[
            "B) is better than (A)",
            "First A looks good, but the answer is B",
            "B only",
            "A... no, B",
        ],
        *["(A), (C) and (D) are all wrong; (B) is right", "选项B", "정답은 B입니다", "正解はBです"],
        *[
            "Antwort: B",
            "La réponse est B",
            "La respuesta es (B)",
            "答案：B",
            "答案是B。",
            "Ответ: B",
            "故选：B",
        ],
        *["A? No. B.", "I would pick B over A", "A is too small, C too big; B"],
        *["A: incorrect\nB: correct", "A (wrong), B (right)", "(B) A, C and D"],
        *["b is right", "b - Paris", "- B"],
        *["B</Answer>", "B<|im_end|>", "<answer>B", "~~A~~ B", "A... Actually B"],
    ],
)
def test_choice_reads_a_letter(answer: str) -> None:
    """Every usual way to name option B is right for B and wrong for A."""
    assert grade(answer, "B", "choice").read == "B"
    assert grade(answer, "B", "choice")
    assert grade(answer, "(B) Paris", "choice")
    assert not grade(answer, "A", "choice")


@pytest.mark.parametrize(
    "answer",
    [
        *["A dog", "I think so", "A or B", "(A) or (B)", "A/B", "either A or else B", "not A"],
        *["It isn't A", "None", "", "A is wrong", "neither A nor B", "maybe (A), maybe (B)"],
        *["A?", "A? Or B?", "the letter after A", "before B"],
        *["A) is wrong", "A must be false", "everything but A", "anything but A", "A\n\nB"],
        *[
            "A seems right, but B",
            "A and/or B",
            "A > B",
            "A (or B)",
            "A. Or B.",
            "A; alternatively B",
            "A - or B",
            "A) Rome\nB) Paris\nC) Bonn",
            "A, maybe B",
            "A-Day",
            "A’s",
            "°A",
        ],
        "A and B are both wrong",
    ],
)
def test_choice_reads_no_letter_where_none_or_two_are_named(answer: str) -> None:
    """A word isn't a letter, and of two letters none is taken."""
    for reference in "ABI":
        assert grade(answer, reference, "choice").read is None
        assert not grade(answer, reference, "choice")


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("True", "true", True),
        ("The answer is true.", "true", True),
        ("True, because it rained.", "true", True),
        ("The claim is true", "true", True),
        ("This claim is true", "true", True),
        ("It is not true.", "true", False),
        ("It is not true.", "false", False),
        ("True or false", "true", False),
        ("True that it is false", "true", False),
        ("Label: true", "true", True),
        ("Yes.", "yes", True),
        ("Yes it did", "yes", True),
        ("Yes - it rained", "yes", True),
        ("Yes\nIt rained.", "yes", True),
        ("No, it did not", "no", True),
        ("yes", "no", False),
        ("Yes and no", "yes", False),
        ("Yes.\n\nNo wait, no.", "no", True),
        ("It's false, since 2 < 3", "false", True),
        ("yes, and no", "yes", False),
        ("No. Yes is wrong.", "yes", False),
        ("Yes\nNo", "yes", False),
        ("Paris", "B) Paris", True),
        ("B) Paris", "Paris", True),
        ("Paris, in France", "Paris", True),
        ("It is Paris.", "Paris", True),
        ("not Paris", "Paris", False),
        ("Parisian", "Paris", False),
        ("A) Paris", "B) Paris", False),
        ("Paris", "B", False),
        ("neutral", "entailment", False),
        ("not neutral", "neutral", False),
        ("Not neutral.", "not neutral", True),
        ("(2)", "2", True),
        ("2. a dog", "2", True),
        ("Option 3", "2", False),
        ("-1", "1", False),
        ("1", "true", False),
        ("D. Both A and B", "D", True),
        ("D. Both A and B", "A", False),
        ("B and C", "B", False),
        ("B and C", "C, B", True),
        ("BC", "B, C", True),
        ("B C", "B, C", True),
        ("B+", "B", False),
        ("B, C", "BC", True),
        ("b, c", "B", False),
        ("b and c", "B, C", True),
        ("B + C", "B, C", True),
        ("B、C", "BC", True),
        ("B as well as C", "B, C", True),
        ("The right options are:\nB) Paris\nC) Rome", "B, C", True),
        ("- B\n- C", "B, C", True),
        ("- B\n- D", "B, C", False),
        ("B, C", "['B', 'C']", True),
        ("B, C", "B|C", True),
        ("B, C", "B and C only", True),
        *[("(B) Paris", form, True) for form in ("(b)", "b)", "b) Paris", "(b) Rome", "B - Paris")],
        *[("B", form, True) for form in ("Option B", "option (b)", "Answer: B", "\\boxed{B}")],
        ("c", "(b)", False),
        ("Option B: Paris", "Paris", True),
        ("Option 3: 25 dogs", "3", True),
        ("Option 3 or option 4", "3", False),
        ("I think yes", "yes", True),
        ("Well, no", "yes", False),
        ("No he can't", "no", True),
        ("No one", "no", False),
        ("Statement: true", "true", True),
        ("Overall, the sentiment is positive.", "positive", True),
        ("B", "B, C", False),
        ("R", "R", True),
        ("(R)", "R", True),
        ("✅ Yes", "yes", True),
        ("Sentiment: positive", "positive", True),
        ("Sentiment: not positive", "positive", False),
        ("\\boxed{A} \\boxed{B}", "B", False),
        ("While A is plausible, B is the best answer.", "B", True),
        ("The patient lacks vitamin B.", "B", False),
        ("Type A blood", "A", False),
        ("", "yes", False),
        ("", "", False),
    ],
)
def test_choice_compares(answer: str, reference: str, right: bool) -> None:
    """Labels count where the reference has one, else texts; an ambiguous answer is wrong."""
    assert grade(answer, reference, "choice").right is right
