"""Python code from the interpreter's own library, without comments and docstrings.

What is left is formatted as its authors formatted it and still compiles; prose would make this domain overlap with
the general one.
"""

from __future__ import annotations

import ast
import io
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from examples.quickstart.corpora import sources
from examples.quickstart.corpora.sources import SourceFile

LEFT_OUT = (
    "python/_sysconfigdata",  # settings of the machine that built the interpreter
    "python/encodings/",  # tables of characters
    "python/idlelib/",
    "python/lib2to3/",
    "python/pydoc_data/",  # prose, part of the general corpus
    "python/turtledemo/",
    "python/config-",
    "python/ensurepip/",
    "python/this.py",
)
"""Parts of the library that are tables, prose or demonstrations, or that some distributions leave out."""

_MIN_CHARACTERS = 300
_MIN_LETTER_SHARE = 0.55

_LINE_STARTS = frozenset({tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT})


def source_files() -> list[SourceFile]:
    """The library's files that become documents, in a fixed order."""
    return [file for file in sources.standard_library() if not file.name.startswith(LEFT_OUT)]


def extract(source: SourceFile) -> str | None:
    """The code of one file without comments and docstrings; None when it is no use as a document.

    Left out are files that do not parse, files that are too short, and tables of numbers or escapes.
    """
    data = Path(source.path).read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = io.TextIOWrapper(io.BytesIO(data), encoding).read()
        code = without_prose(text)
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
        return None
    if len(code) < _MIN_CHARACTERS or "\u2581" in code:
        return None
    letters = sum(character.isalpha() for character in code)
    visible = len(code) - code.count(" ") - code.count("\n")
    return code if letters >= _MIN_LETTER_SHARE * visible else None


def without_prose(text: str) -> str:
    """Remove comments and bare strings from Python source; the result is checked to parse.

    A bare string is a statement that consists of string literals only: a docstring, or text used as a comment.
    Where nothing else is left in a block, ``pass`` takes its place.

    Raises:
        SyntaxError: the source, or what is left of it, does not parse.
        tokenize.TokenError: the source ends inside a statement.
    """
    text = text.replace("\f", "")
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    lines = text.removesuffix("\n").split("\n")
    blank_rows = {token.start[0] for token in tokens if token.type == tokenize.NL and not token.line.strip()}
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
            if not lines[row - 1]:
                blank_rows.add(row)
    removed_rows: set[int] = set()
    for first_row, last_row, replacement in _bare_strings(tokens):
        removed_rows.update(range(first_row, last_row + 1))
        if replacement:
            lines[first_row - 1] = replacement
            removed_rows.discard(first_row)
    code = "\n".join(_tidy(lines, blank_rows, removed_rows)) + "\n"
    _check(code)
    return code


def _bare_strings(tokens: list[tokenize.TokenInfo]) -> Iterator[tuple[int, int, str]]:
    """First row, last row and replacement of every statement that is only string literals."""
    significant = [token for token in tokens if token.type not in (tokenize.NL, tokenize.COMMENT)]
    position = 0
    while position < len(significant):
        end = position
        while significant[end].type == tokenize.STRING:
            end += 1
        starts_line = position == 0 or significant[position - 1].type in _LINE_STARTS
        if end > position and starts_line and significant[end].type == tokenize.NEWLINE:
            first, last = significant[position], significant[end - 1]
            alone = significant[position - 1].type == tokenize.INDENT and significant[end + 1].type == tokenize.DEDENT
            yield first.start[0], last.end[0], " " * first.start[1] + "pass" if alone else ""
        position = max(end, position + 1)


def _tidy(lines: list[str], blank_rows: set[int], removed_rows: set[int]) -> Iterator[str]:
    """The lines that stay, without the holes that comments and docstrings leave: at most two blank lines in a row
    (one inside a block), none at the start of the file or of a block."""
    blank = 0
    previous = ":"
    for row, line in enumerate(lines, start=1):
        if row in blank_rows:
            blank += 1
        elif row not in removed_rows:
            if not previous.endswith(":"):
                yield from [""] * min(blank, 1 if line.startswith(" ") else 2)
            yield line
            blank, previous = 0, line


def _check(code: str) -> None:
    """Raise SyntaxError unless the code parses and no docstring is left (one may hide behind ``class A: "..."``)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        tree = compile(code, "<code>", "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module)
            and ast.get_docstring(node, clean=False) is not None
        ):
            raise SyntaxError("a docstring is left")
