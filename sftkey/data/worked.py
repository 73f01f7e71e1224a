"""Rows that are made on the spot: tasks of reasoning-gym, those of them with worked solutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sftkey.errors import DataError
from sftkey.recipe.schema import DataSection


def gsm_symbolic(entry: dict[str, Any]) -> str:
    """Take the worked solution without its last line, `#### answer`."""
    return str(entry["metadata"]["answer_cot"]).rpartition("####")[0].rstrip()


def chain_sum(entry: dict[str, Any]) -> str:
    """Write a chain of sums out result by result; the last step is written, its result is not.

    `4 + 3 - 2 + 9` gives the lines `4 + 3 = 7`, `7 - 2 = 5`, `5 + 9`: the answer needs one step
    more than the thinking holds.
    """
    first, *rest = entry["metadata"]["expression"].split()
    result, lines = int(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        step = f"{result} {operator} {term}"
        result += int(term) if operator == "+" else -int(term)
        lines.append(f"{step} = {result}")
    return "\n".join([*lines[:-1], step])


# From an entry (question, answer, metadata) to its thinking; None: this entry has none.
WORKED: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "chain_sum": chain_sum,
    "gsm_symbolic": gsm_symbolic,
}


def made_rows(data: DataSection, seed: int) -> list[dict[str, Any]]:
    """Make entries of a task: the columns prompt, thinking (if worked) and the entry's own.

    Raises:
        DataError: The package is missing; or task, options or number of rows are.
    """
    dataset = _create(data, seed)
    task = str(data.task)
    worked = WORKED.get(task)
    rows = []
    for number in range(len(dataset)):
        try:
            entry = dict(dataset[number])
        except Exception as error:  # a task's own generator, which may raise anything
            raise DataError(task, f"row {number} can't be made: {_reason(error)}") from error
        made = {"thinking": worked(entry)} if worked else {}
        rows.append({"prompt": entry["question"], **made, **entry})
    return rows


def _create(data: DataSection, seed: int) -> Any:
    """Create the task's generator: the seed is the recipe's."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise DataError(
            "reasoning_gym",
            "the package reasoning-gym is not installed",
            hint='pip install "sftkey[demo]"',
        ) from error
    task, worked = data.task, ", ".join(WORKED)
    if task not in DATASETS:
        raise DataError(
            data.source,
            f"data.task: expected a task of reasoning-gym; got {task!r}",
            hint=f"tasks with worked solutions: {worked}",
        )
    if task not in WORKED and data.thinking is None:
        raise DataError(
            data.source,
            f"data.task: expected a task with worked solutions ({worked}); got {task!r}",
            hint="or write `data.thinking` as a template over question, answer and metadata",
        )
    if data.num_rows is None:
        raise DataError(data.source, "data.num_rows: expected how many rows to make; got none")
    options = {field.name for field in dataclasses.fields(DATASETS[task][1])} - {"seed", "size"}
    for name in data.task_options:
        if name not in options:
            raise DataError(
                data.source,
                f"data.task_options.{name}: unknown option",
                hint=f"{task} has {', '.join(sorted(options))}",
            )
    try:
        return create_dataset(task, seed=seed, size=data.num_rows, **data.task_options)
    except (AssertionError, TypeError, ValueError) as error:
        what = f"data.task_options: {task} refuses {data.task_options}: {_reason(error)}"
        raise DataError(data.source, what) from error


def _reason(error: Exception) -> str:
    """Give an error's text; upstream's assertions often have none."""
    return str(error) or type(error).__name__
