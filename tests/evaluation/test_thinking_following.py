"""Does an answer follow from the thinking before it?"""

import pytest

from sftkey.data.response import Example, Parsed
from sftkey.evaluation.results import StageResult
from sftkey.evaluation.stage import ThinkingChange, thinking_table
from sftkey.evaluation.thinking import follow_thinkings, last_named


def examples(*references: tuple[str, str]) -> list[Example]:
    """Return questions with these thinkings and answers."""
    return [Example(f"Q{n}", *texts, index=n) for n, texts in enumerate(references)]


SUMS = examples(("2 + 3 = 5", "5"), ("4 + 4 = 8, and that is all", "8"))
CLAIMS = examples(("Fish swim, so it is true.", "true"), ("No fish flies: False", "false"))
LETTERS = examples(("B has a mistake, so (A).", "A"), ("It has a crown: B", "B"))


@pytest.mark.parametrize(
    ("thinking", "answer", "follows"),
    [
        ("2 + 3 = 6", "6", True),  # wrong, and what the thinking says
        ("2 + 3 = 5", "6", False),  # against what the thinking says
        ("2 + 3 = 5, of 7", "The answer is 5.0", True),  # the last result
        ("2 + 3 = 5, of 7", "7", True),  # the last number
        ("no number", "5", False),
        ("2 + 3 = 5", "five", True),
        ("2 + 3 = 5", "5 or 6", False),
        (None, "5", None),
        ("2 + 3 = 5", None, None),
    ],
)
def test_a_number_follows_if_the_thinking_arrives_there(
    thinking: str | None, answer: str | None, follows: bool | None
) -> None:
    """The answer is compared with what was written before it, not with the reference."""
    assert follow_thinkings([Parsed(thinking, answer, True)] * 2, SUMS, "number") == [follows] * 2


@pytest.mark.parametrize(
    ("thinking", "answer", "follows"),
    [
        ("It is true.", "true", True),
        ("It is true.", "false", False),
        ("True? No, it is false.", "False", True),
        ("It is untrue.", "true", False),  # a part of a word names nothing
        ("It is true.", "fish", False),
    ],
)
def test_a_choice_follows_if_it_is_named_last(thinking: str, answer: str, follows: bool) -> None:
    """The choices are the task's answers."""
    assert follow_thinkings([Parsed(thinking, answer, True)] * 2, CLAIMS, "choice") == [follows] * 2


def test_a_letter_is_named_in_upper_case() -> None:
    """`a` is an article."""
    written = [Parsed("(B), not a", answer, True) for answer in "BA"]
    assert follow_thinkings(written, LETTERS, "choice") == [True, False]
    assert last_named("a crown", ["A", "B"]) is None
    assert last_named("so not spam", ["spam", "not spam"]) == "not spam"


@pytest.mark.parametrize(
    ("asked", "grader"),
    [
        (examples(("4 + 3 = 7\n7 - 2", "5")), "number"),  # the answer takes a step more
        (examples(("Fish swim.", "true")), "choice"),
        (examples(("", "5")), "number"),
        (SUMS, "exact"),
        (SUMS, "math"),
        (examples(*[("n = 5", "5")] * 8, *[("n = 5", "6")] * 2), "number"),  # 8 of 10
        (examples(*[(f"It is w{n}.", f"w{n}") for n in range(27)]), "choice"),  # free texts
    ],
)
def test_nothing_is_said_where_references_keep_no_rule(asked: list[Example], grader: str) -> None:
    """A rule that the references themselves don't keep tells nothing of a model."""
    written = [Parsed(example.thinking, example.answer, True) for example in asked]
    assert follow_thinkings(written, asked, grader) == [None] * len(asked)


def test_nine_of_ten_references_make_a_rule() -> None:
    """Even GSM8K has some that don't keep it."""
    asked = examples(*[("n = 5", "5")] * 9, ("n = 5", "6"))
    assert follow_thinkings([Parsed("n = 1", "1", True)] * 10, asked, "number") == [True] * 10


def test_the_table_has_a_column_where_something_is_told() -> None:
    """A result without a rule has no figure, and without any the column isn't there."""
    told = StageResult.model_construct(num_judged_following=20, num_following=18)
    silent = StageResult.model_construct(num_judged_following=None)
    change = ThinkingChange("key", None)
    tables = [
        thinking_table([("key", result, change) for result in results])
        for results in ([told, silent], [silent])
    ]
    (shown, hidden) = ([column.header for column in table.columns] for table in tables)
    assert shown == [*hidden, "answer\nfollows"]
    assert [str(cell) for cell in tables[0].columns[-1].cells] == ["18/20", "?"]
