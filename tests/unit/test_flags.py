"""Every flag of ours stands in --help with its default, and in the README's table."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_btx.arguments import add_btx_arguments
from megatron_btx.routing.analyze import add_analysis_arguments
from megatron_btx.routing.warm_start import add_init_arguments

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def flags() -> dict[str, argparse.Action]:
    parser = argparse.ArgumentParser(add_help=False)
    for add in (add_btx_arguments, add_init_arguments, add_analysis_arguments):
        add(parser)
    return {action.option_strings[0]: action for action in parser._actions}


def test_there_are_flags():
    assert len(flags()) > 25


@pytest.mark.parametrize("flag", sorted(flags()))
def test_flag_is_documented(flag):
    """One row of the table, with the default where it is a number or a word; the help says its default."""
    action = flags()[flag]
    rows = [line for line in README.splitlines() if line.startswith(f"| `{flag}") and line[3 + len(flag)] in " `"]
    assert len(rows) == 1, flag
    assert (
        "(default: " in action.help
        or "(required)" in action.help
        or "repeat for several" in action.help
        or ("the domain it stands for" in action.help)
    )
    if isinstance(action.default, int | float | str) and not isinstance(action.default, bool):
        default = rows[0].rstrip("| ").rpartition("|")[2].strip()
        if isinstance(action.default, str):
            assert default == action.default
        else:
            assert float(default) == action.default
