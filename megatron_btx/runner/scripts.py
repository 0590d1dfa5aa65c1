"""What a run would do, as a shell script that does the same by hand."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from megatron_btx.common.errors import printable
from megatron_btx.plan.fingerprint import identities
from megatron_btx.plan.stage import PYTHON, Stage
from megatron_btx.recipe.names import CONFIG_FILE, MANIFEST_FILE
from megatron_btx.runner.decisions import RERUN, RESUME, SKIP, Action
from megatron_btx.runner.run_dir import find_free_name
from megatron_btx.runner.schemas import StageManifest


def shell_script(stages: Sequence[Stage], actions: Mapping[str, Action], directory: Path) -> str:
    """The script of a run; stages that would be skipped are comments.

    A stage's folder gets the manifest that a run would write, so that a run can go on from what the script made.
    """
    known = identities(stages)
    run = shlex.quote(str(directory))
    lines = ["set -euo pipefail", f"mkdir -p {run}", f"cd {run}", shell_preparation(sys.executable)]
    for stage in stages:
        action = actions[stage.name]
        lines += ["", f"# {printable(stage.name)}: {action.verb} ({printable(action.why)})"]
        folder = shlex.quote(stage.name)
        commands = [f"mkdir -p {folder}"]
        if action.verb == RERUN:
            aside = find_free_name(directory / stage.name).name
            commands.insert(0, f"mv {folder} {shlex.quote(aside)}")
        if action.verb != RESUME:
            manifest = StageManifest.of_stage(stage, known[stage.name], "started by hand", action.rerun).content()
            commands.append(f"printf '%s\\n' {shlex.quote(json.dumps(manifest))} > {folder}/{MANIFEST_FILE}")
        if f"{stage.name}/{CONFIG_FILE}" in stage.command:  # printf is no program, so that no word is too long for it
            commands.append(f"printf '%s' {shlex.quote(config_text(stage))} > {folder}/{CONFIG_FILE}")
        commands.append(f"OMP_NUM_THREADS={stage.threads} {flag_per_line(stage.command)}")
        text = "\n".join(commands)
        lines.append(as_comment(text) if action.verb == SKIP else text)
    return "\n".join(lines)


def as_comment(text: str) -> str:
    """``text`` as comments of a shell script."""
    return "# " + text.replace("\n", "\n# ")


def config_text(stage: Stage) -> str:
    """The config.yaml of a stage."""
    said = {
        "stage": stage.name,
        "parents": list(stage.parents),
        "processes": stage.processes,
        "threads": stage.threads,
        "iterations": stage.iterations,
        "tokens": stage.tokens,
        **stage.config,
        "command": list(stage.command),
    }
    return yaml.safe_dump(said, sort_keys=False)


def flag_per_line(command: Sequence[str]) -> str:
    """A command for a shell in the run directory, after :func:`shell_preparation`: every flag with its values."""
    words = [shlex.quote(word) for word in command]
    if command[0] == PYTHON:
        words[0] = '"$python"'
    lines: list[str] = []
    for word in words:
        if not lines or word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n    ".join(lines)


def shell_preparation(python: str) -> str:
    """What a script does before its first Python: name the interpreter, and search no folder but those named in full.

    Many an environment has a PYTHON that means another interpreter, one without torch; so it is BTX_PYTHON. The run's
    folder is the working directory, and may come from somebody else: Python would search it for modules first, and an
    empty or relative entry of a path means it, too.
    """
    # Without quotes around the whole: within them bash would take those of the path for a part of it.
    return f"""python=${{BTX_PYTHON:-{shlex.quote(python)}}}
for name in PATH PYTHONPATH; do
    kept=
    while IFS= read -r -d : entry; do [[ "$entry" != /* ]] || kept+="${{kept:+:}}$entry"; done <<<"${{!name-}}:"
    printf -v "$name" %s "$kept"
done
export PYTHONSAFEPATH=1"""


def shell_locks(name: str) -> str:
    """What keeps a script in the run's folder from making a stage that somebody else makes; see run_dir.py."""
    return f"""\
# Who works here holds a lock: one btx run the folder, or one script each stage. It ends with him, however he ends.
# flock leaves with 3 where another holds it, and with something else on a disk that has no locks.
refuse() {{
    echo "error: stage "{shlex.quote(name)}": $*; wait for it, or end it first" >&2
    exit 2
}}
exec 8<>.lock 9<>{shlex.quote(f".{name}.lock")}
flock -s -n -E 3 8 || [ $? -ne 3 ] || refuse "a btx run is at work in $PWD"
flock -n -E 3 9 || [ $? -ne 3 ] || refuse "somebody else makes it"
""".rstrip()


def command_script(stage: Stage) -> str:
    """The stage's command.sh: what btx run executes, and what a person can call from anywhere.

    A job of Slurm executes its own script, which starts the same program as one task for each process.
    """
    return (
        "#!/usr/bin/env bash\n"
        f"# Stage {printable(stage.name)} on one machine. btx run executes this, a job of Slurm one of ../slurm;\n"
        "# log.txt says which it was. Relative paths count from the run directory, the parent of this script's.\n"
        "set -euo pipefail\n"
        "unset CDPATH\n"  # with it, cd would look for the folder elsewhere first
        'cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."\n'
        f"{shell_preparation(sys.executable)}\n"
        f"export OMP_NUM_THREADS={stage.threads}\n"
        'if [ -z "${BTX_STAGE:-}" ]; then # by hand\n'
        f"{shell_locks(stage.name)}\nfi\n"
        f"exec {flag_per_line(stage.command)}\n"
    )
