"""The errors of the project: one line each, for the person who can mend it.

A message names what is wrong, where (file, key or tensor), what was found, what was expected, and the
remedy. Programs print it on stderr and exit with status 2, or 1 where a machine failed; see :func:`is_of_the_machine`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

BAD_INPUT_EXIT_CODE = 2
MACHINE_EXIT_CODE = 1
"""Nobody's input was bad: a scheduler should start the run again."""
_LINE_AT_MOST = 4000
_OF_THE_MACHINE = """
EIO ESTALE EREMOTEIO EBADMSG EUCLEAN ENOLCK ENXIO ENODEV ENOMEM ENFILE EINTR ECHILD ESRCH EPIPE ECONNRESET
ECONNABORTED ECONNREFUSED ENOTCONN ESHUTDOWN ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENETRESET
""".split()
"""A disk, a connection, another process or the system's own tables. All else is for a person, a full disk too."""


class BTXError(Exception):
    """Base of every error this project raises on purpose."""


class MachineError(BTXError):
    """A process, a machine or a disk failed, and nobody's input is bad: the same command goes on from what is saved."""


class InputError(BTXError):
    """Bad usage or bad input: nothing was written, or nothing that loads."""


class KeptError(InputError):
    """What was written so far stays: the same command goes on from it once the cause is gone."""


class CheckpointError(InputError):
    """A checkpoint that cannot be read, or that does not hold what is needed."""


class MegatronVersionError(BTXError):
    """The installed Megatron does not have the form that a stand-in or an injection relies on."""


def is_of_the_machine(error: BaseException | None) -> bool:
    """Whether a machine failed and nobody's input is bad: this error says so, or one that it was raised from."""
    while error is not None:
        if isinstance(error, MachineError | ConnectionError | TimeoutError):
            return True
        if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in _OF_THE_MACHINE:
            return True
        error = error.__cause__
    return False


def as_ours(error: OSError) -> BTXError:
    """What the system says, as an error of ours."""
    where = f"{error.filename}: " if error.filename else ""
    text = f"{where}{error.strerror or error}"
    if is_of_the_machine(error):
        return MachineError(f"{text}: a disk, a connection or a process failed; start the same command again")
    return InputError(text)


@contextlib.contextmanager
def bare_exceptions_as(error_of: Callable[[BaseException], Exception]) -> Iterator[None]:
    """Turn the bare ``Exception`` that the ``tokenizers`` library raises for all its errors into one that says more.

    What it panics at, a ``PanicException`` beside all classes of errors, is turned too. Errors that have a class of
    their own pass: catching them here would hide defects.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise error_of(error) from error


def exits_with_one_line(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap a command's main: a BTXError or an OSError becomes one line on stderr and exit status 2, or 1.

    :func:`is_of_the_machine` decides. Every other exception is a defect of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(*arguments: object, **named: object) -> int:
        try:
            status = main(*arguments, **named)
            print(end="", flush=True)  # while it can be said
            return status
        except (BTXError, OSError) as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                return 128 + signal.SIGPIPE
            told = as_ours(error) if isinstance(error, OSError) else error
            print_error(str(told))
            return MACHINE_EXIT_CODE if is_of_the_machine(error) else BAD_INPUT_EXIT_CODE
        except SystemExit as error:
            if not isinstance(error.__context__, BrokenPipeError):  # rich says it so
                raise
            return 128 + signal.SIGPIPE
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapped


def _nobody_reads() -> bool:
    """Whether who read our output has left, as head does; then the rest of it goes nowhere."""
    asked = select.poll()
    asked.register(1, 0)
    is_gone = bool(asked.poll(0))
    if is_gone:  # Python writes what is left when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return is_gone


def printable(text: str) -> str:
    """A stranger's text without what a terminal would obey or could not show, such as bytes of a file's name."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_error(text: str) -> None:
    """One line on stderr: of a distributed run's ranks the first says "error:", the others say who they are before it.

    They may not be silent: a file can be missing on one node alone, and metrics are written by the last rank. Names
    that come out of strangers' files are shown without control characters, which a terminal would obey.
    """
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    who = "" if rank == "0" else f"rank {rank}: "
    line = printable(" ".join(text.split()))
    if len(line) > _LINE_AT_MOST:  # the remedy stands at the end
        line = f"{line[: _LINE_AT_MOST // 2]} [...] {line[-_LINE_AT_MOST // 2 :]}"
    print(f"{who}error: {line}", file=sys.stderr, flush=True)


def refused(refusal: Exception) -> InputError:
    """What Megatron's own checks say, by assertions and ValueErrors; the asserted line where they say nothing."""
    frame = traceback.extract_tb(refusal.__traceback__)[-1]
    line = f"{frame.line} does not hold ({frame.filename.rpartition('site-packages/')[2]}:{frame.lineno})"
    return InputError(f"Megatron refuses these arguments: {str(refusal) or line}")
