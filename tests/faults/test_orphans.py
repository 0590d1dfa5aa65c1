"""Nothing of a run is left when one of its ranks, or torchrun itself, is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

from megatron_btx.checkpoint.iterations import read_tracker
from tests.distributed.test_launchers import environment
from tests.support import pico
from tests.support.runner import REPOSITORY, read_losses

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
    arguments += [*pico.READERS, "--async-save"]  # readers and its writer are processes more
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


def start_alone(corpus, folder, more=()):
    """A long run of one process, with readers of data and what writes its checkpoints, that is to save when asked."""
    folder.mkdir()
    arguments = pico.train(corpus, 20_000, folder / "metrics.jsonl")
    arguments += ["--save", str(folder / "checkpoint"), "--save-interval", "2", "--btx-keep-last", "1"]
    command = [sys.executable, "-m", "megatron_btx.pretrain", *arguments, "--exit-signal-handler", *more]
    with open(folder / "log", "wb") as log:
        variables = environment(FAULTS_MARK=folder.name, PYTHONPATH=REPOSITORY, OMP_NUM_THREADS=1)
        variables["TORCH_COMPILE_DISABLE"] = "1"
        return subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def test_helpers_that_die_and_helpers_that_are_asked(corpus, tmp_path):
    """A reader or a collector that is killed ends the run in seconds, with status 1; a signal to all lets it save."""
    more = {"reader": pico.READERS, "collector": [], "asked": [*pico.READERS, "--async-save"]}
    runs = {name: start_alone(corpus, tmp_path / name, flags) for name, flags in more.items()}
    try:
        for name, run in runs.items():
            deadline = time.monotonic() + 240
            while steps_of(tmp_path / name / "metrics.jsonl") < 3:
                assert run.poll() is None and time.monotonic() < deadline, (tmp_path / name / "log").read_text()
                time.sleep(0.2)
        children = {name: psutil.Process(run.pid).children() for name, run in runs.items()}
        [reader, *_] = [child for child in children["reader"] if child.name() == "pt_data_worker"]
        [collector] = children["collector"]
        reader.kill()
        collector.kill()
        os.killpg(runs["asked"].pid, signal.SIGTERM)
        codes = {name: run.wait(90) for name, run in runs.items()}
        logs = {name: (tmp_path / name / "log").read_text() for name in runs}
        assert codes == {"reader": 1, "collector": 1, "asked": 0}, logs
        # Killed while it hands a batch over, its connection is what is lost; or a save, if one is made just then.
        gone = "error: a process that reads the data is gone"
        said = (gone, "a disk, a connection or a process failed", "a checkpoint could not be written")
        assert any(text in logs["reader"] for text in said)
        assert "a disk, a connection or a process failed" in logs["collector"]
        assert "error: " not in logs["asked"]
        done = steps_of(tmp_path / "asked" / "metrics.jsonl")
        assert read_tracker(tmp_path / "asked" / "checkpoint") == done
        assert not any(processes_of(name) for name in runs)
    finally:
        for name in runs:
            for process in processes_of(name):
                process.kill()
