"""What a run would do, as a shell script that does the same by hand."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_btx.plan.fingerprint import Identity, identities, manifest_of
from megatron_btx.plan.stage import Stage, command_text, one_line, shell_preparation
from megatron_btx.recipe.names import CONFIG_FILE, MANIFEST_FILE
from megatron_btx.runner.decisions import RERUN, RESUME, SKIP, Action
from megatron_btx.runner.run_dir import find_free_name
from megatron_btx.runner.stage_run import config_text


def shell_script(stages: Sequence[Stage], actions: Mapping[str, Action], directory: Path) -> str:
    """The script of a run; stages that would be skipped are comments.

    A stage's folder gets the manifest that a run would write, so that a run can go on from what the script made.
    """
    known = identities(stages)
    run = shlex.quote(str(directory))
    lines = ["set -euo pipefail", f"mkdir -p {run}", f"cd {run}", shell_preparation(sys.executable)]
    for stage in stages:
        action = actions[stage.name]
        lines += ["", f"# {one_line(stage.name)}: {action.verb} ({one_line(action.why)})"]
        commands = _stage_commands(stage, action, known[stage.name], directory)
        if action.verb == SKIP:
            lines.append(as_comment(commands))
        else:
            lines.append(commands)
    return "\n".join(lines)


def as_comment(text: str) -> str:
    """``text`` as comments of a shell script."""
    return "# " + text.replace("\n", "\n# ")


def _stage_commands(stage: Stage, action: Action, identity: Identity, directory: Path) -> str:
    folder = shlex.quote(stage.name)
    commands = [f"mkdir -p {folder}"]
    if action.verb == RERUN:
        aside = find_free_name(directory / stage.name).name
        commands.insert(0, f"mv {folder} {shlex.quote(aside)}")
    if action.verb != RESUME:
        manifest = json.dumps(manifest_of(stage, identity, "started by hand", action.rerun))
        commands.append(f"printf '%s\\n' {shlex.quote(manifest)} > {folder}/{MANIFEST_FILE}")
    if f"{stage.name}/{CONFIG_FILE}" in stage.command:  # printf is no program, so that no word is too long for it
        commands.append(f"printf '%s' {shlex.quote(config_text(stage))} > {folder}/{CONFIG_FILE}")
    commands.append(f"OMP_NUM_THREADS={stage.threads} {command_text(stage)}")
    return "\n".join(commands)
