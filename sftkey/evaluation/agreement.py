"""How often two graders say the same, and how much of that is more than chance."""

from __future__ import annotations

from collections.abc import Sequence

from sftkey.evaluation.finished_cells import Answered
from sftkey.evaluation.study_results import JudgeFigures


def cohens_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Give Cohen's kappa of two graders; None where chance alone would have them always agree.

    1 is agreement throughout, 0 what graders with these shares reach by chance (Cohen 1960).
    """
    num = len(first)
    if num == 0:
        return None
    agreeing = sum(a == b for a, b in zip(first, second, strict=True)) / num
    shares = [sum(flags) / num for flags in (first, second)]
    chance = shares[0] * shares[1] + (1 - shares[0]) * (1 - shares[1])
    return None if chance == 1 else (agreeing - chance) / (1 - chance)


def judge_figures(answered: Sequence[Answered]) -> JudgeFigures | None:
    """Compare the judge's flags with the rule's; None where no judge said anything."""
    questions = [question for each in answered for question in each.questions]
    pairs = [(each.correct, each.judged) for each in questions if each.judged is not None]
    if not pairs:
        return None
    rule, judge = [a for a, _ in pairs], [b for _, b in pairs]
    return JudgeFigures(
        num_judged=len(pairs),
        num_questions=len(questions),
        num_agreeing=sum(a == b for a, b in pairs),
        kappa=cohens_kappa(rule, judge),
        acc=sum(judge) / len(judge),
    )
