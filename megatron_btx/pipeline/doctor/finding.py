"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """What a finding means."""

    GOOD = "good"
    ABSENT = "absent"
    """Not there, and everything works without it."""
    NOTE = "note"
    """Works; somebody may want to know."""
    WRONG = "wrong"
    """Needed, and missing or not usable: the command ends with status 2."""


@dataclass(frozen=True)
class Finding:
    """What was found, and if it is wrong, what helps."""

    part: str
    """python, packages, gpu, slurm or disk."""
    name: str
    found: str
    """A version, a number, a path; empty where there is nothing."""
    state: State = State.GOOD
    remedy: str = ""
    """One line; empty where nothing is to be done."""


def absent(part: str, name: str, remedy: str = "") -> Finding:
    """Something that is not there and need not be."""
    return Finding(part, name, "absent", State.ABSENT, remedy)


def wrong(part: str, name: str, found: str, remedy: str) -> Finding:
    """Something needed that is missing or not usable."""
    return Finding(part, name, found, State.WRONG, remedy)
