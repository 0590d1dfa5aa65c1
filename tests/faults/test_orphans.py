"""Nothing of a run is left when one of its ranks, or torchrun itself, is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

from tests import pico
from tests.distributed.test_launchers import environment
from tests.runner import REPOSITORY, read_losses

AT_MOST_SECONDS = 15


def processes_of(mark):
    """The processes that have inherited a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FAULTS_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def steps_of(metrics):
    """The last step of a run that may not have begun."""
    if not metrics.is_file():
        return 0
    return max(read_losses(metrics), default=0)


def start(corpus, folder, mark):
    """A long run under a real torchrun, which saves often: writing processes are there most of the time."""
    arguments = pico.train(corpus, 5000, folder / "metrics.jsonl")
    arguments += ["--save", str(folder / "checkpoint"), "--load", str(folder / "checkpoint"), "--save-interval", "20"]
    arguments += ["--async-save"]  # its writer is a process more
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += [str(25_000 + os.getpid() % 5000 + len(mark)), "-m", "megatron_btx.pretrain", *arguments]
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(
            command, env=environment(FAULTS_MARK=mark, PYTHONPATH=REPOSITORY), stdout=log, stderr=subprocess.STDOUT
        )


def test_nothing_is_left_of_a_killed_run(corpus, tmp_path):
    """A rank of one run and the torchrun of another are killed after a save; both are gone seconds later."""
    runs = {}
    for victim in ("rank", "torchrun"):
        (tmp_path / victim).mkdir()
        runs[victim] = start(corpus, tmp_path / victim, victim)
    try:
        for victim, run in runs.items():
            deadline = time.monotonic() + 120
            while steps_of(tmp_path / victim / "metrics.jsonl") < 30:
                assert run.poll() is None and time.monotonic() < deadline, (tmp_path / victim / "log").read_text()
                time.sleep(0.2)
        helpers = {victim: len(processes_of(victim)) for victim in runs}
        assert min(helpers.values()) > 3, "a rank that has saved has processes of its own"
        os.kill(psutil.Process(runs["rank"].pid).children()[-1].pid, signal.SIGKILL)
        runs["torchrun"].kill()
        deadline = time.monotonic() + AT_MOST_SECONDS
        while any(processes_of(victim) for victim in runs) and time.monotonic() < deadline:
            time.sleep(0.2)
        left = {victim: [process.cmdline()[-1:] for process in processes_of(victim)] for victim in runs}
        assert not any(left.values()), left
        assert runs["rank"].wait(10) == 1
    finally:
        for victim in runs:
            for process in processes_of(victim):
                process.kill()
