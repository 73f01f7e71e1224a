"""How often two graders say the same, and how much of that is more than chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict


class Graded(Protocol):
    """A question's flags of both graders; `judged` is None where the second said nothing."""

    @property
    def correct(self) -> bool:
        """What the rule says."""

    @property
    def judged(self) -> bool | None:
        """What the judge says."""


class JudgeFigures(BaseModel):
    """How often the second grader says the same as the rule."""

    model_config = ConfigDict(frozen=True)

    num_judged: int
    num_questions: int
    num_agreeing: int
    kappa: float | None
    acc: float


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


def judge_figures(questions: Iterable[Graded]) -> JudgeFigures | None:
    """Compare the judge's flags with the rule's; None where no judge said anything."""
    flags = [(each.correct, each.judged) for each in questions]
    pairs = [(correct, judged) for correct, judged in flags if judged is not None]
    if not pairs:
        return None
    rule, judge = [a for a, _ in pairs], [b for _, b in pairs]
    return JudgeFigures(
        num_judged=len(pairs),
        num_questions=len(flags),
        num_agreeing=sum(a == b for a, b in pairs),
        kappa=cohens_kappa(rule, judge),
        acc=sum(judge) / len(judge),
    )


def judge_sentence(
    name: str, model: str, figures: JudgeFigures | None, num_questions: int, num_unclear: int
) -> str:
    """Say what the judge finds in a stage's answers, and what it didn't judge.

    Args:
        name: The stage's.
        model: The judge's.
        figures: None where it judged nothing.
        num_questions: All of them.
        num_unclear: The replies that were neither yes nor no.
    """
    num_judged = figures.num_judged if figures else 0
    said = f"{name}: the judge {model} judged {num_judged} of {num_questions} answers"
    if figures:
        said += f", Acc {figures.acc:.3f}; the rule agrees on {figures.num_agreeing}"
        said += "" if figures.kappa is None else f", kappa {figures.kappa:.2f}"
    if num_unclear:
        said += f"; neither yes nor no: {num_unclear}"
    if left := num_questions - num_judged - num_unclear:
        said += f"; not asked yet: {left}"
    return f"{said}."
