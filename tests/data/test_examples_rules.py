"""How a response is split into thinking and answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftkey import bounds
from sftkey.data.examples import boxed, hash_marks, make_rule, think_tags
from sftkey.errors import DataError

LINES = st.text(st.characters(codec="utf-8", exclude_characters="#<>{}\\$"), min_size=1).map(
    str.strip
)
WORDS = LINES.filter(bool)


@given(thinking=LINES, answer=WORDS)
def test_every_rule_gives_back_what_was_joined(thinking: str, answer: str) -> None:
    """Thinking and answer written in a rule's own form come back as they were."""
    assert think_tags(f"<think>\n{thinking}\n</think>\n{answer}") == (thinking, answer)
    assert hash_marks(f"{thinking}\n#### {answer}") == (thinking, answer)
    assert boxed(f"{thinking} $\\boxed{{{answer}}}$.") == (thinking, answer)


@given(st.text())
def test_a_rule_gives_two_texts_or_a_reason(text: str) -> None:
    """No text makes a rule fail."""
    for rule in (think_tags, hash_marks, boxed):
        assert isinstance(rule(text), tuple | str)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 + 4 = 7.</think>7", ("3 + 4 = 7.", "7")),
        ("<think></think>7", ("", "7")),
        ("7", "no `</think>`"),
        ("<think>a</think>b</think>7", "more than one `</think>`"),
        ("<think>a<think>b</think>7", "more than one `<think>`"),
        ("First <think>a</think>7", "text before `<think>`"),
    ],
)
def test_think_tags(text: str, expected: object) -> None:
    """The tags must stand once; the opening one may have stood in the prompt."""
    assert think_tags(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            r"First \boxed{1}, so the answer is $\boxed{2}$.",
            (r"First \boxed{1}, so the answer is", "2"),
        ),
        (r"Half: \[\boxed{\frac{1}{2}}\]", ("Half:", r"\frac{1}{2}")),
        (r"A set: \boxed{\{1, 2\}}", ("A set:", r"\{1, 2\}")),
        (r"\boxed{\text{a}\\}", ("", r"\text{a}\\")),
        ("Halve.\n\n**Final Answer**\n\n\\[ \\boxed{5} \\]", ("Halve.", "5")),
        ("Halve.\nFinal answer: $\\boxed{5}$", ("Halve.", "5")),
        ("Halve.\n### Final Answer\n\nThe final answer is $\\boxed{5}$.", ("Halve.", "5")),
        ("Halve.\nSo the answer is \\boxed{5}", ("Halve.\nSo the answer is", "5")),
        ("The answer is 5.", r"no `\boxed{`"),
        (r"The answer is \boxed{\frac{1}{2}", r"a `\boxed{` that is not closed"),
    ],
)
def test_boxed(text: str, expected: object) -> None:
    """The last box counts, with its inner braces."""
    assert boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 24", ("48/2 = 24 clips.", "24")),
        ("#### Plan\nAdd them.\n#### 1,000", ("#### Plan\nAdd them.", "1,000")),
        ("Shift a << b >> c.\n####7", ("Shift a << b >> c.", "7")),
        ("It is 24.", "no line that begins with `####`"),
        ("##### 24", "no line that begins with `####`"),
        ("It is #### 24", "no line that begins with `####`"),
    ],
)
def test_hash_marks(text: str, expected: object) -> None:
    """The last marked line is the answer; calculator marks go, other angle brackets stay."""
    assert hash_marks(text) == expected


def test_an_expression_takes_its_groups_as_they_are() -> None:
    """A regular expression is searched for across lines, and nothing is stripped."""
    rule = make_rule(r"(?P<thinking>.*)\nAnswer:(?P<answer>.*)")
    assert rule("a\nb\nAnswer: 7") == ("a\nb", " 7")
    assert rule("a") == "the regular expression doesn't match"


@pytest.mark.fault("texts that take long to read")
def test_an_expression_that_takes_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first row, which might take longer than the training."""
    monkeypatch.setattr(bounds.bounded.__wrapped__, "__defaults__", (0.1, None))
    rule = make_rule(r"(?P<thinking>(a*)*)(?P<answer>b)")
    with pytest.raises(DataError) as error:
        rule("a" * 40)
    assert str(error.value) == (
        "data.split_rule: '(?P<thinking>(a*)*)(?P<answer>b)' takes more than 5 seconds on 40 "
        "characters\nhint: write it without a repeat of what repeats itself, such as (a*)*"
    )


def test_a_group_that_takes_no_part_is_a_reason() -> None:
    """An optional group that matched nothing is no empty text."""
    rule = make_rule(r"(?P<thinking>a)?(?P<answer>\d)")
    assert rule("5") == "the group thinking matched nothing"
