"""Every claim of docs/guarantees.md names tests, and those exist."""

from __future__ import annotations

import re

from tests.support.runner import REPOSITORY

PAGE = (REPOSITORY / "docs/guarantees.md").read_text()
NAME = re.compile(r"`([\w/]+)::(test_\w+)`")


def test_every_row_names_a_test_that_exists():
    """A row of a table ends in the tests that hold it."""
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.endswith("| test |")]
    assert len(rows) > 50
    for row in rows:
        named = NAME.findall(row.rstrip("| ").rpartition("| ")[2])
        assert named, row
        for file, function in named:
            text = (REPOSITORY / "tests" / f"{file}.py").read_text()
            assert f"def {function}(" in text, (file, function)
