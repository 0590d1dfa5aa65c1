"""The rooms of the package: arrows go down, and some never exist. docs/design.md draws them."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_btx"
FLOORS = (
    "common",
    "distributed",
    "cost",
    "tokenizers",
    "checkpoint",
    "data",
    "mixing",
    "model",
    "engine",
    "recipe",
    "plan",
    "runner",
    "slurm",
    "report",
    "evaluation",
    "training",
    "",  # the top: what users call
)
"""From below: a room may import those before it, mixing and model not each other."""
FORBIDDEN = [
    ("model", {"mixing"}),
]
LIGHT = ("recipe", "plan", "runner", "slurm", "report")
"""Rooms without torch and Megatron, at import time and later."""
PATCHING = "engine"


def room_of(module: str) -> str:
    parts = module.split(".")
    if len(parts) < 2 or not (PACKAGE / parts[1]).is_dir():
        return ""
    return parts[1]


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, by its dotted name."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = ["megatron_btx", *file.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts).removesuffix(".__init__")] = ast.parse(file.read_text())
    return found


@cache
def imports_of(module: str) -> set[str]:
    """What a module imports anywhere in it, lazily and for types alone too."""
    found = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules() else node.module)
    return found


def ours(module: str) -> set[str]:
    return {name for name in imports_of(module) if name in modules()}


@pytest.mark.parametrize("module", sorted(modules()))
def test_arrows_go_down(module: str) -> None:
    """So that there is no circle between rooms."""
    room = room_of(module)
    below = {*FLOORS[: FLOORS.index(room) + 1]}
    below -= dict(FORBIDDEN).get(room, set())
    assert {f"{name} ({room_of(name)})" for name in ours(module) if room_of(name) not in below} == set()


def test_no_circle_between_modules() -> None:
    """Modules without imports of ours are taken away until none is left."""
    left = {module: ours(module) - {module} for module in modules()}
    while left:
        done = {module for module, needs in left.items() if not needs & left.keys()}
        assert done, sorted(left)
        left = {module: needs for module, needs in left.items() if module not in done}


@pytest.mark.parametrize("module", sorted(name for name in modules() if room_of(name) in LIGHT))
def test_light_rooms_name_neither_torch_nor_megatron(module: str) -> None:
    assert {name for name in imports_of(module) if name.split(".")[0] in ("torch", "megatron")} == set()


def test_light_rooms_load_neither_torch_nor_megatron() -> None:
    """Nor does anything that they import."""
    names = [name for name in modules() if room_of(name) in (*LIGHT, "common")]
    program = f"import sys, {', '.join(names)}; print(*(sys.modules.keys() & {{'torch', 'megatron'}}))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == ""


def assignments(module: str) -> list[str]:
    """Assignments to attributes of what was imported from Megatron, by ``x.name = ...`` or setattr."""
    tree = modules()[module]
    theirs = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = getattr(node, "module", None) or ""
            for alias in node.names:
                if base.startswith("megatron.") or alias.name.startswith("megatron."):
                    theirs.add(alias.asname or alias.name.split(".")[0])
    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            targets = [ast.Attribute(node.args[0], "setattr", ast.Store())]
        for target in targets:
            root = target
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in theirs:
                found.append(ast.unparse(target))
    return found


@pytest.mark.parametrize("module", sorted(name for name in modules() if room_of(name) != PATCHING))
def test_only_the_engine_assigns_to_megatron(module: str) -> None:
    assert assignments(module) == []


def test_the_top_holds_doors_alone() -> None:
    assert {file.stem for file in PACKAGE.glob("*.py")} == {"__init__", "cli", "pretrain", "evaluate", "doctor"}
    for door in ("megatron_btx.pretrain", "megatron_btx.evaluate"):
        assert not [name for name in modules() if door in imports_of(name)], f"{door} is started and never imported"
