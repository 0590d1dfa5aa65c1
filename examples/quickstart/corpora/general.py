"""English prose from docstrings: of the interpreter's library and of the installed packages.

Sources are parsed, never imported. Only whole paragraphs of sentences are kept: doctests, tables, signatures,
formulas and parameter lists would teach a small model punctuation instead of English.
"""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.quickstart.corpora import sources
from examples.quickstart.corpora.sources import SourceFile

PACKAGES = (
    "numpy",
    "networkx",
    "matplotlib",
    "mpmath",
    "torch",
    "sympy",
    "setuptools",
    "PIL",
    "pyarrow",
    "pydantic",
    "fontTools",
    "jinja2",
    "werkzeug",
    "flask",
    "click",
    "pyparsing",
    "fsspec",
    "rich",
    "hypothesis",
    "tensorboard",
    "absl",
    "megatron",
    "google",
    "mpl_toolkits",
    "psutil",
    "requests",
    "urllib3",
    "dateutil",
    "markdown",
)
"""Packages whose documentation is read, those that are installed; each is a dependency of this project or of one."""

LEFT_OUT = (
    "python/encodings/",
    "sympy/parsing/",
    "sympy/polys/",
    "torch/_dynamo/",
    "torch/_inductor/",
    "torch/sparse/",
)
"""Folders with much code and little prose: reading them would take longer than it is worth."""

_MIN_STRING_CHARACTERS = 40
_MIN_WORDS = 8
_MIN_LETTER_SHARE = 0.80
_MAX_SYMBOL_SHARE = 0.02
_MAX_DOCUMENT_CHARACTERS = 4000
_MIN_DOCUMENT_CHARACTERS = 200

_SYMBOLS = frozenset("=<>{}[]|\\/_*+^~#@$%&`")
_COMMON_WORDS = frozenset(
    re.findall(r"\w+", "the a an of to is are and in for that be if or with this as by it on not can will from at when")
)
_UNDERLINE = re.compile(r"^([-=~^\"'`#*+.])\1{2,}\s*$")
_CODE_LINE = re.compile(r"^\s*(>>>|\.\.\. |\.\.\.$|In \[|\$ |\.\. |:\w|@|\||\+[-=])")
_PARAMETER_LINE = re.compile(r"^[\w*, .`]+\s?:(\s|$)|^[\w.]+\s*\(.*\)\s*(--|:|$)|^[\w.`]+$")
_BULLET = re.compile(r"^(?:[-*•]|\(?\d+[.)]|\[\d+\])\s+")
_WORD = re.compile(r"[A-Za-z][a-z']+|[AI]\b")

_MARKUP = (
    (re.compile(r":[\w:+-]+:`[!~]?([^`<]*?)(?:\s*<[^`>]*>)?`"), r"\1"),  # :func:`name`, :ref:`text <target>`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{1,2}"), r"\1"),  # `text <address>`_
    (re.compile(r"\s?\[[\w#*-]+\]_"), ""),  # footnote marks
    (re.compile(r"``([^`]*)``"), r"\1"),
    (re.compile(r"`([^`]*)`_?"), r"\1"),
    (re.compile(r"\*\*([^*\s][^*]*)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])"), r"\1"),
    (re.compile(r"\\ "), ""),
    (re.compile(r"(?<![\w.])\.(?=[A-Za-z])"), ""),  # .Figure.savefig, as matplotlib refers to its own names
    (re.compile(r"[‘’]"), "'"),
    (re.compile(r"[“”]"), '"'),
    (re.compile(r"\s+"), " "),
)


@dataclass(frozen=True)
class Prose:
    """The paragraphs of one source file."""

    name: str
    """Where they are from: package and path, as in ``numpy/ma/core.py``."""
    paragraphs: tuple[str, ...]


def source_files() -> list[SourceFile]:
    """The files whose documentation is read, in a fixed order: the interpreter's library, then the packages."""
    files = sources.standard_library()
    for name in PACKAGES:
        files += sources.package(name)
    return [file for file in files if not file.name.startswith(LEFT_OUT)]


def extract(source: SourceFile) -> Prose:
    """All prose paragraphs of a Python file, in order; none when it is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(Path(source.path).read_bytes())
    except (SyntaxError, ValueError):
        return Prose(source.name, ())
    found: dict[str, None] = {}
    for text in _long_strings(tree.body):
        found.update(dict.fromkeys(paragraphs(text)))
    return Prose(source.name, tuple(found))


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a documentation string that are English sentences, unwrapped and without markup."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        for lines in _candidates(block.splitlines()):
            paragraph = " ".join(line.strip() for line in lines)
            for pattern, replacement in _MARKUP:
                paragraph = pattern.sub(replacement, paragraph)
            paragraph = paragraph.strip()
            if is_prose(paragraph):
                yield paragraph


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as sentences: a capital, a full stop, everyday words, few symbols."""
    if not paragraph[:1].isupper() or paragraph[-1:] not in (".", "!", "?") or "http" in paragraph:
        return False
    if ">>>" in paragraph or "--" in paragraph or "::" in paragraph or "..." in paragraph or "\u2581" in paragraph:
        return False
    words = _WORD.findall(paragraph)
    if len(words) < _MIN_WORDS or sum(word.lower() in _COMMON_WORDS for word in words) < len(words) / 6:
        return False
    letters = sum(character.isalpha() and character.isascii() for character in paragraph)
    spaces = paragraph.count(" ")
    symbols = sum(character in _SYMBOLS for character in paragraph)
    return letters / (len(paragraph) - spaces) >= _MIN_LETTER_SHARE and symbols <= _MAX_SYMBOL_SHARE * len(paragraph)


def without_repeats(files: Iterable[Prose]) -> list[Prose]:
    """Keep each paragraph once over all files, comparing letters only, so that near-copies fall away too."""
    seen: set[str] = set()
    kept = []
    for file in files:
        fresh = []
        for paragraph in file.paragraphs:
            key = re.sub(r"[^a-z]+", " ", paragraph.lower())
            if key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        kept.append(Prose(file.name, tuple(fresh)))
    return kept


def documents(prose: Prose) -> Iterator[str]:
    """Join a file's paragraphs into documents of a few thousand characters."""
    held: list[str] = []
    for paragraph in prose.paragraphs:
        if held and sum(map(len, held)) + len(paragraph) > _MAX_DOCUMENT_CHARACTERS:
            yield "\n\n".join(held)
            held = []
        held.append(paragraph)
    if sum(map(len, held)) >= _MIN_DOCUMENT_CHARACTERS:
        yield "\n\n".join(held)


def _long_strings(statements: Iterable[ast.AST]) -> Iterator[str]:
    """Docstrings, documentation attached by a call or an assignment, and messages of errors.

    Goes through statements only, because looking into every expression would take longer than parsing.
    """
    for statement in statements:
        match statement:
            case ast.Expr() | ast.Assign() | ast.AnnAssign():
                yield from _strings_in(statement.value)
            case ast.Raise():
                yield from _strings_in(statement.exc)
            case _:
                for field in ("body", "handlers", "orelse", "finalbody"):
                    yield from _long_strings(getattr(statement, field, ()))


def _strings_in(value: ast.expr | None) -> Iterator[str]:
    match value:
        case ast.Constant(value=str(text)) if len(text) >= _MIN_STRING_CHARACTERS:
            yield text
        case ast.Call(args=arguments):
            for argument in arguments:
                yield from _strings_in(argument)
        case ast.List(elts=values) | ast.Tuple(elts=values) | ast.Dict(values=values):
            for item in values:
                yield from _strings_in(item)


def _candidates(lines: list[str]) -> Iterator[list[str]]:
    """Cut a block without blank lines where a bullet, a parameter or a heading starts, and drop code lines."""
    held: list[str] = []
    for number, line in enumerate(lines):
        heading = number + 1 < len(lines) and _UNDERLINE.match(lines[number + 1].strip())
        if _CODE_LINE.match(line) or heading or _UNDERLINE.match(line.strip()):
            yield held
            held = []
        elif _BULLET.match(line.strip()):
            yield held
            held = [_BULLET.sub("", line.strip())]
        elif _PARAMETER_LINE.match(line) and _stands_out(lines, number):
            yield held
            held = []
        else:
            held.append(line)
    yield held


def _stands_out(lines: list[str], number: int) -> bool:
    """Whether a line begins further left than the one before or after it, as the terms of a list do."""
    around = lines[max(number - 1, 0) : number] + lines[number + 1 : number + 2]
    return not lines[number].startswith(" ") and any(line.startswith(" ") for line in around)
