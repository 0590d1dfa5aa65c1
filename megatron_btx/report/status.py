"""``btx status``: how far a run is, from its manifests, its metrics, and Slurm's queue where it was submitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from megatron_btx.common.errors import InputError
from megatron_btx.common.table import find_width
from megatron_btx.recipe.names import LOG_FILE, PLAN_FILE
from megatron_btx.report.stages import find_left_out
from megatron_btx.runner.run_dir import is_locked, read_plan
from megatron_btx.runner.slurm_queue import SLURM_FOLDER
from megatron_btx.runner.stage_run import last_words
from megatron_btx.runner.tables import make_progress_table, read_row, read_shown_manifest
from megatron_btx.slurm.status import FOREIGN, HEADERS, JobView, view_jobs


def print_status(directory: Path) -> None:
    """``btx status``: one table from the manifests and metrics of a run."""
    file = directory / PLAN_FILE
    if not file.is_file():
        raise InputError(f"{directory}: no {PLAN_FILE} in it; expected a run directory that btx run made")
    planned = read_plan(directory)
    if planned is None:
        raise InputError(f"{file}: not the plan of a run; btx run with the same recipe and --output writes it again")
    manifests = {entry.stage: read_shown_manifest(directory / entry.stage) for entry in planned}
    views: dict[str, JobView] = {}
    silence = ""
    if (directory / SLURM_FOLDER).is_dir():
        views, silence = view_jobs(directory, manifests)
    at_work, outdated = is_locked(directory), find_left_out(planned, manifests)
    states, rows = {}, []
    for entry in planned:
        name, manifest = entry.stage, manifests[entry.stage]
        state = manifest.status or "waiting"
        if name in outdated:
            state = "outdated"
        elif state == "running" and not at_work:
            state = "interrupted"
        states[name] = views.get(name, JobView()).state or state
        row = read_row(directory / name, name, states[name], entry.steps, entry.tokens)
        if name in views and row.seconds is not None:
            row = replace(row, seconds=row.seconds + views[name].seconds)
        rows.append(row)
    more = [(views[row.name].number, views[row.name].why) for row in rows if row.name in views]
    table = make_progress_table(rows, str(directory), HEADERS if more else (), more)
    Console(width=find_width()).print(table)
    for name, state in states.items():
        log = views.get(name, JobView()).log or directory / name / LOG_FILE
        if state in ("failed", "ended", "interrupted"):
            print(f"{name}: {last_words(log)}; its log: {log}")
    for name in views.keys() - states.keys():
        print(FOREIGN.format(name, views[name].number, directory))
    if silence:
        print(f"Slurm's queue is not shown: {silence}")
