"""Rows of a task of our own: orders, of which the thinking writes out each line's price.

The answer takes one step more than the thinking holds, over the prices that stand there.
"""

from __future__ import annotations

import random
from typing import Any

from sftkey.errors import DataError
from sftkey.recipe.schema import DataSection

SOURCE = "made"
TASK = "orders"
GOODS = (
    *("bells", "boxes", "cups", "drums", "eggs", "flags", "gloves", "hats", "jars", "kites"),
    *("lamps", "maps", "nets", "pens", "rings", "seeds", "tiles", "umbrellas", "vases", "wheels"),
)
QUESTIONS = {
    "total": "What is the total?",
    "dearest": "Which line costs the most?",
    "rest": "How much of 100 is left?",
}
# Option: its default, and what it may be.
OPTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "num_lines": (3, tuple(range(2, 9))),
    "most": (9, tuple(range(3, 100))),
    "ask": ("total", tuple(QUESTIONS)),
}


def order_rows(data: DataSection, seed: int) -> list[dict[str, str]]:
    """Make rows with the columns prompt, thinking and answer, no prompt twice.

    Of `3 kites at 4, 7 lamps at 6. What is the total?` the thinking is `3 kites: 12` and
    `7 lamps: 42`, a line each, and the answer 54.

    Args:
        data: `task_options` are `num_lines`, `most` (the largest number and price) and `ask`
            (total, dearest, rest).
        seed: Of the numbers.

    Raises:
        DataError: There is no such task or option, or there are fewer orders than rows.
    """
    if data.task != TASK:
        raise DataError(data.source, f"data.task: expected {TASK}; got {data.task!r}")
    options = _options(data)
    if data.num_rows is None:
        raise DataError(data.source, "data.num_rows: expected how many rows to make; got none")
    dice = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    for _ in range(20 * data.num_rows):
        row = _order(dice, **options)
        if row is not None:
            rows.setdefault(row["prompt"], row)
        if len(rows) == data.num_rows:
            return list(rows.values())
    what = f"data.num_rows: expected fewer rows, there are too few such orders; got {data.num_rows}"
    raise DataError(data.source, what, "raise data.task_options.most or num_lines")


def _options(data: DataSection) -> dict[str, Any]:
    for name, value in data.task_options.items():
        if name not in OPTIONS:
            hint = f"{TASK} has {', '.join(OPTIONS)}"
            raise DataError(data.source, f"data.task_options.{name}: unknown option", hint=hint)
        allowed = OPTIONS[name][1]
        if value not in allowed or isinstance(value, bool):
            shown = (
                ", ".join(allowed) if name == "ask" else f"a number {allowed[0]} to {allowed[-1]}"
            )
            what = f"data.task_options.{name}: expected {shown}; got {value!r}"
            raise DataError(data.source, what)
    return {name: default for name, (default, _) in OPTIONS.items()} | data.task_options


def _order(dice: random.Random, num_lines: int, most: int, ask: str) -> dict[str, str] | None:
    """Make one order; None where its question has no one answer."""
    goods = dice.sample(GOODS, num_lines)
    lines = [(dice.randint(2, most), good, dice.randint(2, most)) for good in goods]
    prices = [number * price for number, _, price in lines]
    if ask == "dearest":
        if prices.count(max(prices)) > 1:
            return None
        answer = goods[prices.index(max(prices))]
    else:
        answer = str(sum(prices) if ask == "total" else 100 - sum(prices))
    order = ", ".join(f"{number} {good} at {price}" for number, good, price in lines)
    return {
        "prompt": f"{order}. {QUESTIONS[ask]}",
        "thinking": "\n".join(
            f"{number} {good}: {price}"
            for (number, good, _), price in zip(lines, prices, strict=True)
        ),
        "answer": answer,
    }
