"""A report as sections of blocks, and its forms: one HTML page, a Markdown file, a terminal, numbers as JSON.

Names of domains, models and stages are other people's text. They are escaped here: jinja2 does it in pages, and the
functions below in Markdown; a terminal gets no control characters.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import jinja2
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from megatron_btx.common.table import WIDE_COLUMNS, WholeTable, describe_cells

ROWS_KEPT_TOGETHER = 14
"""A table of up to so many rows is not broken over two printed pages."""
LOG_COLUMNS = 120
"""Width of what is printed where there is no terminal."""
_NAME_COLUMNS = 12
"""Least width of a column of names where a terminal is narrow."""
_TONE_STYLES = {"good": "green", "bad": "red", "unknown": "dim", "": ""}


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    strong: bool = False
    tone: str = ""
    """"good", "bad" or "unknown" gives a verdict its colour; the text says the same without it."""


@dataclass(frozen=True)
class Paragraph:
    """A sentence, or a few."""

    text: str
    lead: bool = False
    """Whether it is the sentence that a hurried reader should see."""


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table with a header; its rows have as many cells."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    text_columns: int = 1
    """How many leading columns hold words; the others hold numbers and are set flush right."""
    caption: str = ""


@dataclass(frozen=True)
class Image:
    """A figure."""

    file: str
    """File name beside the page; behind the prefix a name of :data:`megatron_btx.report.figures.FIGURES`."""
    alternative: str
    """What it shows, for who cannot see it."""
    caption: str


Block = Paragraph | Bullets | Table | Image


@dataclass(frozen=True)
class Section:
    """A part of a report under one heading; the opening one has none."""

    title: str
    blocks: tuple[Block, ...]


def make_row(*cells: str | Cell) -> tuple[Cell, ...]:
    """A table row from cells and plain strings."""
    row = []
    for cell in cells:
        if isinstance(cell, str):
            cell = Cell(cell)
        row.append(cell)
    return tuple(row)


def make_bullets(items: Sequence[str]) -> list[Bullets]:
    """The sentences as a block; none without a sentence."""
    return [Bullets(tuple(items))] * bool(items)


def render_page(template: str, **values: object) -> str:
    """A page from one of the templates of this package."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_btx.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"one_line": one_line, "kind": lambda block: type(block).__name__}
    return environment.get_template(template).render(**values)


def to_html(title: str, sections: Sequence[Section], images: Mapping[str, bytes]) -> str:
    """One page with its style and its figures (PNG bytes by file name) inside."""
    addresses = {name: f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}" for name, png in images.items()}
    return render_page(
        "report.html.j2", title=title, sections=sections, addresses=addresses, rows_kept_together=ROWS_KEPT_TOGETHER
    )


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report for a forge or an editor; images are links to the files beside it."""
    parts = [f"# {_escape_markdown(title)}"]
    for section in sections:
        if section.title:
            parts.append(f"## {_escape_markdown(section.title)}")
        parts += map(_block_to_markdown, section.blocks)
    return "\n\n".join(parts) + "\n"


def _block_to_markdown(block: Block) -> str:
    match block:
        case Paragraph(lead=True):
            return f"**{_escape_markdown(block.text)}**"
        case Paragraph():
            return _escape_markdown(block.text)
        case Bullets():
            return "\n".join(f"- {_escape_markdown(item)}" for item in block.items)
        case Image():
            return f"![{_escape_markdown(block.alternative)}]({block.file})\n\n{_escape_markdown(block.caption)}"
        case Table():
            return _table_to_markdown(block)


def _table_to_markdown(table: Table) -> str:
    rows = [list(map(_escape_markdown, table.header))]
    rows.append(["---"] * table.text_columns + ["---:"] * (len(table.header) - table.text_columns))
    for row in table.rows:
        strong = ["**" * cell.strong for cell in row]
        rows.append([f"{mark}{_escape_markdown(cell.text)}{mark}" for mark, cell in zip(strong, row, strict=True)])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    if table.caption:
        text += f"\n\n{_escape_markdown(table.caption)}"
    return text


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(one_line(text), quote=False))


def one_line(text: str) -> str:
    """A stranger's text on one line, without what a terminal would obey."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(shown.split())


def print_blocks(blocks: Sequence[Block]) -> None:
    """Print blocks: on a terminal in its width and colours, elsewhere as plain aligned text of a fixed width."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=LOG_COLUMNS, no_color=True)
    for block in blocks:
        match block:
            case Paragraph():
                console.print(Text(one_line(block.text)))
            case Bullets():
                for item in block.items:
                    console.print(Text(one_line(item)))
            case Table():
                _print_table(console, block)
            case Image():
                continue
        console.print()


def _print_table(console: Console, table: Table) -> None:
    """A table of words is wrapped to the width; rows of numbers are not in a log, because a program may read them."""
    grid = WholeTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    has_numbers = table.text_columns < len(table.header)
    headers = [one_line(header) for header in table.header]
    # A star behind the lowest, or a blank, so that the digits of a column stay in line.
    texts = [[_terminal_cell(cell, " " * has_numbers) for cell in row] for row in table.rows]
    for number, (header, *cells) in enumerate(zip(headers, *texts, strict=True)):
        if number >= table.text_columns:
            widest = max(map(cell_len, (f"{header} ", *map(str, cells))))
            grid.add_column(Text(header), justify="right", no_wrap=True, min_width=widest)
        else:
            grid.add_column(Text(header), min_width=_NAME_COLUMNS * has_numbers)
    for cells in texts:
        grid.add_row(*cells)
    grid.lines = [describe_cells(headers, list(map(str, cells))) for cells in texts]
    if has_numbers and not console.is_terminal:
        console = Console(highlight=False, width=WIDE_COLUMNS, no_color=True)
    console.print(grid)
    if table.caption:
        console.print(Text(one_line(table.caption), style="dim"))


def _terminal_cell(cell: Cell, end: str) -> Text:
    """The text of a cell; a star marks the strong ones, because a log has no bold."""
    if cell.strong:
        return Text(f"{one_line(cell.text)}*", style="bold")
    return Text(one_line(cell.text) + end, style=_TONE_STYLES[cell.tone])


def to_json(content: object) -> bytes:
    """``content`` as a file of JSON; what UTF-8 cannot hold of names stands there as JSON's escapes."""
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode("utf-8", "backslashreplace")


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it: numbers that are not finite become words, because the standard has none."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return json.dumps(value)
