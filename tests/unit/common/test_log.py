"""One process says it, once, whatever Megatron does to the root logger."""

from __future__ import annotations

import logging

import pytest

from megatron_btx.common import log


@pytest.mark.parametrize(
    ("rank", "world", "said"),
    [(None, None, "first last"), ("0", "2", "first"), ("1", "2", "last"), ("1", "3", ""), ("0", "1", "first last")],
)
def test_who_says_it(
    rank: str | None, world: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    log.say("first")
    log.say_from_last_rank("last")
    assert capsys.readouterr().out.split() == said.split()


def test_megatrons_level_and_handlers_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A line with a percent sign is said as it is, once."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        log.say(" frozen: 50 % of %s")
        log.say("again")
    finally:
        root.setLevel(level)
    assert capsys.readouterr() == (" frozen: 50 % of %s\nagain\n", "")


def test_a_caller_can_silence_it(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("megatron_btx")
    log.say("heard")
    logger.setLevel(logging.WARNING)
    try:
        log.say("not heard")
    finally:
        logger.setLevel(logging.INFO)
    assert capsys.readouterr().out == "heard\n"
