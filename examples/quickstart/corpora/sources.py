"""Python source files that every machine has: the interpreter's library and the installed packages."""

from __future__ import annotations

import importlib.metadata
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

STANDARD_LIBRARY = "python"

_TEST_FOLDERS = frozenset({"test", "tests", "testing", "idle_test", "_vendor", "__pycache__", "site-packages"})


@dataclass(frozen=True)
class SourceFile:
    """One Python file: where it is here, and a name that is the same on every machine."""

    name: str
    """Package and path inside it, with forward slashes, as in ``python/email/message.py``."""
    path: str
    """The file on this machine."""
    size_bytes: int


def standard_library() -> list[SourceFile]:
    """The interpreter's own .py files without tests and without installed packages, sorted by name."""
    return _python_files(STANDARD_LIBRARY, Path(sysconfig.get_path("stdlib")))


def package(name: str) -> list[SourceFile]:
    """The .py files of an installed package without tests, sorted by name; none when it is not installed."""
    for key in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(key)) / name
        if folder.is_dir():
            return _python_files(name, folder)
    return []


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of the interpreter and of every package that is installed, by import name."""
    distributions = importlib.metadata.packages_distributions()
    found = {STANDARD_LIBRARY: platform.python_version()}
    for name in packages:
        if name in distributions:
            found[name] = importlib.metadata.version(sorted(set(distributions[name]))[0])
    return found


def _python_files(name: str, folder: Path) -> list[SourceFile]:
    files = []
    for path in folder.rglob("*.py"):
        inside = path.relative_to(folder)
        if path.is_file() and not _TEST_FOLDERS.intersection(inside.parts):
            files.append(SourceFile(f"{name}/{inside.as_posix()}", str(path), path.stat().st_size))
    return sorted(files, key=lambda file: file.name)
