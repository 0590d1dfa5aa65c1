"""Running stages as ``btx run`` does: a failure is printed, and the exit status returned."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_btx.plan.stage import Stage
from megatron_btx.runner.local import Machine, RunError, execute_stages
from megatron_btx.runner.tables import Reporter


def run_stages(
    stages: Sequence[Stage],
    run: Path,
    machine: Machine,
    reporter: Reporter,
    only: Sequence[str] = (),
    records: Mapping[str, str] | None = None,
    rerun: Sequence[str] = (),
) -> int:
    try:
        execute_stages(stages, run, machine, reporter, only, records, rerun)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.status
    return 0
