"""What a program of several processes says: one of them says it, once, on standard output.

Through ``logging``, under the name of the package, so that a caller can silence or redirect it. Megatron sets the level
of the root logger, and its handlers add to lines; this logger has its own of both.
"""

from __future__ import annotations

import logging
import os

_NAME = "megatron_btx"


class _StandardOutput(logging.Handler):
    """Prints to what standard output is at that moment, at once: a killed process has said what it did."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def say(text: str) -> None:
    """Say a line, or several, from the first rank; a program that is no rank of several is the first."""
    if int(os.environ.get("RANK", "0")) == 0:
        _logger().info("%s", text)


def say_from_last_rank(text: str) -> None:
    """The same from the last rank, which holds the last pipeline stage and on which Megatron logs its losses."""
    if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        _logger().info("%s", text)


def _logger() -> logging.Logger:
    logger = logging.getLogger(_NAME)
    if not logger.handlers:
        logger.addHandler(_StandardOutput())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger
