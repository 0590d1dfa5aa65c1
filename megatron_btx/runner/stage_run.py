"""A stage's start and its end: its folder, its manifest, and why it failed. Nothing in the folder is ever removed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_btx.common import manifest as manifests
from megatron_btx.common.errors import BAD_INPUT_EXIT_CODE, printable
from megatron_btx.common.files import refuse_unusual, write_atomically
from megatron_btx.plan.fingerprint import Identity, manifest_of
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.names import CONFIG_FILE, LOG_FILE, SCRIPT_FILE, STAGE_RECORDS
from megatron_btx.recipe.options import place_of, say_keys
from megatron_btx.runner.decisions import RERUN, Action
from megatron_btx.runner.run_dir import find_free_name
from megatron_btx.runner.schemas import StageManifest
from megatron_btx.runner.scripts import command_script, config_text


def describe_start(
    stage: Stage, identity: Identity, action: Action, earlier: StageManifest, device: str
) -> dict[str, Any]:
    """The manifest of a stage that starts now. Starts and seconds go on from those of earlier starts."""
    return manifest_of(stage, identity, "running", action.rerun) | {
        "versions": manifests.versions(),
        "device": device,
        "starts": (earlier.starts or 0) + 1,
        "started": time.time(),
        "seconds": earlier.seconds or 0.0,
    }


def prepare_folder(stage: Stage, directory: Path, action: Action, manifest: Mapping[str, Any]) -> None:
    """Bring a stage's folder into the form from which its command can start.

    The manifest is written first, so that a kill leaves a folder that is empty or known to be ours. What an earlier
    start left is renamed and stays.
    """
    if action.verb == RERUN:
        directory.rename(find_free_name(directory))
    directory.mkdir(parents=True, exist_ok=True)
    refuse_unusual(directory / LOG_FILE)
    manifests.write_manifest(directory, manifest)
    if not stage.resumable and not stage.only_shows:
        _set_leftovers_aside(directory)
    write_atomically(directory / CONFIG_FILE, config_text(stage))
    write_atomically(directory / SCRIPT_FILE, command_script(stage))


def _set_leftovers_aside(directory: Path) -> None:
    """Move what a stopped start left out of the way. Hidden files stay: a conversion goes on from its own."""
    leftovers = []
    for path in directory.iterdir():
        if path.name not in STAGE_RECORDS and not path.name.startswith("."):
            leftovers.append(path)
    if not leftovers:
        return
    beside = find_free_name(directory)
    beside.mkdir()
    for path in leftovers:
        path.rename(beside / path.name)


_LINES_SHOWN = 15
_READ_BYTES = 1 << 22
_ERROR = re.compile(r"\s*(\[?[\w./ -]+\]?: )?(error|[\w.]*(Error|Exception|Interrupt))(:|$)")
_SIGNALS = frozenset(signal.Signals)
_KILLED_FOR: dict[int, str] = {
    signal.SIGKILL: ", most likely for want of memory: take a smaller micro-batch-size, or fewer processes at once",
    signal.SIGBUS: ", most likely because a disk or /dev/shm is full: make room there",
    signal.SIGSEGV: ", by a defect in a library: with PYTHONFAULTHANDLER=1 in the environment the log says where",
    signal.SIGABRT: ", by a library, whose reason stands in the log",
}


def read_log(log: Path, offset: int) -> str:
    """What was written into a log behind ``offset``: of much the end, and nothing where it is gone or no file."""
    if not log.is_file():  # opening a pipe would wait forever
        return ""
    with contextlib.suppress(FileNotFoundError), log.open("rb") as stream:
        stream.seek(max(offset, os.fstat(stream.fileno()).st_size - _READ_BYTES))
        return stream.read().decode("utf-8", "replace")
    return ""


def failure_message(log: str, code: int, stage: str = "") -> tuple[str, int]:
    """What to show of a failed start's log, and the exit status that it means for btx.

    Bad input (status 2, also when torchrun tells that of a worker) is shown by its one line, with the recipe's keys in
    place of flags, anything else by the
    end of the log, less torchrun's own report, which is long and hides the reason.
    """
    bad_input = code == BAD_INPUT_EXIT_CODE or bool(re.search(rf"exitcode\s*:\s*{BAD_INPUT_EXIT_CODE}\b", log))
    lines = re.findall(r"^(?:[\w./ -]+: )?error: .*$", log, re.MULTILINE)
    if bad_input and lines:
        return say_keys(str(lines[0]), place_of(stage)), BAD_INPUT_EXIT_CODE
    before_report = re.split(r"^[EW]\d{4} .*torch/distributed/elastic", log, maxsplit=1, flags=re.MULTILINE)[0].rstrip()
    shown = (before_report or log.rstrip()).splitlines()[-_LINES_SHOWN:]
    return textwrap.indent("\n".join(shown), "  ", lambda _: True), 1


def last_words(log: Path) -> str:
    """The line at a log's end that most likely says why the last start failed: an error, or the last one."""
    lines = read_log(log, 0).rpartition("\n== ")[2].splitlines()
    shown, _ = failure_message("\n".join(line[:400] for line in lines if not line.startswith("srun: ")), 1)
    errors = [line for line in shown.splitlines() if _ERROR.match(line)]
    return printable((errors or shown.splitlines() or ["nothing said"])[-1].strip())


def killed_by(log: str, code: int) -> str:
    """Which process of a failed start was ended by which signal, and what that mostly means; empty when none was.

    torchrun tells it of a rank in its own report alone, and ends the other ranks by SIGTERM.
    """
    ranks = [int(number) for number in re.findall(r"exitcode\s*:\s*-(\d+)\b", log)]
    if ranks:
        first = next((number for number in ranks if number != signal.SIGTERM), ranks[0])
        return f"a rank was killed by {_describe_signal(first)}"
    number = code - 128  # as a shell says it
    if code < 0:  # as Python does
        number = -code
    if number in _SIGNALS:
        return f"its process was killed by {_describe_signal(number)}"
    return ""


def _describe_signal(number: int) -> str:
    name = "unknown"
    if number in _SIGNALS:
        name = signal.Signals(number).name
    return f"signal {number} ({name}){_KILLED_FOR.get(number, '')}"
