"""The errors of the project: one line each, for the person who can mend it.

A message names what is wrong, where (file, key or tensor), what was found, what was expected, and the
remedy. Programs print it on stderr and exit with status 2; see :func:`exits_with_one_line`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator

BAD_INPUT_EXIT_CODE = 2
MACHINE_EXIT_CODE = 1
"""Nobody's input was bad: a scheduler should start the run again."""
_LINE_AT_MOST = 4000


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


@contextlib.contextmanager
def bare_exceptions_as(error_of: Callable[[Exception], Exception]) -> Iterator[None]:
    """Turn the bare ``Exception`` that the ``tokenizers`` library raises for all its errors into one that says more.

    Errors that have a class of their own pass: catching them here would hide defects.
    """
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise error_of(error) from error


def exits_with_one_line(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap a command's main: a BTXError becomes one line on stderr and exit status 2; 1 for a MachineError.

    OSErrors (a full disk, an unreadable folder) are treated alike, because the person at the keyboard is
    the one who can mend them; every other exception is a defect of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(*arguments: object, **named: object) -> int:
        try:
            return main(*arguments, **named)
        except MachineError as error:
            print_error(str(error))
            return MACHINE_EXIT_CODE
        except BTXError as error:
            print_error(str(error))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            print_error(f"{where}{error.strerror or error}")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        return BAD_INPUT_EXIT_CODE

    return wrapped


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
