"""What a page points to is there: links, anchors, files and tests. So are the pages that the code names."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from tests.support.runner import REPOSITORY

DOCS = REPOSITORY / "docs"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TEST = re.compile(r"`([\w/]+)::(test_\w+)`")
PYTHON_FILE = re.compile(r"`((?:[\w.]+/)+\w+\.py)\b")
# History keeps the names of its day.
HISTORY = ("CHANGELOG.md", "docs/log.md", "benchmarks/")


def files(*patterns: str) -> list[str]:
    """Files of the repository, golden ones left out."""
    found = [path for pattern in patterns for path in REPOSITORY.glob(pattern) if path.is_file()]
    names = sorted(str(path.relative_to(REPOSITORY)) for path in found)
    return [name for name in names if "/golden/" not in name]


PAGES = files("*.md", "docs/*.md", "benchmarks/**/*.md")
ROOMS = ("megatron_btx", "tests", "tools", "examples", "benchmarks")
CODE = files(*(f"{room}/**/*{ending}" for room in ROOMS for ending in (".py", ".sh", ".yaml", ".sbatch")), "Dockerfile")


@functools.cache
def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@functools.cache
def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", LINK.sub("", heading).lower())
        found.add(words.strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("name", PAGES)
def test_links_and_anchors_exist(name):
    """Relative ones, in every page of the repository."""
    page = REPOSITORY / name
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page
        if path:
            target = (page.parent / path).resolve()
        assert target.exists(), (name, link)
        if anchor:
            assert anchor in anchors(target), (name, link)


def test_every_page_is_in_the_index():
    """docs/README.md leads to all others, and README to it."""
    index = prose(DOCS / "README.md")
    linked = {link.partition("#")[0] for link in LINK.findall(index)}
    pages = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    assert pages <= linked
    assert "docs/README.md" in LINK.findall(prose(REPOSITORY / "README.md"))


def test_pages_that_the_code_names_exist():
    """In help texts, messages, comments and recipes."""
    count = 0
    for name in CODE:
        for page in re.findall(r"docs/\w+\.md", (REPOSITORY / name).read_text(encoding="utf-8")):
            assert (REPOSITORY / page).is_file(), (name, page)
            count += 1
    assert count > 10


@pytest.mark.parametrize("name", [name for name in PAGES if not name.startswith(HISTORY)])
def test_files_that_a_page_names_exist(name):
    """From the repository's root, or within the package."""
    for file in PYTHON_FILE.findall(prose(REPOSITORY / name)):
        assert (REPOSITORY / file).is_file() or (REPOSITORY / "megatron_btx" / file).is_file(), (name, file)


def claims() -> list[str]:
    """The rows of those tables of docs/checks.md that end in a column of tests."""
    rows, in_table = [], False
    for line in prose(DOCS / "checks.md").splitlines():
        if not line.startswith("|"):
            in_table = False
        elif line.endswith("| test |"):
            in_table = True
        elif in_table and not line.startswith("|---"):
            rows.append(line)
    return rows


def test_every_claim_names_a_test_that_exists():
    """The last column of a row holds its tests."""
    rows = claims()
    assert len(rows) > 80
    for row in rows:
        named = TEST.findall(row.rstrip("| ").rpartition("| ")[2])
        assert named, row
        for file, function in named:
            text = (REPOSITORY / "tests" / f"{file}.py").read_text(encoding="utf-8")
            assert f"def {function}(" in text, (file, function)
