"""The report of a run: ``btx report RUN`` writes RUN/report/ from what the stages left behind, and prints its core.

It reports and does not judge: the exit status is 0 whether or not the facts hold, unless ``--require-facts`` asks for
them. The report of an ablation has no facts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_btx.ground.errors import InputError, exits_with_one_line, printable
from megatron_btx.pipeline.directory import REPORT_STAGE
from megatron_btx.report.ablation_outcomes import is_ablation
from megatron_btx.report.blocks import Block
from megatron_btx.report.facts import Fact
from megatron_btx.report.pages import print_blocks
from megatron_btx.report.report import Report, write_report


@dataclass(frozen=True)
class Summary:
    """The core of a report."""

    blocks: tuple[Block, ...]
    """Table of losses, notes, facts: what a terminal shows."""
    facts: tuple[Fact, ...]
    """None for an ablation."""
    page: Path
    """The report itself."""

    def are_facts_refuted(self) -> bool:
        """Whether some fact is false."""
        return any(fact.holds is False for fact in self.facts)


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Write the report of a run, and print its table and its facts."""
    parser = argparse.ArgumentParser(prog="btx report", description="Write the report of a run, and print its facts.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/quickstart")
    parser.add_argument("--require-facts", action="store_true", help="exit with 1 when a fact is false")
    arguments = parser.parse_args(argv)
    if arguments.require_facts and is_ablation(arguments.run):
        raise InputError(f"--require-facts: {arguments.run} is an ablation, which has no facts; leave it out")
    summary = build_report(arguments.run)
    print_summary(summary)
    return int(arguments.require_facts and summary.are_facts_refuted())


def build_report(run: Path) -> Summary:
    """Write ``run``/report/ from the files of its stages, and return what it says in short.

    Files of the report folder that are not the report's own are left alone.

    Raises:
        InputError: ``run`` is no run directory, or a file in it is broken; the earlier report then stands as it was.
    """
    report = _make_report(run)
    write_report(report, run / REPORT_STAGE)
    return _summary_of(report, run)


def summarize(run: Path) -> Summary:
    """What the report of a run says in short, without writing it. Raises InputError as :func:`build_report` does."""
    return _summary_of(_make_report(run), run)


def print_summary(summary: Summary) -> None:
    """Print the core of a report, and where all of it lies."""
    print_blocks(summary.blocks)
    # From wherever the reader stands: a run calls this in its own directory, and repeats the line to its caller.
    print(f"report: {printable(str(summary.page.resolve()))}")


def _make_report(run: Path) -> Report:
    if is_ablation(run):
        from megatron_btx.report.ablation import report_ablation

        return report_ablation(run)
    from megatron_btx.report.plain_run import report_plain_run

    return report_plain_run(run)


def _summary_of(report: Report, run: Path) -> Summary:
    return Summary(report.printed, report.facts, run / REPORT_STAGE / report.files.page)


if __name__ == "__main__":
    sys.exit(main())
