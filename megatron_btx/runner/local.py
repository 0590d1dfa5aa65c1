"""The local runner: a graph of subprocesses with manifests.

A stage's directory holds config.yaml, command.sh (what is executed), log.txt, manifest.json and its product. Finished
stages are skipped, stopped ones go on; where what decides a result has changed, the run stops before it begins. Nothing
is removed (:mod:`megatron_btx.runner.stage_run`), and whatever ends the runner, no process stays behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_btx.common.errors import BTXError, InputError
from megatron_btx.common.files import write_atomically
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.names import LOG_FILE, SCRIPT_FILE
from megatron_btx.runner import processes
from megatron_btx.runner.decisions import SKIP, Action, check_chosen, check_kept, decide, make_records
from megatron_btx.runner.run_dir import check_run, lock_run
from megatron_btx.runner.schemas import StageRecord
from megatron_btx.runner.slurm_queue import check_no_jobs
from megatron_btx.runner.stage_run import Failure, StageRun
from megatron_btx.runner.tables import Reporter

POLL_SECONDS = 0.2
MANIFEST_SECONDS = 15.0
"""Between two writings of a running stage's seconds, which a SIGKILL would lose."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RunError(BTXError):
    """A stage failed, or a signal stopped the run."""

    def __init__(self, why: str, status: int) -> None:
        super().__init__(why)
        self.status = status
        """Exit status: 1 or 2 (bad input) after a failed stage, 128 + n after signal n (SIGINT, SIGTERM, SIGHUP)."""


@dataclass
class _Running:
    """A stage that was started."""

    process: subprocess.Popen[bytes]
    stage_run: StageRun
    taken: list[str]
    written: float
    """When its manifest was written last."""


class Runner:
    """Runs the stages of one run directory; see :func:`execute_stages`."""

    def __init__(self, records: Mapping[str, StageRecord], run: Path, machine: Machine, reporter: Reporter) -> None:
        self.records = records
        self.stages = {name: record.stage for name, record in records.items()}
        self.run, self.machine, self.reporter = run, machine, reporter
        self.session = f"{processes.mark_of(run)}{uuid.uuid4().hex}"
        self.running: dict[str, _Running] = {}
        self.signal: int | None = None

    def execute(self, actions: Mapping[str, Action], chosen: Sequence[str]) -> None:
        """Run the ``chosen`` stages. Raises RunError after a failure or a signal."""
        waiting = self._list_due(actions, chosen)
        try:
            while waiting or self.running:
                if self.signal is not None:
                    name = signal.Signals(self.signal).name
                    raise RunError(f"stopped by {name}; the same command goes on from here", 128 + self.signal)
                for name in list(waiting):
                    stage = self.stages[name]
                    is_ready = not any(parent in waiting or parent in self.running for parent in stage.waits_for())
                    if is_ready and self.machine.needs(stage) <= len(self.machine.free):
                        waiting.remove(name)
                        self._start(stage, actions[name])
                for name, running in list(self.running.items()):
                    if running.process.poll() is not None:
                        failure = self._close(name)
                        if failure is not None:
                            said = f"{failure.problem}; its log: {self.run / name / LOG_FILE}\n{failure.message}"
                            raise RunError(f"stage {name} {said}", failure.status)
                    elif time.monotonic() - running.written > MANIFEST_SECONDS:
                        running.written = time.monotonic()
                        running.stage_run.keep_time()
                self.reporter.update()
                time.sleep(POLL_SECONDS)
        finally:
            if self.running:
                processes.end_marked(f"{self.session}:")
            for name in list(self.running):
                self._close(name, "stopped")

    def on_signal(self, number: int, _: object) -> None:
        """Note a signal; the loop ends at its next turn, and the children with it."""
        self.signal = number

    def _list_due(self, actions: Mapping[str, Action], chosen: Sequence[str]) -> list[str]:
        """The stages that have something to do; the others are reported as skipped.

        First those behind which the longest chain of work waits, in tokens per process.
        """
        urgency: dict[str, float] = {}
        for stage in reversed(self.stages.values()):
            behind = [urgency[child.name] for child in self.stages.values() if stage.name in child.waits_for()]
            urgency[stage.name] = (stage.tokens or 0) / stage.processes + max(behind, default=0.0)
        due = []
        for name in self.stages:
            if name not in chosen:
                self.reporter.set(name, "skipped", "not in --only")
            elif actions[name].verb == SKIP:
                self.reporter.set(name, "skipped", actions[name].why)
            else:
                due.append(name)
        return sorted(due, key=lambda name: -urgency[name])

    def _start(self, stage: Stage, action: Action) -> None:
        device = "gpu" if self.machine.gpus and stage.on_gpu else "cpu"
        stage_run = StageRun(self.run, self.records[stage.name])
        stage_run.begin(action, device, f"bash {SCRIPT_FILE}")
        taken = self.machine.take(stage)
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(taken) if self.machine.gpus else ""}
        mark = {processes.MARK_VARIABLE: f"{self.session}:{stage.name}:"}
        with (stage_run.directory / LOG_FILE).open("ab") as log:
            process = subprocess.Popen(
                ["bash", SCRIPT_FILE],
                cwd=stage_run.directory,
                env={**os.environ, **gpus, **mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running[stage.name] = _Running(process, stage_run, taken, time.monotonic())
        self.reporter.set(stage.name, "running", f"{action.verb}: {action.why}")

    def _close(self, name: str, status: str = "") -> Failure | None:
        """A stage's process has ended, or has to: end what is left of it, note its status, free its slots.

        Without a ``status`` its end decides between finished and failed.
        """
        running = self.running.pop(name)
        processes.end_marked(f"{self.session}:{name}:")
        code = running.process.wait()
        self.machine.free[:0] = running.taken
        failure = running.stage_run.find_failure(code)
        if not status:
            status = "failed" if failure else "finished"
        with contextlib.suppress(FileNotFoundError):  # somebody removed the run under us: nothing to note, still stop
            running.stage_run.end(code, status)
        self.reporter.set(name, status, f"{running.stage_run.manifest.seconds:.0f} s")
        return failure


@contextlib.contextmanager
def _handle_signals(runner: Runner) -> Iterator[None]:
    """Let a signal that would end this process stop the run first."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
        for number in _SIGNALS:
            before[number] = signal.signal(number, runner.on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def execute_stages(
    stages: Sequence[Stage],
    run: Path,
    machine: Machine,
    reporter: Reporter,
    only: Sequence[str] = (),
    records: Mapping[str, str] | None = None,
    rerun: Sequence[str] = (),
) -> None:
    """Run ``stages`` (parents first) in the directory ``run``; ``only`` some of them when given.

    Args:
        records: name -> text of files that are written into ``run`` first.
        rerun: stages that run again whatever is there, once; their old folders stay beside them, dated.

    Raises:
        InputError: the run directory is in use, by jobs of Slurm too, or not ours, a stage needs GPUs that are not
            there, the parents of ``only`` are not finished, or a stage would have to be kept (see :class:`Action`).
        RunError: a stage failed, or a signal stopped the run.
    """
    run = run.resolve()
    check_run(run)
    run.mkdir(parents=True, exist_ok=True)
    with lock_run(run):
        check_no_jobs(run)  # a btx submit that began before has submitted its jobs by now
        processes.end_marked(processes.mark_of(run))  # of an earlier run whose guard was killed as well
        actions = decide(stages, run, rerun)
        chosen = list(only) or list(actions)
        check_chosen(stages, actions, chosen)
        check_kept(run, actions, chosen)
        for stage in stages:
            is_due = stage.name in chosen and actions[stage.name].verb != SKIP
            if is_due and machine.needs(stage) > machine.size:
                raise InputError(
                    f"stage {stage.name}: {stage.processes} processes need as many GPUs, found {machine.size}; "
                    "change its layout in the recipe, or run on the CPU with --cpu"
                )
        for name, text in (records or {}).items():
            write_atomically(run / name, text)
        runner = Runner(make_records(stages, actions, rerun), run, machine, reporter)
        with processes.guard(f"{runner.session}:"), _handle_signals(runner):
            runner.execute(actions, chosen)


class Machine:
    """The GPUs, or where there are none the cores, that stages take while they run."""

    def __init__(self, gpus: Sequence[str], cores: int) -> None:
        self.gpus = tuple(gpus)
        self.free = list(gpus) or [str(core) for core in range(cores)]
        self.size = len(self.free)

    @staticmethod
    def found(use_gpus: bool = True) -> Machine:
        """This machine: what CUDA_VISIBLE_DEVICES or else nvidia-smi lists, and the cores this process may use."""
        gpus: list[str] = []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if use_gpus and visible is not None:
            gpus = [device for device in visible.split(",") if device.strip() not in ("", "-1")]
        elif use_gpus and shutil.which("nvidia-smi"):
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
            gpus = [str(number) for number in range(len(re.findall(r"^GPU \d+", listed.stdout, re.MULTILINE)))]
        return Machine(gpus, len(os.sched_getaffinity(0)))

    def needs(self, stage: Stage) -> int:
        """Slots that ``stage`` takes. Where there are GPUs, a stage that uses none takes none."""
        if not self.gpus:
            return min(stage.processes * stage.threads, self.size)
        if stage.on_gpu:
            return stage.processes
        return 0

    def take(self, stage: Stage) -> list[str]:
        """The slots of ``stage``, which are no longer free."""
        count = self.needs(stage)
        taken = self.free[:count]
        del self.free[:count]
        return taken
