"""A rank that hangs, is stopped or is gone: the others end after the timeout, and say which it is."""

from __future__ import annotations

import re
import time

from tests.support import pico

TIMEOUT_SECONDS = 6
AT_MOST_SECONDS = 40
SILENT = r"rank 1: no word, its process or its machine is stopped or gone; rank 0: waiting in "
CASES = {
    "sleeps": ("in_step", "1", "HANG", r"rank 1 \(\S+, process \d+\): hangs in _strike \(tests/faults/program.py:\d+"),
    "stopped": ("while_saving", "1", "SIGSTOP", SILENT),
    "keeper": ("in_step", "0", "SIGSTOP", "rank 0, by which all met, gives no word"),
    "gone": ("while_loading", "1", "SIGKILL", "the connection to another rank is lost"),
}


def test_the_rank_that_hangs_is_named(zygote, corpus, tmp_path):
    """One line of every rank that can still speak, status 1, within the timeout and some seconds. All cases at once."""
    arguments = [*pico.train(corpus, 4), *pico.READERS, "--save-interval", "2"]
    saved = ["--save", str(tmp_path / "gone/checkpoint"), "--load", str(tmp_path / "gone/checkpoint")]
    zygote.run(2, [*arguments, *saved, "--exit-interval", "2"], tmp_path / "gone/before")
    began, runs = time.monotonic(), {}
    for name, (at, rank, what, _) in CASES.items():
        fault = {"FAULT_AT": at, "FAULT_STEP": "2", "FAULT_RANKS": rank, "FAULT_SIGNAL": what}
        fault["FAULT_TIMEOUT_SECONDS"] = str(TIMEOUT_SECONDS)
        root = str(tmp_path / name / "checkpoint")
        saved = ["--save", root, "--load", root]
        runs[name] = zygote.start(2, [*arguments, *saved], tmp_path / name / "log", "tests.faults.program", fault)
    for name, (_, rank, _, said) in CASES.items():
        run = zygote.wait(runs[name], expect=None, grace_seconds=3)
        assert time.monotonic() - began < AT_MOST_SECONDS
        healthy = 1 - int(rank)
        assert run.codes[healthy] == 1, (name, run.codes, run.text()[-3000:])
        text = (tmp_path / name / f"log.{healthy}").read_text()
        assert "Traceback" not in text
        assert re.search(f"error: .*{said}", text), (name, text[-3000:])
