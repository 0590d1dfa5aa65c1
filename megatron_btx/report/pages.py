"""A report as a list of blocks, and its forms: Markdown, one HTML page that needs nothing beside it, numbers in JSON.

Names of domains, models and stages are other people's text: every cell and paragraph is escaped here, once.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    strong: bool = False
    tone: str = ""
    """"good", "bad" or "unknown" gives a verdict its colour; the text says the same without it."""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str
    lead: bool = False
    """The sentence a hurried reader should see."""


@dataclass(frozen=True)
class Bullets:
    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    text_columns: int = 1
    """How many leading columns hold words; the others hold numbers and are set flush right."""
    caption: str = ""


@dataclass(frozen=True)
class Image:
    file: str
    """File name beside the page."""
    alternative: str
    caption: str


ROWS_KEPT_TOGETHER = 14
"""A table of up to so many rows is not broken over two printed pages."""

Block = Heading | Paragraph | Bullets | Table | Image


def row(*cells: str | Cell) -> tuple[Cell, ...]:
    """A table row from cells and plain strings."""
    return tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells)


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report for a terminal, a forge or an editor; images are links to the files beside it."""
    return "\n\n".join([f"# {_markdown(title)}", *(_markdown_block(block) for block in blocks)]) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Heading():
            return f"## {_markdown(block.text)}"
        case Paragraph():
            return f"**{_markdown(block.text)}**" if block.lead else _markdown(block.text)
        case Bullets():
            return "\n".join(f"- {_markdown(item)}" for item in block.items)
        case Image():
            return f"![{_markdown(block.alternative)}]({block.file})\n\n{_markdown(block.caption)}"
        case Table():
            rule = ["---"] * block.text_columns + ["---:"] * (len(block.header) - block.text_columns)
            body = [
                [f"**{_markdown(cell.text)}**" if cell.strong else _markdown(cell.text) for cell in cells]
                for cells in block.rows
            ]
            lines = [f"| {' | '.join(cells)} |" for cells in [[_markdown(head) for head in block.header], rule, *body]]
            return "\n".join(lines) + (f"\n\n{_markdown(block.caption)}" if block.caption else "")


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(_one_line(text), quote=False))


def to_html(title: str, blocks: Sequence[Block], images: Mapping[str, bytes]) -> str:
    """One page with its style and its figures (PNG bytes by file name) inside."""
    body = "\n".join(_html_block(block, images) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_html(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_html(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html_block(block: Block, images: Mapping[str, bytes]) -> str:
    match block:
        case Heading():
            return f"<h2>{_html(block.text)}</h2>"
        case Paragraph():
            return f'<p class="lead">{_html(block.text)}</p>' if block.lead else f"<p>{_html(block.text)}</p>"
        case Bullets():
            return "<ul>" + "".join(f"<li>{_html(item)}</li>" for item in block.items) + "</ul>"
        case Image():
            data = base64.b64encode(images[block.file]).decode("ascii")
            return (
                f'<figure><img src="data:image/png;base64,{data}" alt="{_html(block.alternative)}">'
                f"<figcaption>{_html(block.caption)}</figcaption></figure>"
            )
        case Table():
            header = "".join(f"<th{_flush(at, block)}>{_html(text)}</th>" for at, text in enumerate(block.header))
            rows = "".join(
                "<tr>" + "".join(_html_cell(at, cell, block) for at, cell in enumerate(cells)) + "</tr>\n"
                for cells in block.rows
            )
            caption = f'<p class="caption">{_html(block.caption)}</p>' if block.caption else ""
            size = " short" if len(block.rows) <= ROWS_KEPT_TOGETHER else ""
            return (
                f'<div class="table{size}"><table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}</tbody>\n'
                f"</table>{caption}</div>"
            )


def _html_cell(at: int, cell: Cell, table: Table) -> str:
    text = f"<strong>{_html(cell.text)}</strong>" if cell.strong else _html(cell.text)
    text = f'<span class="{cell.tone}">{text}</span>' if cell.tone else text
    return f"<td{_flush(at, table)}>{text}</td>"


def _flush(at: int, table: Table) -> str:
    return "" if at < table.text_columns else ' class="number"'


def _html(text: str) -> str:
    return html.escape(_one_line(text))


def _one_line(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def as_json(content: Any) -> bytes:
    """``content`` as a file of JSON; what UTF-8 cannot hold of names stands there as JSON's escapes."""
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode("utf-8", "backslashreplace")


def _plain(value: Any) -> Any:
    """The same for JSON, which has no word for a number that is not finite: those become strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    return value


STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #222; font: 15px/1.5 system-ui, "Segoe UI", Arial, sans-serif; }
main { max-width: 900px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 10px; }
h2 { font-size: 18px; margin: 34px 0 10px; padding-top: 12px; border-top: 1px solid #ddd; }
p, ul { margin: 8px 0; }
ul { padding-left: 20px; }
.lead { font-size: 17px; }
.table { margin: 12px 0; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; vertical-align: top; padding: 5px 10px 5px 0; border-bottom: 1px solid #e6e6e6; }
td { overflow-wrap: break-word; }
td:first-child { min-width: 5em; }
thead th { border-bottom: 1.5px solid #888; font-weight: 600; }
th.number, td.number { text-align: right; padding: 5px 0 5px 14px; font-variant-numeric: tabular-nums; }
th.number { max-width: 11em; overflow-wrap: break-word; }
td.number { white-space: nowrap; }
.caption, figcaption { color: #555; font-size: 13px; margin: 6px 0 0; }
figure { margin: 14px 0; }
img { width: 100%; height: auto; display: block; }
.good, .bad, .unknown { font-weight: 600; white-space: nowrap; }
.good { color: #00643f; }
.bad { color: #b02a0c; }
.unknown { color: #666; }
@page { size: A4; margin: 16mm 15mm; }
@media print {
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  h1 { font-size: 17pt; }
  h2 { font-size: 13pt; break-after: avoid; margin-top: 14pt; }
  table { font-size: 8.5pt; }
  th, td, th.number, td.number { padding-top: 2.5px; padding-bottom: 2.5px; }
  img { max-height: 230mm; object-fit: contain; }
  thead { display: table-header-group; }
  tr, figure, .short, .caption { break-inside: avoid; }
  .table { overflow: visible; }
  .caption, figcaption { break-before: avoid; }
  .lead { font-size: 11.5pt; }
  .caption, figcaption { font-size: 8.5pt; }
}
"""
