"""Errors become one line on stderr and exit code 2; defects of ours keep their traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from megatron_btx.common.errors import (
    BTXError,
    CheckpointError,
    InputError,
    KeptError,
    MachineError,
    MegatronVersionError,
    as_ours,
    exits_with_one_line,
)


def ending_with(raised: BaseException | None):
    @exits_with_one_line
    def main() -> int:
        if raised is not None:
            raise raised
        return 0

    return main


@pytest.mark.parametrize("kind", [BTXError, InputError, CheckpointError, MegatronVersionError])
def test_errors_on_purpose(kind, capsys):
    """One line, even of a text of several; status 2; nothing on stdout."""
    assert ending_with(kind("file x:\n  found 1,\n  expected 2"))() == 2
    shown = capsys.readouterr()
    assert shown.err == "error: file x: found 1, expected 2\n" and shown.out == ""


def test_errors_of_the_system_name_the_file(tmp_path, capsys):
    @exits_with_one_line
    def main() -> int:
        (tmp_path / "missing").read_text()
        return 0

    assert main() == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'missing'}: No such file or directory\n"
    assert ending_with(OSError("some library's own text"))() == 2
    assert capsys.readouterr().err == "error: some library's own text\n"


MACHINE = "EPIPE ECONNRESET EIO ESTALE ETIMEDOUT EHOSTUNREACH ENOMEM ENOLCK EBADMSG".split()
PERSON = "ENOENT EACCES EPERM EISDIR ENOTDIR EROFS ENOSPC EDQUOT EFBIG EMFILE ENAMETOOLONG ENOTEMPTY".split()


@pytest.mark.parametrize("name", [*MACHINE, *PERSON])
def test_who_can_mend_what_the_system_says(name, capsys):
    """A failing disk, connection or process is tried again, alone and as the cause of an error of ours."""
    number = getattr(errno, name)
    said, status = OSError(number, os.strerror(number), "/shared/file"), 1 if name in MACHINE else 2
    assert ending_with(said)() == status
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: /shared/file: {os.strerror(number)}") and shown.count("\n") == 1
    assert ("start the same command again" in shown) == (status == 1)
    for kind in (InputError, CheckpointError, KeptError):
        outer = kind("the checkpoint cannot be read")
        outer.__cause__ = ValueError("what a library makes of it")
        outer.__cause__.__cause__ = said
        assert ending_with(outer)() == status
        assert capsys.readouterr().err == "error: the checkpoint cannot be read\n"
    assert isinstance(as_ours(said), MachineError) == (status == 1)


@pytest.mark.parametrize("error", [ConnectionResetError(), BrokenPipeError(), TimeoutError(), MachineError("x")])
def test_a_machine_without_a_number(error):
    assert ending_with(error)() == 1


def test_success_says_nothing(capsys):
    assert ending_with(None)() == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("write", ["print", "sys.stdout.write", "__import__('rich').print"])
def test_who_stops_reading_is_no_failure(write):
    """As head does: whether it leaves while we write, or before what is left is written at the end."""
    program = (
        "import sys; from megatron_btx.common.errors import exits_with_one_line\n"
        "@exits_with_one_line\n"
        f"def main():\n    sys.stdin.read(); {write}('x' * 9000); {write}('x' * 9); return 0\n"
        "sys.exit(main())"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_interrupted(capsys):
    assert ending_with(KeyboardInterrupt())() == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("defect", [ValueError("x"), AssertionError(), KeyError("x"), SystemExit(3)])
def test_defects_are_not_hidden(defect):
    """An exception that nobody planned is a defect: it must not look like the user's mistake."""
    with pytest.raises(type(defect)):
        ending_with(defect)()


def test_ranks_say_who_they_are(capsys, monkeypatch):
    """The first rank's line is the error; another's is never silent, and told apart from it."""
    monkeypatch.setitem(os.environ, "RANK", "0")
    assert ending_with(InputError("x"))() == 2
    assert capsys.readouterr().err == "error: x\n"
    monkeypatch.setitem(os.environ, "RANK", "3")
    assert ending_with(InputError("x"))() == 2
    assert capsys.readouterr().err == "rank 3: error: x\n"
