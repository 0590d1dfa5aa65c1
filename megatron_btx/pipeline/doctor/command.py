"""The command ``btx doctor``: look at everything, print a table or JSON, and say by the status whether it will do."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from megatron_btx.ground.errors import BAD_INPUT_EXIT_CODE, exits_with_one_line
from megatron_btx.pipeline.doctor.finding import Finding, State

_DESCRIPTION = """
Say what this machine, or this container, has of what training needs: versions, GPUs and the kernels for them, Slurm,
folders and disk. Nothing is changed. The status is 2 if something that is needed is missing or cannot be used, else 0;
a library for GPUs that cannot be loaded on a machine without one, such as a login node, is no reason.
"""
_MARKS = {
    State.GOOD: ("ok", "green"),
    State.ABSENT: ("-", "dim"),
    State.NOTE: ("note", "yellow"),
    State.WRONG: ("WRONG", "bold red"),
}


def look() -> list[Finding]:
    """Everything that is looked at, in the order of the table."""
    from megatron_btx.pipeline.doctor.gpus import look_at_gpus
    from megatron_btx.pipeline.doctor.packages import look_at_packages
    from megatron_btx.pipeline.doctor.surroundings import look_around

    return list(itertools.chain(look_at_packages(), look_at_gpus(), look_around()))


def summarize(findings: Sequence[Finding]) -> str:
    """One line: whether it will do, and the versions that people ask for first."""
    found = {finding.name: finding.found for finding in findings}
    names = ("python", "torch", "megatron-core", "cuda", "nccl", "transformer engine", "apex", "GPUs")
    parts = [f"{name} {found[name].split(',')[0].split(';')[0]}" for name in names if name in found]
    problems = [finding.name for finding in findings if finding.state is State.WRONG]
    verdict = f"not well ({', '.join(problems)})" if problems else "well"
    return f"{verdict}: {'; '.join(parts)}"


def print_table(findings: Sequence[Finding]) -> None:
    """A row per finding, the remedy below what it mends."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    last = ""
    for finding in findings:
        mark, style = _MARKS[finding.state]
        part = "" if finding.part == last else finding.part
        last = finding.part
        table.add_row(part, Text(mark, style=style), finding.name, Text(finding.found))
        if finding.remedy:
            table.add_row("", "", "", Text(f"-> {finding.remedy}", style="italic"))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(Text(summarize(findings)), soft_wrap=True)


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """The command ``btx doctor``."""
    parser = argparse.ArgumentParser(prog="btx doctor", description=_DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    arguments = parser.parse_args(argv)
    findings = look()
    healthy = all(finding.state is not State.WRONG for finding in findings)
    if arguments.json:
        rows = [asdict(finding) for finding in findings]
        print(json.dumps({"healthy": healthy, "summary": summarize(findings), "findings": rows}, indent=2))
    else:
        print_table(findings)
    return 0 if healthy else BAD_INPUT_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
