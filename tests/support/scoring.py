"""Results of stages of runs that nobody ran."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from sftkey.data.renderer import Renderer
from sftkey.data.response import Example, QuestionKey, Response
from sftkey.evaluation.answers import GradedText, grade_texts
from sftkey.evaluation.results import StageResult, score
from sftkey.generation.generate import Generation
from sftkey.recipe.schema import EvalSection


def run_of(
    response: Response,
    grader: str,
    alpha: float = 0.7,
    assistant_prefix: str = "",
    end: str = "",
    stages: Sequence[str] = (),
    tokenizer: Any = None,
) -> tuple[Any, Any]:
    """Make what grading reads of a run's recipe and renderer; a character is a token."""
    section = EvalSection(grader=grader, alpha=alpha)  # type: ignore[arg-type]
    named = [SimpleNamespace(name=name) for name in stages]
    data = SimpleNamespace(source="rows.jsonl")
    recipe = SimpleNamespace(eval=section, stages=named, data=data)
    tokenizer = tokenizer or (lambda texts, **_: {"input_ids": texts})
    return recipe, Renderer(tokenizer, response, assistant_prefix, end, end_id=0)


def graded(
    generations: Mapping[QuestionKey, Generation],
    examples: Sequence[Example],
    response: Response,
    grader: str = "number",
    **changes: Any,
) -> list[GradedText]:
    """Grade what was written to some questions."""
    return grade_texts(*run_of(response, grader, **changes), generations, examples)


def scored(
    generations: Mapping[QuestionKey, Generation],
    examples: Sequence[Example],
    response: Response,
    stage: str = "key",
    position: int = 1,
    grader: str = "number",
    changes: Mapping[str, Any] | None = None,
    **more: Any,
) -> StageResult:
    """Score what a stage wrote; `changes` are of `run_of`, the rest of `score`."""
    before = [f"before-{number}" for number in range(1, position)]
    stages = [*before, stage] if position else []
    recipe, renderer = run_of(response, grader, stages=stages, **(changes or {}))
    texts = grade_texts(recipe, renderer, generations, examples)
    return score(recipe, renderer, stage, texts, **more)
