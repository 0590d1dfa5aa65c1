"""Why a stage failed, out of its log and its exit status, for the person at the terminal."""

from __future__ import annotations

import re
import signal

from megatron_btx.ground.errors import BAD_INPUT_EXIT_CODE

_LINES_SHOWN = 15
_KILLED_FOR: dict[int, str] = {
    signal.SIGKILL: ", most likely for want of memory: take a smaller micro-batch-size, or fewer processes at once",
    signal.SIGBUS: ", most likely because a disk or /dev/shm is full: make room there",
    signal.SIGSEGV: ", by a defect in a library: with PYTHONFAULTHANDLER=1 in the environment the log says where",
    signal.SIGABRT: ", by a library, whose reason stands in the log",
}


def failure_message(log: str, code: int) -> tuple[str, int]:
    """What to show of a failed start's log, and the exit status that it means for btx.

    Bad input (status 2, also when torchrun tells that of a worker) is shown by its one line, anything else by the
    end of the log, less torchrun's own report, which is long and hides the reason.
    """
    bad_input = code == BAD_INPUT_EXIT_CODE or bool(re.search(rf"exitcode\s*:\s*{BAD_INPUT_EXIT_CODE}\b", log))
    lines = re.findall(r"^(?:[\w./ -]+: )?error: .*$", log, re.MULTILINE)
    if bad_input and lines:
        return str(lines[0]), BAD_INPUT_EXIT_CODE
    told = re.split(r"^[EW]\d{4} .*torch/distributed/elastic", log, maxsplit=1, flags=re.MULTILINE)[0].rstrip() or log
    return "\n".join(f"  {line}" for line in told.rstrip().splitlines()[-_LINES_SHOWN:]), 1


def killed_by(log: str, code: int) -> str:
    """Which process of a failed start was ended by which signal, and what that mostly means; empty when none was.

    torchrun tells it of a rank in its own report alone, and ends the other ranks by SIGTERM.
    """
    ranks = [int(number) for number in re.findall(r"exitcode\s*:\s*-(\d+)\b", log)]
    ranks = [number for number in ranks if number != signal.SIGTERM] or ranks
    if ranks:
        return f"a rank was killed by {_cause(ranks[0])}"
    number = -code if code < 0 else code - 128  # as Python says it, or a shell
    return f"its process was killed by {_cause(number)}" if number in set(signal.Signals) else ""


def _cause(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    return f"signal {number} ({name}){_KILLED_FOR.get(number, '')}"
