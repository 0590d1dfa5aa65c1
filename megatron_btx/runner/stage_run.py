"""One start of a stage, from the folder it starts in to what its manifest says of its end; and why it failed.

The local runner and the jobs of Slurm both go this way. Nothing in a stage's folder is ever removed.
"""

from __future__ import annotations

import re
import signal
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_btx.common import manifest as manifests
from megatron_btx.common.errors import BAD_INPUT_EXIT_CODE, InputError, printable
from megatron_btx.common.files import read_json_object, refuse_unusual, write_atomically
from megatron_btx.recipe.names import CONFIG_FILE, LOG_FILE, SCRIPT_FILE, STAGE_RECORDS, TRACKER_FILE, place_of
from megatron_btx.recipe.options import say_keys
from megatron_btx.runner.decisions import RERUN, Action
from megatron_btx.runner.run_dir import find_free_name, own_manifest, read_checkpointed_iteration, read_end, say_first
from megatron_btx.runner.schemas import JobStart, StageManifest, StageRecord
from megatron_btx.runner.scripts import command_script, config_text
from megatron_btx.runner.slurm_queue import SLURM_FOLDER

_LINES_SHOWN = 15
_ERROR = re.compile(r"\s*(\[?[\w./ -]+\]?: )?(error|[\w.]*(Error|Exception|Interrupt))(:|$)")
_BAD_INPUT_OF_ONE = re.compile(rf"(exitcode\s*:\s*|Exited with exit code ){BAD_INPUT_EXIT_CODE}\b")
"""What torchrun and srun say of a process that refused its input."""
_SIGNALS = frozenset(signal.Signals)
_KILLED_FOR: dict[int, str] = {
    signal.SIGKILL: ", most likely for want of memory: take a smaller micro-batch-size, or fewer processes at once",
    signal.SIGBUS: ", most likely because a disk or /dev/shm is full: make room there",
    signal.SIGSEGV: ", by a defect in a library: with PYTHONFAULTHANDLER=1 in the environment the log says where",
    signal.SIGABRT: ", by a library, whose reason stands in the log",
}


@dataclass(frozen=True)
class Failure:
    """Why a stage is not finished."""

    problem: str
    """In a few words."""
    message: str
    """The line that says it, or the end of the log."""
    status: int
    """For who started it: 2 for bad input, else 1."""
    log: str
    """All that this start wrote."""


class StageRun:
    """One start of a stage in its folder."""

    def __init__(self, run: Path, record: StageRecord, manifest: StageManifest | None = None) -> None:
        """``manifest`` is that of a start which goes on already: a job ends in another process than it begins in."""
        self.stage, self.identity = record.stage, record.identity
        self.directory = run / record.stage.name
        self.manifest = manifest or StageManifest()
        self.earlier_seconds = self.manifest.seconds or 0.0
        self.log_offset = self.manifest.slurm.log_offset or 0

    def begin(self, action: Action, device: str, starter: str, job: JobStart | None = None) -> None:
        """Prepare the folder, and write into it what starts. Starts and seconds go on from those of earlier starts.

        The manifest is written first, so that a kill leaves a folder that is empty or known to be ours. What an
        earlier start left is renamed and stays.

        Args:
            starter: what runs the program, for the log.

        Raises:
            InputError: something else lies in the folder.
        """
        if action.verb == RERUN:
            self.directory.rename(find_free_name(self.directory))
        earlier = own_manifest(self.directory, self.stage.name)
        self.earlier_seconds = earlier.seconds or 0.0
        start = {
            "versions": manifests.versions(),
            "device": device,
            "starts": (earlier.starts or 0) + 1,
            "started": time.time(),
            "seconds": self.earlier_seconds,
        }
        if job is not None:
            start["slurm"] = job
        self.manifest = StageManifest.of_stage(self.stage, self.identity, "running", action.rerun)
        self.directory.mkdir(parents=True, exist_ok=True)
        log = self.directory / LOG_FILE
        refuse_unusual(log)
        self._note(**start)
        if not self.stage.resumable and not self.stage.only_shows:
            beside = find_free_name(self.directory)
            for path in list(self.directory.iterdir()):
                if path.name not in STAGE_RECORDS and not path.name.startswith("."):  # a conversion goes on from those
                    beside.mkdir(exist_ok=True)
                    path.rename(beside / path.name)
        write_atomically(self.directory / CONFIG_FILE, config_text(self.stage))
        write_atomically(self.directory / SCRIPT_FILE, command_script(self.stage))
        with log.open("ab") as stream:
            stream.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {action.verb}: {starter}\n".encode())
            self.log_offset = stream.tell()
        if job is not None:
            self._note(slurm=job.model_copy(update={"log_offset": self.log_offset}))

    def keep_time(self) -> None:
        """Note the seconds so far, which a SIGKILL would lose."""
        self._note(seconds=self._count_seconds())

    def end(self, code: int | None, status: str, problem: str = "") -> None:
        """Note that the program has ended with ``code``, and what became of the stage; the problem is a job's."""
        if problem:
            self._note(slurm=self.manifest.slurm.model_copy(update={"problem": problem}))
        self._note(status=status, seconds=self._count_seconds(), exit=code)

    def find_failure(self, code: int) -> Failure | None:
        """Why a stage whose program ended with ``code`` is not finished; None when it is."""
        stage = self.stage
        reached = read_checkpointed_iteration(self.directory)
        if code:
            problem = f"ended with status {code}"
        elif not (self.directory / stage.product).exists():
            problem = f"ended without its product {stage.product}"
        elif stage.product == TRACKER_FILE and stage.iterations not in (None, reached):
            problem = f"ended at iteration {reached} of {stage.iterations}"
        else:
            return None
        text = read_end(self.directory / LOG_FILE, self.log_offset)
        killed = killed_by(text, code)
        if killed:
            problem = f"failed: {killed}"
        message, status = failure_message(text, code, stage.name)
        return Failure(problem, message, status, text)

    def _count_seconds(self) -> float:
        now = time.time()
        return round(self.earlier_seconds + max(0.0, now - (self.manifest.started or now)), 3)

    def _note(self, **changes: object) -> None:
        self.manifest = self.manifest.model_copy(update=changes)
        manifests.write_manifest(self.directory, self.manifest.content())


def write_record(run: Path, record: StageRecord) -> None:
    """Write what a job must know of its stage, without the settings that its identity has already."""
    record = replace(record, stage=replace(record.stage, settings=None))
    text = TypeAdapter(StageRecord).dump_json(record, indent=1, fallback=str)
    write_atomically(run / SLURM_FOLDER / f"{record.stage.name}.json", text + b"\n")


def read_record(run: Path, name: str) -> StageRecord:
    """What a job must know of its stage. Raises InputError where it is not there, or of another form."""
    path = run / SLURM_FOLDER / f"{name}.json"
    remedy = "btx submit writes it again"
    try:
        return TypeAdapter(StageRecord).validate_python(read_json_object(path, remedy))
    except ValidationError as error:
        raise InputError(f"{path}: not the record of a stage ({say_first(error)}); {remedy}") from None


def failure_message(log: str, code: int, stage: str = "") -> tuple[str, int]:
    """What to show of a failed start's log, and the exit status that it means for btx.

    Bad input (status 2, also when torchrun or srun tells that of one process) is shown by its one line, with the
    recipe's keys in place of flags. Anything else is shown by the end of the log, less torchrun's own report, which is
    long and hides the reason.
    """
    bad_input = code == BAD_INPUT_EXIT_CODE or _BAD_INPUT_OF_ONE.search(log)
    lines = re.findall(r"^(?:[\w./ -]+: )?error: .*$", log, re.MULTILINE)
    if bad_input and lines:
        return say_keys(str(lines[0]), place_of(stage)), BAD_INPUT_EXIT_CODE
    before_report = re.split(r"^[EW]\d{4} .*torch/distributed/elastic", log, maxsplit=1, flags=re.MULTILINE)[0].rstrip()
    shown = (before_report or log.rstrip()).splitlines()[-_LINES_SHOWN:]
    return textwrap.indent("\n".join(shown), "  ", lambda _: True), 1


def last_words(log: Path) -> str:
    """The line at a log's end that most likely says why the last start failed: an error, or the last one."""
    lines = read_end(log).rpartition("\n== ")[2].splitlines()
    shown, _ = failure_message("\n".join(line[:400] for line in lines if not line.startswith("srun: ")), 1)
    errors = [line for line in shown.splitlines() if _ERROR.match(line)]
    return printable((errors or shown.splitlines() or ["nothing said"])[-1].strip())


def killed_by(log: str, code: int) -> str:
    """Which process of a failed start was ended by which signal, and what that mostly means; empty when none was.

    torchrun tells it of a rank in its own report alone, and ends the other ranks by SIGTERM.
    """
    number, who = -code if code < 0 else code - 128, "its process"  # as Python says it, and as a shell does
    ranks = [int(found) for found in re.findall(r"exitcode\s*:\s*-(\d+)\b", log)]
    if ranks:
        number, who = next((found for found in ranks if found != signal.SIGTERM), ranks[0]), "a rank"
    if number not in _SIGNALS:
        return ""
    return f"{who} was killed by signal {number} ({signal.Signals(number).name}){_KILLED_FOR.get(number, '')}"
