"""The training program with one fault in it: what the tests of this folder start in place of the program itself.

The environment names the fault: ``FAULT_AT`` a point below, ``FAULT_STEP`` the step that is being taken, saved or was
saved, ``FAULT_RANKS`` the ranks that it hits, and ``FAULT_SIGNAL`` what they get. The signal goes to this process or,
with ``FAULT_RANKS=all``, to all of its run; HANG in its place lets a rank sleep. ``FAULT_TIMEOUT_SECONDS`` shortens
``--distributed-timeout-minutes``, which takes whole minutes. Everything else is the program as users start it.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.iterations import TRACKER
from megatron_btx.training import program

MAIN_PROCESS = os.getpid()


def main() -> int:
    """Plant the fault, then train."""
    if "FAULT_TIMEOUT_SECONDS" in os.environ:
        _shorten_timeout(float(os.environ["FAULT_TIMEOUT_SECONDS"]))
    tempfile.tempdir = None  # TMPDIR of this run, not of the process that it was forked from
    POINTS[os.environ["FAULT_AT"]](int(os.environ["FAULT_STEP"]))
    result: int = program.main()
    return result


def _shorten_timeout(seconds: float) -> None:
    from megatron_btx.training import run

    checked = run.checked_arguments

    def checked_arguments() -> Any:
        args = checked()
        args.distributed_timeout_minutes = seconds / 60
        return args

    run.checked_arguments = checked_arguments


def _strike() -> None:
    """Send the signal, once in a run."""
    if os.environ["FAULT_SIGNAL"] == "HANG":
        if os.environ["RANK"] in os.environ["FAULT_RANKS"].split(","):
            time.sleep(600)
        return
    number = signal.Signals[os.environ["FAULT_SIGNAL"]]
    ranks = os.environ["FAULT_RANKS"].split(",")
    if ranks == ["all"]:
        os.killpg(os.getpgrp(), number)
    elif os.environ["RANK"] in ranks:
        os.kill(MAIN_PROCESS, number)
        if number in (signal.SIGKILL, signal.SIGSTOP) and os.getpid() != MAIN_PROCESS:
            time.sleep(60)  # a writer of a rank that is gone, as on a node that is gone


def _before(owner: Any, name: str, strike: Callable[..., None]) -> None:
    """Call ``strike`` with the arguments of a function before each of its calls."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*positional: Any, **named: Any) -> Any:
        strike(*positional, **named)
        return original(*positional, **named)

    setattr(owner, name, call)


def in_step(step: int) -> None:
    """In the forward pass of a step."""
    from megatron.training import get_args

    from megatron_btx.training import run

    def strike(*_: Any, **__: Any) -> None:
        if get_args().curr_iteration == step - 1:
            _strike()

    _before(run, "forward_step", strike)


def while_saving(step: int) -> None:
    """After the first records of a checkpoint are written, before its index is."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    written: list[str] = []

    def strike(_: Any, stream: Any, *__: Any, **___: Any) -> None:
        written.append(stream.name)
        if f"iter_{step:07d}" in str(stream.name) and len(written) % 4 == 0:
            stream.flush()
            _strike()

    _before(filesystem_async, "_write_item", strike)


def before_tracker(step: int) -> None:
    """When the checkpoint of a step is whole and its tracker still names the one before."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.training import checkpointing

    saved: list[str] = []
    _before(serialization, "save_config", lambda _, folder: saved.append(str(folder)))

    def strike(_: Any) -> None:
        if saved and saved[-1].endswith(f"iter_{step:07d}"):
            _strike()

    _before(checkpointing, "get_checkpoint_tracker_filename", strike)


def while_loading(step: int) -> None:
    """While the state of a checkpoint is read."""
    from megatron.core import dist_checkpointing

    def strike(_: Any, folder: Any, *__: Any, **___: Any) -> None:
        if str(folder).endswith(f"iter_{step:07d}"):
            _strike()

    _before(dist_checkpointing, "load", strike)


def data_gone(step: int) -> None:
    """The dataset ``FAULT_PATH`` is removed before a step."""

    def remove() -> None:
        for suffix in (".bin", ".idx"):
            Path(os.environ["FAULT_PATH"] + suffix).unlink()

    _at_step(step, remove)


def data_cut(step: int) -> None:
    """Somebody writes the dataset ``FAULT_PATH`` anew: its file is empty before a step."""
    _at_step(step, lambda: os.truncate(os.environ["FAULT_PATH"] + ".bin", 0))


def clock_jumps(step: int) -> None:
    """From a step on the clock is a day late, and from the next on ten years ahead."""
    clock = time.time

    def jump(by_seconds: float) -> Callable[[], None]:
        return lambda: setattr(time, "time", lambda: clock() + by_seconds)

    _at_step(step, jump(-86400.0))
    _at_step(step + 1, jump(3e8))


def quota(step: int) -> None:
    """The kernel's answer to a writer that is over its quota, in the checkpoint of a step."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def strike(_: Any, stream: Any, *__: Any, **___: Any) -> None:
        if f"iter_{step:07d}" in str(stream.name):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(stream.name))

    _before(filesystem_async, "_write_item", strike)


def writer_gone(step: int) -> None:
    """The process that writes checkpoints in the background is killed while it writes that of a step."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def strike(_: Any, stream: Any, *__: Any, **___: Any) -> None:
        if f"iter_{step:07d}" in str(stream.name):
            os.kill(os.getpid(), signal.SIGKILL)

    _before(filesystem_async, "_write_item", strike)


def bad_loss(step: int) -> None:
    """The losses of a step are multiplied by ``FAULT_SIGNAL``: nan, inf, or a number; below 0, of all from there on."""
    from megatron.training import get_args

    from megatron_btx.training import run

    forward = run.forward_step

    def multiplied(*positional: Any, **named: Any) -> Any:
        output, loss_function = forward(*positional, **named)
        taken = get_args().curr_iteration + 1
        is_bad = taken == step or 0 < -step <= taken
        if is_bad and os.environ["RANK"] in os.environ["FAULT_RANKS"].split(","):
            output = output * float(os.environ["FAULT_SIGNAL"])
        return output, loss_function

    run.forward_step = multiplied


def saved_again(step: int) -> None:
    """A loss of NaN, for which the step before is saved a second time; over its quota or, by a signal, killed."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def strike(_: Any, stream: Any, *__: Any, **___: Any) -> None:
        folder = Path(stream.name).parent
        tracker = folder.parent / TRACKER
        if folder.name != f"iter_{step - 1:07d}" or not tracker.exists() or tracker.read_text() != str(step - 1):
            return
        if fails_by == "EDQUOT":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(stream.name))
        stream.flush()
        os.environ["FAULT_SIGNAL"] = fails_by
        _strike()

    fails_by, os.environ["FAULT_SIGNAL"] = os.environ["FAULT_SIGNAL"], "nan"
    bad_loss(step)
    _before(filesystem_async, "_write_item", strike)


def bad_gradient(step: int) -> None:
    """One gradient of a step is multiplied by ``FAULT_SIGNAL``, in its first micro-batch; the losses are good."""
    from megatron.training import get_args

    from megatron_btx.training import run

    hooks: list[Any] = []

    def strike(_: Any, model: Any, **__: Any) -> None:
        is_bad = get_args().curr_iteration == step - 1 and os.environ["RANK"] in os.environ["FAULT_RANKS"].split(",")
        while hooks:
            hooks.pop().remove()
        if is_bad:
            parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
            hooks.append(parameter.register_hook(lambda gradient: gradient * float(os.environ["FAULT_SIGNAL"])))

    _before(run, "forward_step", strike)


def nothing(_: int) -> None:
    """No fault but those of the environment."""


def _at_step(step: int, act: Callable[[], None]) -> None:
    """Act once on the first of ``FAULT_RANKS``, before the first micro-batch of a step is read."""
    from megatron.training import get_args

    from megatron_btx.training import run

    done: list[int] = []

    def strike(*_: Any, **__: Any) -> None:
        if get_args().curr_iteration == step - 1 and not done and os.environ["RANK"] in os.environ["FAULT_RANKS"]:
            done.append(step)
            act()

    _before(run, "forward_step", strike)


POINTS = {
    function.__name__: function
    for function in (
        *(in_step, while_saving, before_tracker, while_loading),
        *(data_gone, data_cut, clock_jumps, quota, writer_gone, bad_loss, bad_gradient, saved_again, nothing),
    )
}

if __name__ == "__main__":
    sys.exit(main())
