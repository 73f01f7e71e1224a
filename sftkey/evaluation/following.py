"""Does an answer follow from the thinking that was written before it? No model is asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from sftkey.data.response import Example, Parsed
from sftkey.evaluation.grading import grade, normalize
from sftkey.evaluation.thinking import arrives, references_keep

MOST_CHOICES = 26


def follow_thinkings(
    written: Sequence[Parsed], examples: Sequence[Example], grader: str
) -> list[bool | None]:
    """Tell which answers are what their thinking arrives at, right or wrong; None: no rule can say.

    There is a rule where at least nine of ten references keep it themselves: with `number` the
    answer is the thinking's last number, or the result of its last equation; with `choice` the last
    of the task's choices that the thinking names. Where the answer takes a step more than the
    thinking holds, or the thinking isn't closed, or there is no answer, nothing is said.

    Args:
        written: Thinkings and answers.
        examples: Their questions with the references.
        grader: That of the answers.

    >>> examples = [Example("2 + 3 =", "2 + 3 = 5", "5", 0)]
    >>> follow_thinkings([Parsed("2 + 3 = 6", "6", strict=True)], examples, "number")
    [True]
    """
    nothing: list[bool | None] = [None] * len(examples)
    told = [example for example in examples if example.thinking.strip()]
    if grader == "number":
        follows: Callable[[str, str], bool] = arrives
    elif grader == "choice" and len({normalize(each.answer) for each in told}) <= MOST_CHOICES:
        choices = list(dict.fromkeys(example.answer.strip() for example in told))

        def follows(thinking: str, answer: str) -> bool:
            named = last_named(thinking, choices)
            return named is not None and grade(answer, named, grader)
    else:
        return nothing
    if not references_keep(follows, examples):
        return nothing
    return [
        None
        if each.thinking is None or each.answer is None
        else follows(each.thinking, each.answer)
        for each in written
    ]


def last_named(thinking: str, choices: Sequence[str]) -> str | None:
    """Give the choice that a thinking names last; a single letter counts in upper case alone.

    >>> last_named("It is no fish, so the claim is False.", ["true", "false"])
    'false'
    """
    found = [
        (match.start(), len(choice), choice)
        for choice in choices
        for match in re.finditer(
            rf"(?<!\w){re.escape(choice)}(?!\w)",
            thinking,
            0 if len(choice) == 1 else re.IGNORECASE,
        )
    ]
    return max(found)[2] if found else None
