"""A rank that must stop, and those that wait for it: the reason is told, and a store of no real ranks tells none."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch.distributed as distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_btx.common.errors import InputError
from megatron_btx.distributed import abort as stopping
from megatron_btx.distributed.abort import Stopping


def connected(store: Any, rank: int) -> Stopping:
    """One of two ranks that have met."""
    made = Stopping()
    made._store, made._world, made._rank = store, 2, rank
    return made


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The status with which a process would have ended; looking takes no time."""
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(stopping.os, "_exit", end)
    monkeypatch.setattr(stopping, "_LOOK_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(stopping, "_KEEP_STORE_SECONDS", 0.01)
    return codes


def test_the_reason_of_one_is_said_by_both(ended, monkeypatch, capsys):
    """Each waits until both know, and ends with the status of bad input."""
    monkeypatch.setenv("RANK", "1")
    store = distributed.HashStore()
    teller = threading.Thread(target=connected(store, 0).stop_all, args=(InputError("text: token 5"),))
    teller.start()
    with pytest.raises(SystemExit):
        connected(store, 1)._look()
    teller.join(timeout=10)
    assert ended == [2, 2] and not teller.is_alive()
    assert capsys.readouterr().err == "rank 1: error: text: token 5\n" * 2


def test_a_store_of_no_real_ranks_stops_nobody(ended):
    """It answers that every key is there."""
    connected(FakeStore(), 1)._look()
    assert ended == []


def test_a_run_that_is_over_is_not_watched(ended):
    """And one process has nobody to tell."""
    over = connected(distributed.HashStore(), 1)
    over.end()
    over._look()
    Stopping().stop_all(InputError("alone"))
    assert ended == []
