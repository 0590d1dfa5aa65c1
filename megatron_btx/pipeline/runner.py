"""The local runner: a graph of subprocesses with manifests.

A stage's directory holds config.yaml, command.sh (what is executed), log.txt, manifest.json and its product. Finished
stages are skipped, stopped ones go on; where what decides a result has changed, the run stops before it begins. Nothing
is removed (:mod:`megatron_btx.pipeline.folder`), and whatever ends the runner, no process stays behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_btx.ground import manifest as manifests
from megatron_btx.ground.errors import InputError
from megatron_btx.ground.files import write_atomically
from megatron_btx.pipeline import processes
from megatron_btx.pipeline.failure import failure_message, killed_by
from megatron_btx.pipeline.folder import Action, check_chosen, check_run, decide, kept, prepare
from megatron_btx.pipeline.identity import identities, manifest_of
from megatron_btx.pipeline.stage import Stage

POLL_SECONDS = 0.2
MANIFEST_SECONDS = 15.0
"""Between two writings of a running stage's seconds, which a SIGKILL would lose."""
_TRACKER = "latest_checkpointed_iteration.txt"


class Reporter(Protocol):
    """Who is told what happens; see :class:`megatron_btx.pipeline.progress.Progress`."""

    def set(self, stage: str, state: str, why: str = "") -> None: ...
    def update(self) -> None: ...


class Machine:
    """The GPUs, or where there are none the cores, that stages take while they run."""

    def __init__(self, gpus: Sequence[str], cores: int) -> None:
        self.gpus = tuple(gpus)
        self.free = list(gpus) if gpus else [str(core) for core in range(cores)]
        self.size = len(self.free)

    @staticmethod
    def found(use_gpus: bool = True) -> Machine:
        """This machine: what CUDA_VISIBLE_DEVICES or else nvidia-smi lists, and the cores this process may use."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus: list[str] = []
        if use_gpus and visible is not None:
            gpus = [device for device in visible.split(",") if device.strip() not in ("", "-1")]
        elif use_gpus and shutil.which("nvidia-smi"):
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
            gpus = [str(number) for number, _ in enumerate(re.findall(r"^GPU \d+", listed.stdout, re.MULTILINE))]
        return Machine(gpus, len(os.sched_getaffinity(0)))

    def needs(self, stage: Stage) -> int:
        """Slots that ``stage`` takes. Where there are GPUs, a stage that uses none takes none."""
        if self.gpus:
            return stage.processes if stage.on_gpu else 0
        return min(stage.processes * stage.threads, self.size)

    def check(self, stages: Sequence[Stage]) -> None:
        """Refuse stages that have more processes than this machine has GPUs."""
        for stage in stages:
            if self.needs(stage) > self.size:
                raise InputError(
                    f"stage {stage.name}: {stage.processes} processes need as many GPUs, found {self.size}; "
                    "change its layout in the recipe, or run on the CPU with --cpu"
                )

    def environment(self, taken: Sequence[str]) -> dict[str, str]:
        """What tells a stage's processes their GPUs."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(taken) if self.gpus else ""}


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run directory for this process. Raises InputError when another one does."""
    with (run / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{run}: another btx run is at work here; wait for it, or give another --output") from None
        yield


def is_locked(run: Path) -> bool:
    """Whether a runner is at work in ``run``; writes nothing, because a run may be looked at that is not ours."""
    if not (run / ".lock").is_file():  # opening a pipe would wait forever
        return False
    try:
        with (run / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


class Runner:
    """Runs the stages of one run directory; see :func:`run_stages`."""

    def __init__(self, stages: Sequence[Stage], run: Path, machine: Machine, reporter: Reporter) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.run, self.machine, self.reporter = run, machine, reporter
        self.identities = identities(stages)
        self.session = f"{processes.mark_of(run)}{uuid.uuid4().hex}"
        self.running: dict[str, _Running] = {}
        self.signal: int | None = None

    def execute(self, actions: Mapping[str, Action], chosen: Sequence[str]) -> int:
        """Run the ``chosen`` stages; 0, or the exit status after a failure or a signal."""
        waiting = [name for name in self._by_urgency() if name in chosen and actions[name].verb != "skip"]
        for name in self.stages:
            if actions[name].verb == "skip" or name not in chosen:
                self.reporter.set(name, "skipped", actions[name].why if name in chosen else "not in --only")
        try:
            while waiting or self.running:
                if self.signal is not None:
                    return 128 + self.signal
                for name in [name for name in waiting if self._can_start(self.stages[name], waiting)]:
                    if self.machine.needs(self.stages[name]) <= len(self.machine.free):
                        waiting.remove(name)
                        self._start(self.stages[name], actions[name])
                for name in [name for name, running in self.running.items() if running.process.poll() is not None]:
                    if status := self._finish(name):
                        return status
                self._keep_time()
                self.reporter.update()
                time.sleep(POLL_SECONDS)
            return 0
        finally:
            self._stop_all()

    def on_signal(self, number: int, _: object) -> None:
        """Note a signal; the loop ends at its next turn, and the children with it."""
        self.signal = number

    def _by_urgency(self) -> list[str]:
        """Stages in the order of the longest chain of work that waits behind them (tokens per process)."""
        urgency: dict[str, float] = {}
        for stage in reversed(self.stages.values()):
            behind = [urgency[child.name] for child in self.stages.values() if stage.name in child.waits_for()]
            urgency[stage.name] = (stage.tokens or 0) / stage.processes + max(behind, default=0.0)
        return sorted(self.stages, key=lambda name: -urgency[name])

    def _can_start(self, stage: Stage, waiting: Sequence[str]) -> bool:
        return not any(parent in waiting or parent in self.running for parent in stage.waits_for())

    def _start(self, stage: Stage, action: Action) -> None:
        directory = self.run / stage.name
        on_gpu = bool(self.machine.gpus) and stage.on_gpu
        earlier = manifests.read_manifest(directory) if action.verb != "rerun" else None
        manifest = manifest_of(stage, self.identities[stage.name], "running", action.rerun) | {
            "versions": manifests.versions(),
            "device": "gpu" if on_gpu else "cpu",
            "starts": (earlier or {}).get("starts", 0) + 1,
            "seconds": (earlier or {}).get("seconds", 0.0),
        }
        prepare(stage, directory, action, manifest)
        taken = [self.machine.free.pop(0) for _ in range(self.machine.needs(stage))]
        mark = {processes.MARK_VARIABLE: f"{self.session}:{stage.name}:"}
        with (directory / "log.txt").open("ab") as log:
            log.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {action.verb}: bash command.sh\n".encode())
            log.flush()
            offset = log.tell()  # before the start: the stage shares our file's position and moves it
            process = subprocess.Popen(
                ["bash", "command.sh"],
                cwd=directory,
                env={**os.environ, **self.machine.environment(taken), **mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running[stage.name] = _Running(process, manifest, taken, offset, manifest["seconds"])
        self.reporter.set(stage.name, "running", f"{action.verb}: {action.why}")

    def _finish(self, name: str) -> int:
        """Take in an ended stage; 0 when it did its work, else the runner's exit status."""
        stage, running = self.stages[name], self.running[name]
        code = running.process.returncode
        problem = f"ended with status {code}" if code else _unfinished(stage, self.run / name)
        self._close(name, "failed" if problem else "finished")
        if not problem:
            return 0
        log = self.run / name / "log.txt"
        with log.open("rb") as stream:
            stream.seek(running.log_offset)
            text = stream.read().decode("utf-8", "replace")
        if killed := killed_by(text, code):
            problem = f"failed: {killed}"
        message, status = failure_message(text, code)
        print(f"error: stage {name} {problem}; its log: {log}\n{message}", file=sys.stderr, flush=True)
        return status

    def _close(self, name: str, status: str) -> None:
        """A stage's process has ended, or has to: end what is left of it, note its status, free its slots."""
        running = self.running[name]
        processes.end_marked(f"{self.session}:{name}:")
        running.process.wait()
        running.manifest |= {"status": status, "seconds": running.total_seconds(), "exit": running.process.returncode}
        del self.running[name]
        self.machine.free[:0] = running.taken
        with contextlib.suppress(FileNotFoundError):  # somebody removed the run under us: nothing to note, still stop
            manifests.write_manifest(self.run / name, running.manifest)
        self.reporter.set(name, status, f"{running.manifest['seconds']:.0f} s")

    def _keep_time(self) -> None:
        for name, running in self.running.items():
            if time.monotonic() - running.written > MANIFEST_SECONDS:
                running.written = time.monotonic()
                manifests.write_manifest(self.run / name, running.manifest | {"seconds": running.total_seconds()})

    def _stop_all(self) -> None:
        if self.running:
            processes.end_marked(f"{self.session}:")
        for name in list(self.running):
            self._close(name, "stopped")


@dataclass
class _Running:
    """A stage that was started."""

    process: subprocess.Popen[bytes]
    manifest: dict[str, Any]
    taken: list[str]
    log_offset: int
    earlier_seconds: float

    def __post_init__(self) -> None:
        self.started = self.written = time.monotonic()

    def total_seconds(self) -> float:
        """Seconds of all its starts."""
        return round(self.earlier_seconds + time.monotonic() - self.started, 3)


def _unfinished(stage: Stage, directory: Path) -> str:
    """Why a stage that ended with status 0 is not finished; empty when it is."""
    if not (directory / stage.product).exists():
        return f"ended without its product {stage.product}"
    if stage.iterations is not None and stage.product.endswith(_TRACKER):
        reached = (directory / stage.product).read_text(encoding="utf-8").strip()
        if reached != str(stage.iterations):
            return f"ended at iteration {reached} of {stage.iterations}"
    return ""


def run_stages(
    stages: Sequence[Stage],
    run: Path,
    machine: Machine,
    reporter: Reporter,
    only: Sequence[str] = (),
    records: Mapping[str, str] | None = None,
    rerun: Sequence[str] = (),
) -> int:
    """Run ``stages`` (parents first) in the directory ``run``; ``only`` some of them when given.

    Args:
        records: name -> text of files that are written into ``run`` first.
        rerun: stages that run again whatever is there, once; their old folders stay beside them, dated.

    Returns:
        0; 1 or 2 when a stage failed (2: on bad input); 128 + n when signal n (SIGINT, SIGTERM, SIGHUP) stopped it.

    Raises:
        InputError: the run directory is in use or not ours, a stage needs GPUs that are not there, the parents of
            ``only`` are not finished, or a stage would have to be kept (see :class:`Action`).
    """
    run = run.resolve()
    check_run(run)
    run.mkdir(parents=True, exist_ok=True)
    with locked(run):
        processes.end_marked(processes.mark_of(run))  # of an earlier run whose guard was killed as well
        actions = decide(stages, run, rerun)
        chosen = list(only) or [stage.name for stage in stages]
        check_chosen(stages, actions, chosen)
        if changed := kept(actions, chosen):
            raise InputError(f"{run}: made otherwise: {changed}; run these stages again by name, or in another folder")
        machine.check([stage for stage in stages if stage.name in chosen and actions[stage.name].verb != "skip"])
        for name, text in (records or {}).items():
            write_atomically(run / name, text)
        runner = Runner(stages, run, machine, reporter)
        guard = subprocess.Popen(
            [sys.executable, "-P", processes.__file__, f"{runner.session}:"],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, runner.on_signal) for number in handled}
        try:
            return runner.execute(actions, chosen)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            guard.communicate()
