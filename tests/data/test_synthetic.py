"""Orders and ledgers: every figure in a row follows from its prompt, and options are held to."""

import re
from pathlib import Path

import pytest

from sftkey.data.synthetic import task_rows
from sftkey.errors import DataError
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import DataSection


def section(**fields: object) -> DataSection:
    """Return a section of made orders."""
    return DataSection(**{"source": "made", "task": "orders", "num_rows": 60, **fields})


@pytest.mark.parametrize("ask", ["total", "dearest", "rest"])
def test_thinking_and_answer_follow_from_the_prompt(ask: str) -> None:
    """Each line of the thinking is a product of the prompt; the answer takes the step that asks."""
    rows = task_rows(section(task_options={"ask": ask, "num_lines": 4, "most": 12}), seed=3)
    assert len({row["prompt"] for row in rows}) == 60
    for row in rows:
        lines = re.findall(r"(\d+) (\w+) at (\d+)", row["prompt"])
        assert len(lines) == 4
        priced = [(f"{n} {good}", int(n) * int(price)) for n, good, price in lines]
        assert row["thinking"] == "\n".join(f"{line}: {price}" for line, price in priced)
        assert all(2 <= int(figure) <= 12 for n, _, price in lines for figure in (n, price))
        dearest = max(priced, key=lambda each: each[1])[0].split()[1]
        total = sum(price for _, price in priced)
        expected = {"total": str(total), "dearest": dearest, "rest": str(100 - total)}
        assert row["answer"] == expected[ask]


@pytest.mark.parametrize("ask", ["spread", "highest", "ends"])
def test_a_ledger_is_written_out_balance_by_balance(ask: str) -> None:
    """Each line begins where the last one ended; the answer takes a step over all of them."""
    options = {"ask": ask, "num_lines": 12}
    rows = task_rows(section(task="ledger", task_options=options), seed=3)
    assert len({row["prompt"] for row in rows}) == 60
    for row in rows:
        (start,) = map(int, re.findall(r"Start: (\d+)\.", row["prompt"]))
        changes = re.findall(r"(in|out) (\d+)", row["prompt"].lower())
        assert len(changes) == 12
        balances, lines = [start], []
        for word, amount in changes:
            balances.append(balances[-1] + (1 if word == "in" else -1) * int(amount))
            sign = "+" if word == "in" else "-"
            lines.append(f"{balances[-2]} {sign} {amount} = {balances[-1]}")
        assert row["thinking"] == "\n".join(lines)
        assert min(balances) >= 0
        expected = {
            "spread": max(balances) - min(balances),
            "highest": max(balances),
            "ends": balances[0] + balances[-1],
        }
        assert row["answer"] == str(expected[ask])


# As SmolLM2's tokenizer: digit by digit, and the blank before a number by itself.
PIECE = re.compile(r" (?=\d)|\d|[^\W\d]+|[^\w ]")


def test_a_ledgers_thinking_is_twelve_times_as_long_as_its_key() -> None:
    """In the rows of the recipe, tags and end of turn counted: the key's share of SFT is small."""
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "smollm2-135m" / "ledger.yaml")
    tags = recipe.response
    rows = task_rows(recipe.data, recipe.seed)[:100]
    thinking = sum(len(PIECE.findall(row["thinking"].join(tags.thinking))) for row in rows)
    key = sum(len(PIECE.findall(row["answer"].join(tags.answer))) + 1 for row in rows)
    assert thinking >= 12 * key


def test_seed_decides_the_rows() -> None:
    """The same seed gives the same rows, another one others."""
    assert task_rows(section(), 1) == task_rows(section(), 1) != task_rows(section(), 2)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"task": "menus"}, "made: data.task: expected orders or ledger; got 'menus'"),
        (
            {"task_options": {"lines": 3}},
            "made: data.task_options.lines: unknown option\nhint: orders has num_lines, most, ask",
        ),
        (
            {"task_options": {"most": 1}},
            "made: data.task_options.most: expected a number 3 to 99; got 1",
        ),
        (
            {"task": "ledger", "task_options": {"num_lines": 31}},
            "made: data.task_options.num_lines: expected a number 2 to 30; got 31",
        ),
        (
            {"task_options": {"ask": "sum"}},
            "made: data.task_options.ask: expected total, dearest, rest; got 'sum'",
        ),
        ({"num_rows": None}, "made: data.num_rows: expected how many rows to make; got none"),
        (
            {"num_rows": 6100, "task_options": {"num_lines": 2, "most": 3}},
            "made: data.num_rows: expected fewer rows, there are too few such orders; got 6100\n"
            "hint: raise data.task_options.most or num_lines",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(fields: dict[str, object], expected: str) -> None:
    """Each mistake has one error."""
    with pytest.raises(DataError) as error:
        task_rows(section(**fields), 1)
    assert str(error.value) == expected
