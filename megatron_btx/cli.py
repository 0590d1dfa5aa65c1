"""``btx``: run recipes and look at runs; the other commands of the project under one name.

Nothing here imports torch or Megatron, and a subcommand's module is imported when it is called, so that help and
status answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_btx.errors import InputError, exits_with_one_line

if TYPE_CHECKING:
    from megatron_btx.recipe.runner import Action
    from megatron_btx.recipe.stage import Stage

DISPATCHED = {
    "report": ("megatron_btx.recipe.report", "write and print the report of a run directory"),
    "corpora": ("megatron_btx.data.corpora.build", "make the quickstart's corpora and tokenizer"),
    "preprocess": ("megatron_btx.data.preprocess", "turn JSONL, text or Parquet files into Megatron's datasets"),
    "convert": ("megatron_btx.mix.cli", "mix experts' checkpoints into one mixture of experts"),
    "convert-hf": ("megatron_btx.mix.convert_hf", "move one model between Hugging Face and Megatron"),
}
"""Commands that other modules implement, with their own --help: name -> module with a main(argv), what it does."""
PLAN_FILE = "plan.json"


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Call the subcommand that the command line names."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in DISPATCHED:
        return int(importlib.import_module(DISPATCHED[words[0]][0]).main(words[1:]))
    arguments = _parser().parse_args(words)
    return status(arguments.run) if arguments.command == "status" else run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="btx", description="Branch-Train-MiX on Megatron-core.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run_command = commands.add_parser("run", help="run a recipe: train, mix, finetune, evaluate, report")
    run_command.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    run_command.add_argument("--dry-run", action="store_true", help="print what would be done as a shell script")
    run_command.add_argument(
        "--set",
        dest="changes",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change a setting of the recipe, as random-seed=7 or experts.math.tokens=600_000",
    )
    run_command.add_argument(
        "--only", metavar="STAGE", nargs="+", action="extend", default=[], help="run these stages (default: all)"
    )
    run_command.add_argument("--output", type=Path, metavar="RUN", help="run directory (default: runs/NAME)")
    run_command.add_argument("--cpu", action="store_true", help="use no GPU")
    status_command = commands.add_parser("status", help="print how far a run is")
    status_command.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/quickstart")
    for name, (_, what) in DISPATCHED.items():
        commands.add_parser(name, help=what)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """``btx run``: plan the recipe, check it, and run it or print its commands."""
    import yaml

    from megatron_btx.recipe.flags import check_with_megatron
    from megatron_btx.recipe.planner import plan_stages
    from megatron_btx.recipe.progress import Progress
    from megatron_btx.recipe.runner import Machine, decide, run_stages
    from megatron_btx.recipe.schema import load_recipe

    recipe, tree = load_recipe(arguments.recipe, arguments.changes)
    stages = plan_stages(recipe)
    directory = (arguments.output or Path("runs") / recipe.name).resolve()
    actions = decide(stages, directory)
    if recipe.notes:
        print(f"# note: {'; '.join(recipe.notes)}", flush=True)
    due = [stage for stage in stages if stage.on_gpu and actions[stage.name].verb in ("run", "rerun")]
    if due:
        check_with_megatron(recipe.file, recipe.flag_sections, due)
    if arguments.dry_run:
        print(
            shell_script([stage for stage in stages if stage.name in (arguments.only or actions)], actions, directory)
        )
        return 0
    steps = [{"stage": stage.name, "steps": stage.iterations, "tokens": stage.tokens} for stage in stages]
    records = {"recipe.yaml": yaml.safe_dump(tree, sort_keys=False), PLAN_FILE: json.dumps(steps, indent=1) + "\n"}
    with Progress(directory, stages) as progress:
        code = run_stages(stages, directory, Machine.found(not arguments.cpu), progress, arguments.only, records)
    if code == 0 and (directory / "report" / "log.txt").is_file() and not arguments.only:
        print((directory / "report" / "log.txt").read_text(encoding="utf-8").rpartition("\n== ")[2].partition("\n")[2])
    return code


def shell_script(stages: Sequence[Stage], actions: dict[str, Action], directory: Path) -> str:
    """What a run would do, as a script that does the same by hand; stages that would be skipped are comments."""
    import shlex

    from megatron_btx.recipe.stage import command_text

    place = shlex.quote(str(directory))
    lines = ["set -euo pipefail", f"mkdir -p {place}", f"cd {place}"]
    for stage in stages:
        action = actions[stage.name]
        lines += ["", f"# {stage.name}: {action.verb} ({action.why})"]
        command = [f"rm -rf {stage.name}"] if action.verb == "rerun" else []
        command += [f"mkdir -p {stage.name}", f"OMP_NUM_THREADS={stage.threads} {command_text(stage)}"]
        text = "\n".join(command)
        lines.append("# " + text.replace("\n", "\n# ") if action.verb == "skip" else text)
    return "\n".join(lines)


def status(directory: Path) -> int:
    """``btx status``: one table from the manifests and metrics of a run."""
    from rich.console import Console

    from megatron_btx.manifest import read_manifest
    from megatron_btx.recipe.progress import read_row, table
    from megatron_btx.recipe.runner import is_locked

    plan = directory / PLAN_FILE
    if not plan.is_file():
        raise InputError(f"{directory}: no {PLAN_FILE} in it; expected a run directory that btx run made")
    at_work = is_locked(directory)
    rows = []
    for entry in json.loads(plan.read_text(encoding="utf-8")):
        stage = directory / entry["stage"]
        state = (read_manifest(stage) or {}).get("status", "waiting")
        state = "interrupted" if state == "running" and not at_work else state
        rows.append(read_row(stage, entry["stage"], state, entry["steps"], entry["tokens"]))
    Console().print(table(rows, str(directory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
