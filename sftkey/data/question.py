"""A person's question, put as the rows of a recipe are: in its template, behind its system text."""

from __future__ import annotations

from sftkey.data.sources import with_defaults
from sftkey.data.templates import Template
from sftkey.recipe.schema import DataSection

Prompt = str | tuple[dict[str, str], ...]


def num_columns(data: DataSection) -> int:
    """Count the columns that the recipe puts together for a prompt."""
    return len(set(_template(data).columns))


def question_prompt(data: DataSection, question: str) -> Prompt:
    r"""Give the prompt that a row with this question would have.

    A recipe that puts several columns together can't know which part is which: there the question
    is taken as the whole text.

    >>> question_prompt(DataSection(source="gsm8k", system="You calculate."), "2 + 2?")
    ({'role': 'system', 'content': 'You calculate.'}, {'role': 'user', 'content': '2 + 2?'})
    >>> question_prompt(DataSection(source="my.jsonl", prompt="Q: {question}\n"), "2 + 2?")
    'Q: 2 + 2?\n'
    """
    text = question
    if num_columns(data) == 1:
        parts = _template(data).parts
        text = "".join(literal + (question if field else "") for literal, field in parts)
    if data.system is None:
        return text
    return ({"role": "system", "content": data.system}, {"role": "user", "content": text})


def _template(data: DataSection) -> Template:
    return Template(with_defaults(data).prompt or "{prompt}", ())
