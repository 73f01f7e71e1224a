"""A table is whole at any width, or a block a row."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from sftkey.tables import FittedTable, broken

HEADERS = ["n", "Acc\n[95%]", "un-\nparsed", "identical\nto before"]


def printed(width: int, name: str = "[bold]a/b") -> list[str]:
    """Print a table of one row."""
    table = FittedTable("stage", HEADERS)
    table.add([name, "200", "0.335\n[0.273, 0.403]", "", "12/200"])
    file = io.StringIO()
    Console(file=file, width=width).print(table)
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_table_that_fits_is_a_table(width: int) -> None:
    """Its cells stand side by side, and brackets are no markup."""
    lines = printed(width)
    row = next(line for line in lines if line.startswith("[bold]a/b"))
    assert row.split() == ["[bold]a/b", "200", "0.335", "12/200"]


def test_a_table_that_is_too_wide_is_a_block_a_row() -> None:
    """No word is broken, and empty cells are left out."""
    name = "[bold]runs/" + "a" * 30
    assert printed(60, name) == [
        name,
        "  n                    200",
        "  Acc [95%]            0.335 [0.273, 0.403]",
        "  identical to before  12/200",
    ]


def test_lines_break_between_words_alone() -> None:
    """What is to be copied, a path or an option, stays whole even where it is too long."""
    path = "runs/" + "x" * 40
    text = Text(f"error: a b\n  hint: write {path} now\n\n 数学数学 数学数", "red")
    fitted = broken(text, 14)
    assert fitted.plain == (
        f"error: a b\n  hint: write\n    {path}\n    now\n\n 数学数学\n   数学数"
    )
    assert fitted.spans
