"""Short questions to programs that may be missing, hang or fail."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

_SECONDS = 10


def answer_of(words: Sequence[str]) -> str:
    """What a command prints; nothing where it is missing, fails, or takes longer than it may."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
