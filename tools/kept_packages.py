"""The packages that an image brings and that stay: its torch, what was compiled against it, and CUDA's libraries.

    python tools/kept_packages.py requirements.lock     print the lock without them, name the kept ones on stderr
    python tools/kept_packages.py --check               refuse an environment that lacks what megatron-btx needs

``tools/environment.sh --keep-torch`` calls both with the Python of its environment, which sees the image's packages.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

KEPT = re.compile(r"torch|torchvision|(pytorch-)?triton|transformer-engine.*|apex|flash-attn.*|nvidia-.*|cuda-.*")
"""By their names; never in the lock's version beside a torch that was built with another one."""
KEPT_IF_THERE = ("numpy",)
"""What the image's compiled packages saw when they were built."""


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Every package that this Python sees: name -> version."""
    return {normalize(found.metadata["Name"]): found.version for found in distributions()}


def is_kept(name: str, here: dict[str, str]) -> bool:
    return bool(KEPT.fullmatch(name)) or (name in KEPT_IF_THERE and name in here)


def requirements_without_kept(lock: Path) -> list[str]:
    """The requirements of the lock that are to be installed, in its order."""
    here = installed()
    if "torch" not in here:
        sys.exit(f"error: {sys.executable} sees no torch to keep; leave --keep-torch out")
    wanted = []
    for line in lock.read_text().splitlines():
        name = re.match(r"[A-Za-z0-9][\w.-]*", line)
        if name and not is_kept(normalize(name.group()), here):
            wanted.append(line)
    kept = sorted(name for name in here if is_kept(name, here))
    print("kept:", ", ".join(f"{name} {here[name]}" for name in kept), file=sys.stderr)
    return wanted


def unmet(root: str) -> list[str]:
    """What ``root`` needs, and its needs in turn, that is missing or has another version."""
    from packaging.requirements import Requirement

    found = []
    seen = set()
    open_ends = [Requirement(root)]
    while open_ends:
        requirement = open_ends.pop()
        key = (normalize(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement} is not installed")
            continue
        if not requirement.specifier.contains(package.version, prereleases=True):
            found.append(f"{requirement} is needed, found {package.version}")
        if KEPT.fullmatch(key[0]):
            continue  # an image ships CUDA's libraries without packages of their names
        for text in package.requires or []:
            need = Requirement(text)
            extras = ["", *requirement.extras]
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras):
                open_ends.append(need)
    return found


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        problems = unmet("megatron-btx")
        for problem in problems:
            print(f"error: {problem}; take another base image, or change pyproject.toml", file=sys.stderr)
        return 2 if problems else 0
    if len(sys.argv) != 2:
        sys.exit("error: expected requirements.lock, or --check")
    print("\n".join(requirements_without_kept(Path(sys.argv[1]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
