"""A report as sections of blocks. The page, the Markdown file and the terminal are made from the same objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


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
    kind: Literal["paragraph"] = field(default="paragraph", init=False)


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: tuple[str, ...]
    kind: Literal["bullets"] = field(default="bullets", init=False)


@dataclass(frozen=True)
class Table:
    """A table with a header; its rows have as many cells."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    text_columns: int = 1
    """How many leading columns hold words; the others hold numbers and are set flush right."""
    caption: str = ""
    kind: Literal["table"] = field(default="table", init=False)


@dataclass(frozen=True)
class Image:
    """A figure."""

    file: str
    """File name beside the page."""
    alternative: str
    """What it shows, for who cannot see it."""
    caption: str
    kind: Literal["image"] = field(default="image", init=False)


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


def make_bullets(items: tuple[str, ...]) -> tuple[Bullets, ...]:
    """The sentences as a block; none without a sentence."""
    return (Bullets(items),) * bool(items)
