"""Made-up questions with worked solutions."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

from sftkey.errors import DataError, first_line
from sftkey.recipe.schema import DataSection

SOURCE = "made"
GOODS = (
    *("bells", "boxes", "cups", "drums", "eggs", "flags", "gloves", "hats", "jars", "kites"),
    *("lamps", "maps", "nets", "pens", "rings", "seeds", "tiles", "umbrellas", "vases", "wheels"),
)
QUESTIONS = {
    "total": "What is the total?",
    "dearest": "Which line costs the most?",
    "rest": "How much of 100 is left?",
}
CHANGES = {
    "spread": "How far apart are the highest and the lowest balance?",
    "highest": "What is the highest balance?",
    "ends": "What do the first and the last balance add up to?",
}
Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes the rows of one task."""

    make: Callable[..., Row | None]  # from dice and options; None where there is no one answer
    options: dict[str, tuple[Any, tuple[Any, ...]]]  # each one's default, and what it may be


def task_rows(data: DataSection, seed: int) -> list[Row]:
    """Make rows with the columns prompt, thinking and answer, no prompt twice.

    Of the order `3 kites at 4, 7 lamps at 6. What is the total?` the thinking is `3 kites: 12` and
    `7 lamps: 42`, a line each, and the answer 54. Of the ledger `Start: 40. In 12, out 7. How far
    apart are the highest and the lowest balance?` it is `40 + 12 = 52` and `52 - 7 = 45`, and the
    answer 12.

    The options are `num_lines`, `most` (the largest number) and `ask` (what is asked).
    """
    maker = MAKERS.get(str(data.task))
    if maker is None:
        known = " or ".join(MAKERS)
        raise DataError(data.source, f"data.task: expected {known}; got {data.task!r}")
    num_rows = _num_rows(data, list(maker.options))
    options = _options(data, maker)
    dice = random.Random(seed)
    rows: dict[str, Row] = {}
    for _ in range(20 * num_rows):
        row = maker.make(dice, **options)
        if row is not None:
            rows.setdefault(row["prompt"], row)
        if len(rows) == num_rows:
            return list(rows.values())
    what = f"data.num_rows: expected fewer rows, there are too few such {data.task}"
    hint = "raise data.task_options.most or num_lines"
    raise DataError(data.source, f"{what}; got {num_rows}", hint)


def _num_rows(data: DataSection, known: Sequence[str]) -> int:
    """Return how many rows to make, with options that the task knows."""
    for name in data.task_options:
        if name not in known:
            what, hint = f"data.task_options.{name}: unknown option", f"{data.task} has "
            raise DataError(data.source, what, hint=hint + ", ".join(known))
    if data.num_rows is None:
        raise DataError(data.source, "data.num_rows: expected how many rows to make; got none")
    return data.num_rows


def _options(data: DataSection, maker: Maker) -> dict[str, Any]:
    for name, value in data.task_options.items():
        allowed = maker.options[name][1]
        if value not in allowed or isinstance(value, bool):
            shown = (
                ", ".join(allowed) if name == "ask" else f"a number {allowed[0]} to {allowed[-1]}"
            )
            what = f"data.task_options.{name}: expected {shown}; got {value!r}"
            raise DataError(data.source, what)
    return {name: default for name, (default, _) in maker.options.items()} | data.task_options


def _order(dice: random.Random, num_lines: int, most: int, ask: str) -> Row | None:
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


def _ledger(dice: random.Random, num_lines: int, most: int, ask: str) -> Row | None:
    """Make one ledger; None where its balance would fall below 0."""
    balances = [dice.randint(1, most)]
    changes, lines = [], []
    for _ in range(num_lines):
        change = dice.choice((-1, 1)) * dice.randint(1, most)
        before, after = balances[-1], balances[-1] + change
        if after < 0:
            return None
        balances.append(after)
        changes.append(f"{'in' if change > 0 else 'out'} {abs(change)}")
        lines.append(f"{before} {'+' if change > 0 else '-'} {abs(change)} = {after}")
    answers = {
        "spread": max(balances) - min(balances),
        "highest": max(balances),
        "ends": balances[0] + balances[-1],
    }
    listed = ", ".join(changes)
    return {
        "prompt": f"Start: {balances[0]}. {listed.capitalize()}. {CHANGES[ask]}",
        "thinking": "\n".join(lines),
        "answer": str(answers[ask]),
    }


MAKERS = {
    "orders": Maker(
        _order,
        {
            "num_lines": (3, tuple(range(2, 9))),
            "most": (9, tuple(range(3, 100))),
            "ask": ("total", tuple(QUESTIONS)),
        },
    ),
    "ledger": Maker(
        _ledger,
        {
            "num_lines": (12, tuple(range(2, 31))),
            "most": (20, tuple(range(3, 1000))),
            "ask": ("spread", tuple(CHANGES)),
        },
    ),
}


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
    """Make entries of a task: the columns prompt, thinking (if worked) and the entry's own."""
    dataset = _create(data, seed)
    task = str(data.task)
    worked = WORKED.get(task)
    rows = []
    for number in range(len(dataset)):
        try:
            entry = dict(dataset[number])
        except Exception as error:  # a task's own generator, which may raise anything
            raise DataError(task, f"row {number} can't be made: {first_line(error)}") from error
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
    options = {field.name for field in dataclasses.fields(DATASETS[task][1])} - {"seed", "size"}
    num_rows = _num_rows(data, sorted(options))
    try:
        return create_dataset(task, seed=seed, size=num_rows, **data.task_options)
    except (AssertionError, TypeError, ValueError) as error:
        what = f"data.task_options: {task} refuses {data.task_options}: {first_line(error)}"
        raise DataError(data.source, what) from error
