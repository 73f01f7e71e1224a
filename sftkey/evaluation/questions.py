"""Each question of a stage graded by itself: right, strict, stopped, and what its thinking is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from sftkey.data.response import Example, Parsed, Response
from sftkey.evaluation.following import follow_thinkings
from sftkey.evaluation.grading import grade
from sftkey.evaluation.thinking import judge_thinkings, thinking_hash
from sftkey.generation.generate import Generation

T = TypeVar("T")
# What no rule and no judge said isn't written, so that results without are as they were.
Judged = Annotated[T | None, Field(exclude_if=lambda value: value is None)]


class Question(BaseModel):
    """How one question was answered; it holds nothing of the question itself.

    `thinking_right` is None where no rule can say, and both of the thinking are in results that
    were written before there were such. `judged` is what the second grader says; None where it
    wasn't asked or said neither yes nor no.
    """

    model_config = ConfigDict(frozen=True)

    index: int
    correct: bool
    strict: bool  # thinking, answer and nothing else
    parsed: bool  # there was an answer
    stopped: bool | None
    thinking_right: bool | None = None
    thinking_hash: str | None = None  # equal where two stages wrote the same thinking
    follows: Judged[bool] = None  # the answer is what the thinking arrives at
    judged: Judged[bool] = None


class Answers(NamedTuple):
    """What was answered, question by question.

    Args:
        examples: The questions with their references.
        generations: What the model wrote.
        texts: The same without what the chat template and an engine add.
        parsed: Thinking and answer of these.
        second: What the second grader says; None where it says nothing.
    """

    examples: Sequence[Example]
    generations: Sequence[Generation]
    texts: Sequence[str]
    parsed: Sequence[Parsed]
    second: Sequence[bool | None]


def graded(answers: Answers, response: Response, grader: str, made: bool) -> tuple[Question, ...]:
    """Grade answers; the arguments are those of `score`."""
    written = [found.thinking for found in answers.parsed]
    right = judge_thinkings(written, answers.examples, grader, made)
    follows = follow_thinkings(answers.parsed, answers.examples, grader)
    return tuple(
        Question(
            index=example.index,
            correct=grade(found.answer, example.answer, grader),
            strict=found.strict,
            parsed=found.answer is not None,
            stopped=generation.stopped,
            thinking_right=right[place],
            thinking_hash=thinking_hash(text, response),
            follows=follows[place],
            judged=second,
        )
        for place, (example, generation, text, found, second) in enumerate(
            zip(*answers, strict=True)
        )
    )
