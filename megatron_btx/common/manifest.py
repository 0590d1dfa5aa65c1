"""Manifests: what a stage was made from, by which versions, at what cost. One ``manifest.json`` per stage directory."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError
from megatron_btx.common.files import read_json_object, write_atomically

FILE_NAME = "manifest.json"
_PACKAGES = ("megatron-btx", "megatron-core", "torch")


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest in ``directory``, or None when there is none. Raises InputError when it is not a JSON object."""
    path = directory / FILE_NAME
    if not os.path.lexists(path):
        return None
    return read_json_object(path, "move its folder away to run it again")


def is_unwritten(path: Path) -> bool:
    """Whether ``path`` is what a kill left of the first writing of a manifest."""
    return path.name.startswith(f".{FILE_NAME}.")


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``manifest`` into ``directory``, atomically."""
    write_atomically(directory / FILE_NAME, json.dumps(manifest, indent=1) + "\n")


def mark(directory: Path, stage: str) -> None:
    """Make a folder that a command writes by hand, with a manifest if it has none: so that a run knows it for ours.

    Raises:
        InputError: what lies there is no folder.
    """
    if os.path.lexists(directory) and not directory.is_dir():
        raise InputError(f"{directory}: is no folder, and the report is to be one of this name; move it away")
    directory.mkdir(exist_ok=True)
    if not os.path.lexists(directory / FILE_NAME):
        write_manifest(directory, {"stage": stage, "status": "made by hand"})


def versions() -> dict[str, str]:
    """Versions of Python, Megatron-core, torch and this package, and the commit when it runs from a checkout."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        found[package] = version_of(package) or "not installed"
    commit = _commit(Path(__file__).resolve().parents[2])
    return found | ({"commit": commit} if commit else {})


def version_of(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(checkout: Path) -> str | None:
    """The commit of ``checkout``, with ``+changes`` when files differ from it; None when it is no checkout."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        # Without optional locks: a kill of this program must not leave a locked index in somebody's checkout.
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None
