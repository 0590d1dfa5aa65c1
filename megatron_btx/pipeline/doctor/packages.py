"""The interpreter and the packages: what pyproject.toml asks for, read from the installed package's own metadata."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_btx.pipeline.doctor.finding import Finding, absent, wrong

PACKAGE = "megatron-btx"
INSTALL = "bash tools/environment.sh"
OPTIONAL = ("safetensors", "tokenizers", "triton")
"""Worth a line, and not needed by every command."""
DATASET_HELPER = "core/datasets/helpers_cpp*.so"


def look_at_packages() -> Iterator[Finding]:
    """Python, this package, everything that it needs, and Megatron's compiled helper."""
    yield _python()
    own = version_of(PACKAGE)
    if own is None:
        yield wrong("packages", PACKAGE, "imported and not installed", INSTALL)
    else:
        yield Finding("packages", PACKAGE, own)
        yield from _needs()
    yield _dataset_helper()
    for name in OPTIONAL:
        version = version_of(name)
        yield Finding("packages", name, version) if version else absent("packages", name)


def _needs() -> Iterator[Finding]:
    for text in importlib.metadata.requires(PACKAGE) or []:
        if "extra ==" not in text:
            yield _needed(text)


def version_of(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    return Finding("python", "python", f"{platform.python_version()}, {sys.executable}")


def _needed(text: str) -> Finding:
    """One line of the package's requirements, such as ``torch>=2.10,<2.16``."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return wrong("packages", text, "not compared: packaging is missing", INSTALL)
    requirement = Requirement(text)
    version = version_of(requirement.name)
    if version is None:
        return wrong("packages", requirement.name, "missing", f"{requirement}: {INSTALL}")
    # An image's own torch calls itself a pre-release: 2.13.0a0+9186a08.
    if not requirement.specifier.contains(version, prereleases=True):
        return wrong("packages", requirement.name, version, f"needs {requirement.specifier}: {INSTALL}")
    return Finding("packages", requirement.name, version)


def _dataset_helper() -> Finding:
    """Whether the wheel brought it. Looked for as a file: an import of it would load torch."""
    name = "megatron dataset helper"
    spec = importlib.util.find_spec("megatron")
    for folder in (spec and spec.submodule_search_locations) or ():
        if list(Path(folder).glob(DATASET_HELPER)):
            return Finding("packages", name, "compiled")
    return wrong("packages", name, "missing", f"the wheel of megatron-core for this Python has it: {INSTALL}")
