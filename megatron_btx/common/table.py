"""The tables of our commands: whole on a terminal that is wide enough, else a line for every row."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Column, Table
from rich.text import Text

from megatron_btx.common.errors import printable

WIDE_COLUMNS = 10_000
"""More than any table of ours has."""
_TEXTS = ("stage", "state", "kind", "made from", "why", "", "what", "found", "remedy")
"""Headers of columns that are no numbers."""
_WRAPPED = ("made from", "why", "found", "remedy")


class WholeTable(Table):
    """A table that is a line for every row where it does not fit: rich would cut its cells, down to nothing."""

    lines: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Called by rich when the width is known."""
        if self.__rich_measure__(console, options.update(max_width=WIDE_COLUMNS)).minimum <= options.max_width:
            yield from super().__rich_console__(console, options)  # type: ignore[misc]
        else:
            yield from map(Text, self.lines)


def make_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """Cells as a table for a terminal. They are text: brackets in a name are no markup."""
    texts = [[printable(cell) for cell in row] for row in rows]
    columns = []
    for header, *cells in zip(headers, *texts, strict=True):
        column = Column(header)
        if header not in _WRAPPED:
            column.no_wrap, column.min_width = True, max(map(cell_len, (header, *cells)))
        if header not in _TEXTS:
            column.justify = "right"
        columns.append(column)
    grid = WholeTable(
        *columns, title=Text(printable(title)) if title else None, title_justify="left", show_edge=False, pad_edge=False
    )
    for row in texts:
        grid.add_row(*map(Text, row))
    grid.lines = [*filter(None, [printable(title)]), *(describe_cells(headers, row) for row in texts)]
    return grid


def find_width() -> int:
    """Of the terminal; elsewhere a table is printed whole, because a program or a file reads it."""
    console = Console()
    if console.is_terminal:
        return console.width
    return WIDE_COLUMNS


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print cells as a table."""
    print(render(make_table(headers, rows, title)))


def render(table: Table) -> str:
    """The table as plain text."""
    console = Console(file=io.StringIO(), width=find_width())
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join(lines)


def describe_cells(headers: Sequence[str], cells: Sequence[str]) -> str:
    """A row of a table as a line: "seed: running, step 5/10, loss 3.210"."""
    parts = []
    for header, cell in zip(headers[1:], cells[1:], strict=True):
        if cell.strip():
            parts.append(f"{header} {cell.strip()}".removeprefix("state "))
    return f"{cells[0].strip()}: {', '.join(parts)}"
