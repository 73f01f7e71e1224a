"""Tables and lines in which no terminal breaks a word: a table too wide is a block a row."""

import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

UNBOUNDED = 10_000  # columns: no table of ours is as wide


class FittedTable(Table):
    """A table whose words stay whole at any width.

    Where the console is narrower than the table, a row is a block instead: the first cell, and
    below it a line for each other one that isn't empty, with its header before it.

    Args:
        first: Header of the first column, which names the rows.
        headers: Of the other columns; a line break in one stays only in the table.
        left: Whether the other columns are texts, and begin at the left.
    """

    def __init__(self, first: str, headers: Iterable[str], left: bool = False) -> None:
        super().__init__(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        self.add_column(first, no_wrap=True)
        for header in headers:
            self.add_column(header, justify="left" if left else "right", no_wrap=True)

    def add(self, cells: Sequence[str]) -> None:
        """Add a row of plain texts: brackets in them are no markup."""
        self.add_row(*map(Text, cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(max_width=UNBOUNDED)
        if Measurement.get(console, unbounded, self).maximum <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        headers = [_one_line(str(column.header)) for column in self.columns]
        width = max(map(len, headers[1:]), default=0)
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            name, *texts = (_one_line(str(cell)) for cell in cells)
            yield Text(name, "bold")
            for header, text in zip(headers[1:], texts, strict=True):
                if text:
                    yield broken(Text(f"  {header:<{width}}  {text}"), options.max_width)


def broken(text: Text, width: int) -> Text:
    """Break lines between words alone: a path or an option that is too long stays whole.

    What follows a break stands two columns further to the right than its line began.
    """
    whole = Text(no_wrap=True, overflow="ignore")
    for number, line in enumerate(text.split("\n", allow_blank=True)):
        indent = re.match(" *", line.plain)[0]  # type: ignore[index]
        breaks, start, room = [], 0, width
        for word in re.finditer(r"[^ ]+", line.plain):
            if cell_len(line.plain[start : word.end()]) > room and word.start() > len(indent):
                breaks.append(word.start())
                start, room = word.start(), width - len(indent) - 2
        first, *others = line.divide(breaks)
        whole.append("\n" if number else "").append_text(first)
        for piece in others:
            whole.rstrip()
            whole.append(f"\n{indent}  ").append_text(piece)
    return whole


def _one_line(text: str) -> str:
    """Join the lines of a cell: `un-` and `parsed` make one word."""
    return text.replace("-\n", "").replace("\n", " ")
