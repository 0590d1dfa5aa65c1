"""Who hangs, who waits, and who only takes long."""

from __future__ import annotations

import json
import socket
import threading
import time

from megatron_btx.distributed.abort import Place, Standstill, describe


def place(rank: int, waits: bool) -> Place:
    return Place(rank, "n1", 7, "f (a/b.py:1)", waits)


def test_nobody_waits_so_nothing_is_wrong():
    """A rank may take long for itself: the last word has the backend."""
    assert describe([place(0, False), place(1, False)], 2, 60) is None


def test_who_left_no_word_is_named_first():
    """Then who stands elsewhere than in a collective, then who waits."""
    line = describe([place(0, True), place(2, False), place(3, True)], 4, 60)
    assert line is not None
    order = [line.index(part) for part in ("rank 1: no word", "rank 2 (n1, process 7): hangs", "ranks 0, 3: waiting")]
    assert order == sorted(order)


def test_a_thread_that_moves_does_not_stand_still():
    """It moves where its calls change, or where it says so."""
    end = threading.Event()

    def moves() -> None:
        while not end.is_set():
            time.sleep(0.013)
            end.wait(0.017)

    moving = threading.Thread(target=moves)
    waiting, speaking = (threading.Thread(target=end.wait) for _ in range(2))
    looks = {thread: Standstill(thread) for thread in (moving, waiting, speaking)}
    seconds: dict[threading.Thread, list[float]] = {thread: [] for thread in looks}
    for thread in looks:
        thread.start()
    for _ in range(50):
        looks[speaking].moved()
        for thread, look in looks.items():
            seconds[thread].append(look.seconds())
        time.sleep(0.02)
    end.set()
    assert max(seconds[waiting]) > 0.6
    assert max(seconds[moving]) < 0.5
    assert max(seconds[speaking]) < 0.5


def test_a_place_in_a_collective_waits():
    """It is known by the file, or by the words of its line."""
    sender, receiver = socket.socketpair()
    thread = threading.Thread(target=lambda: receiver.recv(1))
    thread.start()
    time.sleep(0.05)
    found = Standstill(thread).place(3)
    sender.send(b"x")
    assert found.waits and "test_hang_detector.py" in found.where
    assert Place(*json.loads(json.dumps(found))) == found
