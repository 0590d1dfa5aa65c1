"""Errors become one line on stderr and exit code 2; defects of ours keep their traceback."""

from __future__ import annotations

import os

import pytest

from megatron_btx.ground.errors import BTXError, CheckpointError, InputError, MegatronVersionError, exits_with_one_line


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


def test_success_says_nothing(capsys):
    assert ending_with(None)() == 0
    assert capsys.readouterr().err == ""


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
