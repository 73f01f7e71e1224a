"""Numbers: how they are written, and which of several a text states."""

# ruff: noqa: RUF001  (characters that look like others are what is tested)

import doctest
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftkey.evaluation import numbers as module
from sftkey.evaluation.grading import grade
from sftkey.evaluation.numbers import first_number, last_number, stated_numbers


def test_doctests_hold() -> None:
    """The examples in the docstrings are true."""
    assert doctest.testmod(module).failed == 0


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
        ("1,2345", Fraction(12345, 10000)),
        ("$1,234.50", Fraction(2469, 2)),
        ("Rs.500", 500),
        ("-$5", -5),
        ("$-5", -5),
        ("−5 °C", -5),
        ("(-5)", -5),
        ("-US$5", -5),
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


def test_first_number_reads() -> None:
    """The first number of a text counts, with its sign; none where there is none."""
    number = first_number("from -1,200 to 7")
    assert number is not None
    assert number.value == -1200
    assert first_number("none") is None


@pytest.mark.parametrize(
    ("text", "values"),
    [
        # Powers are read whole, and superscripts are no digits.
        ("10^{15}", [10**15]),
        ("10⁴", [10000]),
        ("3**4", [81]),
        ("4.5 × 10³", [4500]),
        ("4.5 x 10^(-2)", [Fraction(45, 1000)]),
        ("4.5 x 10^8 m/s", [450_000_000]),
        ("٤٫٥٪", [Fraction(9, 2)]),
        ("8\\,\\mu m", [8]),
        ("8E-2", [Fraction(2, 25)]),
        ("5!", [120]),
        ("\\sqrt{49}", [7]),
        # A sign may stand before a blank, a currency, or be a word.
        ("- 8", [-8]),
        ("- $8.50", [Fraction(-17, 2)]),
        ("minus 8", [-8]),
        ("-US$8", [-8]),
        ("-₩8", [-8]),
        ("HK$ 8", [8]),
        ("the change is -8 degrees", [-8]),
        # Decimal commas, and the separators of thousands of several countries.
        ("2,75", [Fraction(11, 4)]),
        ("2.345,75", [Fraction(234575, 100)]),
        ("2.345.678", [2345678]),
        ("2.345", [Fraction(2345, 1000)]),
        ("2,345", [2345]),
        ("0,345", [Fraction(345, 1000)]),
        ("23 456 789", [2345_6789]),
        ("2'345.5", [Fraction(23455, 10)]),
        ("45,67,890", [4567890]),
        # Words and scales.
        ("nineteen", [19]),
        ("Sixty-four", [64]),
        ("two thousand three hundred and five", [2305]),
        ("two and a half", [Fraction(5, 2)]),
        ("two thirds", [Fraction(2, 3)]),
        ("one-sixth of it", [Fraction(1, 6)]),
        ("one and one quarter", [Fraction(5, 4)]),
        ("forty-third", [43]),
        ("3 millions", [3_000_000]),
        ("4 dozen", [48]),
        ("7.2 million", [7200000]),
        ("9k", [9000]),
        ("$7.2 Million", [7200000]),
        ("3 BILLION", [3 * 10**9]),
        ("3 lakhs", [300000]),
        ("4 Dozens", [48]),
        ("half a dozen", [6]),
        # What a sentence says of its numbers.
        ("30, because 18 + 12", [30]),
        ("18 + 12 = 30", [30]),
        ("30 = 18 + 12", [30]),
        ("18 plus 12 is 30", [30]),
        ("18 + 12", None),
        ("30 (18 plus 12)", [30]),
        ("18 + 12\n= 30", [30]),
        ("30, not 31", [30]),
        ("30 - not 31", [30]),
        ("30 a day", [30]),
        ("30 K", [30]),
        ("not 31 but 30", [30]),
        ("30 instead of 31", [30]),
        ("not 31", None),
        ("30 legs on 6 ants", [30]),
        ("In 2019 it had 30 rooms", [30]),
        ("6 ants. 30 legs", [6]),
        ("There are 6 ants. They have 30 legs.", None),
        ("6 feet 2 inches", None),
        ("6 ants have 30 legs", None),
        ("30. Check: 5 * 6 = 30", [30]),
        ("18+12=<<18+12=30>>30", [30]),
        ("it can't be 31", None),
        ("31 is wrong; it is 30", [30]),
        ("30, which is 1 less than 31", [30]),
        ("30 apples, 4 of which are red", [30]),
        ("31? No, 30.", [30]),
        ("30? 31? Who knows", None),
        ("What is 18 + 12? 30", [30]),
        ("18 and 12 make 30", [30]),
        ("Since 18 + 12 = 30, it has 30.", [30]),
        ("It doesn't have 30", None),
        ("30 isn't right", None),
        ("30 isn’t right", None),
        ("half of 30", None),
        ("Step 3: 18 + 12", None),
        ("f(3)", None),
        ("一共30元", [30]),
        ("1. Add 18\n2. The sum is 30", None),
        ("(a) 30", [30]),
        # Several numbers.
        ("3 and 4", [3, 4]),
        ("x = 3, y = 4", [3, 4]),
        ("x_1 = 3 or x_2 = 4", [3, 4]),
        ("Tom is 3 and Jane is 4", [3, 4]),
        ("between 3 and 4", [3, 4]),
        ("3\n4", None),
        ("3 (or 4)", None),
        ("3; or 4", None),
        ("3. Alternatively 4", None),
        ("3\nor 4", None),
        ("[3,4]", [3, 4]),
        ("\\{3,4\\}", [3, 4]),
        ("(1.5,-2.5)", [Fraction(3, 2), Fraction(-5, 2)]),
        ("6, 7, and 8", [6, 7, 8]),
        ("12–15", [12, 15]),
        ("from 12 to 15", None),
        ("8:45 pm", [8, 45]),
        ("2022-11-03", [2022, 11, 3]),
        ("November 3, 2022", [2022, 11, 3]),
        ("3rd November 2022", [2022, 11, 3]),
        ("2022/11/03", [2022, 11, 3]),
        ("Nov. 3, 2022", [2022, 11, 3]),
        ("3 Sept 2022", [2022, 9, 3]),
        ("It is on November 3.", [11, 3]),
        ("the 3rd of November", [11, 3]),
        ("In May 3 dogs came", [3]),
        ("3 or 4", [3, 4]),
        # No value.
        ("4x", None),
        ("4π", None),
        ("x + 4", None),
        ("\\sqrt{3}", None),
        ("±4", None),
        ("> 4", None),
        ("at most 4", None),
        ("over 4", None),
        ("4 or more", None),
        ("4/5/6", None),
        ("4‰", None),
        ("version 1.2.3", None),
        ("1.2,3,4", None),
        ("1,2.3", None),
        ("9^99999", None),
        ("1e-99999", None),
        ("2000!", None),
        ("no idea", None),
    ],
)
def test_a_text_states_its_numbers_or_none(text: str, values: list[Fraction] | None) -> None:
    """One number, several that belong together, or nothing where the text leaves a choice."""
    stated = stated_numbers(text)
    assert (stated and [number.value for number in stated.numbers]) == values


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("42.0", "42", True),
        ("42.1", "42", False),
        ("43", "42", False),
        ("16 legs", "16", True),
        *[(text, "120", False) for text in ("120万", "120 Mio.", "120 млн", "120억 원", "-(120)")],
        *[(text, "3000", True) for text in ("3千", "3 Tausend", "3 тысяч", "3 тыс.", "0.3万円")],
        ("x = -(120)", "-120", True),
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
        ("fourteen", "14", True),
        ("10^{200}", "10^{20}", False),
        ("9, 4", "4 and 9", True),
        ("(9, 4)", "(4, 9)", False),
        ("(4,9)", "(4, 9)", True),
        ("3,2,1", "1, 2, 3", True),
        ("(3,2,1)", "(1,2,3)", False),
        ("6.1 x 10<sup>2</sup> m<sup>2</sup>", "610", True),
        ("4 to 9", "4-9", True),
        ("4", "4-9", False),
        ("4-9", "9", False),
        ("9:40", "9:15", False),
        ("9:40 a.m.", "9:40 PM", False),
        ("9:40 a.m.", "9:40 AM", True),
        ("9:40 a.m.", "9:40", True),
        ("9 am", "9 pm", False),
        ("May 2, 2011", "June 2, 2011", False),
        ("May 2", "June 2", False),
        ("May 2nd", "2 May", True),
        ("Result: 61\nI am 90% sure.", "61", True),
        ("I had 60. No, wait: 61", "61", True),
        ("I had 60. No, wait: 61", "60", False),
        ("\\boxed{61}, that is 60 + 1", "61", True),
        ("\\boxed{\\frac{61}{2}}", "30.5", True),
        ("5 boys and 56 girls, so 61 children", "61", True),
        ("61<|eot_id|>", "61", True),
        ("61</Answer>", "61", True),
        ("60 or 61", "61", False),
        ("I said 60, but I meant 61", "61", True),
        ("60. Actually 61", "61", True),
        ("60... no, 61", "61", True),
        ("Answer => 61", "61", True),
        ("<b>61</b>", "61", True),
        ("61 \\\\", "61", True),
        ("$60 each, so $61 in total.", "61", True),
        ("~~60~~ 61", "61", True),
        ("<answer>61", "61", True),
        ("$\\displaystyle\\frac{61}{2}$", "30.5", True),
        ("x = 60, y = 61", "61", False),
        ("y = 61, x = 60", "60, 61", False),
        ("61 - 21 = 40; 40 / 2 = 20", "20", True),
        ("61 - 21 = 40; 40 / 2 = 20", "40", False),
        ("Ann sells 61 eggs for $2 each, earning $122.", "122", True),
        ("sixty-one!", "61", True),
        ("61 at most", "61", False),
        ("7 boxes of 3 eggs, 21 in total", "21", True),
        ("7 boxes of 3 eggs, 21 in total", "7", False),
        ("0.25 or 25%", "1/4", True),
        ("...61", "61", True),
        ("8" * 200, "8" * 200, True),
        ("8" * 200, "8" * 201, False),
        ("8" * 4500, "8", False),
    ],
)
def test_number_compares(answer: str, reference: str, right: bool) -> None:
    """Whole numbers and fractions are compared exactly, decimals within a millionth."""
    assert grade(answer, reference, "number").right is right


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
