"""``btx``: run recipes and look at runs; the other commands of the project under one name.

Nothing here imports torch or Megatron, and a subcommand's module is imported when it is called, so that help and
status answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_btx import __version__
from megatron_btx.ground.errors import InputError, exits_with_one_line

if TYPE_CHECKING:
    from megatron_btx.pipeline.folder import Action
    from megatron_btx.pipeline.stage import Stage

DISPATCHED = {
    "report": ("megatron_btx.report.build", "write and print the report of a run directory"),
    "corpora": ("megatron_btx.data.corpora.build", "make the quickstart's corpora and tokenizer"),
    "preprocess": ("megatron_btx.data.preprocess", "turn JSONL, text or Parquet files into Megatron's datasets"),
    "convert": ("megatron_btx.mixing.cli", "mix experts' checkpoints into one mixture of experts"),
    "convert-hf": ("megatron_btx.mixing.convert_hf", "move one model between Hugging Face and Megatron"),
}
"""Commands that other modules implement, with their own --help: name -> module with a main(argv), what it does."""
PLAN_FILE = "plan.json"
_RUN_DESCRIPTION = """
Finished stages are skipped, stopped ones go on. A stage is the same as long as what decides its result is the same
(model, data and their order, budget, optimizer, seeds, parents, numerics): intervals, paths, threads and layout may
change. Where something that decides has changed, nothing is run and nothing removed: every such stage is named with
what changed. Then either --rerun STAGE ..., which keeps the old folder beside the new one as STAGE.YYYYMMDD-HHMMSS, or
another --output. A --rerun that was stopped or failed goes on with the same command; to begin it once more instead,
move the stage's folder away.
"""
_STATUS_DESCRIPTION = """
Print how far a run is, from what its stages wrote; it may be at work, and nothing is changed. A stage is waiting,
running, finished, failed, stopped (by a signal to btx run), or interrupted (btx run itself is gone): the same btx run
goes on from there. Or it is outdated: made with other settings, or from other stages, than the recipe of the run has.
"""


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Call the subcommand that the command line names."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in DISPATCHED:
        return int(importlib.import_module(DISPATCHED[words[0]][0]).main(words[1:]))
    arguments = _parser().parse_args(words)
    if arguments.command == "status":
        return status(arguments.run)
    if arguments.recipe is None:
        raise InputError(
            "no RECIPE.yaml: it stands first, as in btx run RECIPE.yaml --set KEY=VALUE, because --set, "
            "--only and --rerun take all words behind them"
        )
    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="btx",
        description="Branch-Train-MiX on Megatron-core.",
        epilog="btx COMMAND --help says more. To begin: btx run examples/recipes/quickstart.yaml",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run_command = commands.add_parser(
        "run",
        help="run a recipe: train, mix, finetune, evaluate, report",
        description=_RUN_DESCRIPTION,
        usage="btx run RECIPE.yaml [--dry-run] [--set KEY=VALUE ...] [--only STAGE ...] [--rerun STAGE ...]\n"
        "               [--output RUN] [--cpu]",
    )
    run_command.add_argument(
        "recipe", type=Path, nargs="?", metavar="RECIPE.yaml", help="the recipe, as examples/recipes/quickstart.yaml"
    )
    run_command.add_argument("--dry-run", action="store_true", help="print what would be done as a shell script")
    run_command.add_argument(
        "--set",
        dest="changes",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change settings of the recipe, as random-seed=7 or experts.math.tokens=600_000; a mapping is replaced as "
        "a whole, null takes a setting out",
    )
    run_command.add_argument(
        "--only",
        metavar="STAGE",
        nargs="+",
        action="extend",
        default=[],
        help="run these stages, which --dry-run names (default: all)",
    )
    run_command.add_argument(
        "--rerun",
        metavar="STAGE",
        nargs="+",
        action="extend",
        default=[],
        help="run these stages again whatever is there; the old folders are kept, dated, beside the new ones",
    )
    run_command.add_argument("--output", type=Path, metavar="RUN", help="run directory (default: runs/NAME)")
    run_command.add_argument("--cpu", action="store_true", help="use no GPU")
    status_command = commands.add_parser("status", help="print how far a run is", description=_STATUS_DESCRIPTION)
    status_command.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/quickstart")
    for name, (_, what) in DISPATCHED.items():
        commands.add_parser(name, help=what)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """``btx run``: plan the recipe, check it, and run it or print its commands."""
    import yaml

    from megatron_btx.pipeline.folder import check_chosen, check_run, decide, kept, plan_of
    from megatron_btx.pipeline.planner import plan_stages
    from megatron_btx.pipeline.program_checks import check_with_megatron
    from megatron_btx.pipeline.progress import Progress
    from megatron_btx.pipeline.recipe.flags import MissingFlagError
    from megatron_btx.pipeline.recipe.reading import load_recipe
    from megatron_btx.pipeline.runner import Machine, run_stages
    from megatron_btx.pipeline.stage import one_line

    recipe = load_recipe(arguments.recipe, arguments.changes)
    try:
        stages = plan_stages(recipe)
    except MissingFlagError:
        # What is missing may be there with a slip in its name, which says more.
        check_with_megatron(recipe.file, recipe.flag_sections, use_gpus=not arguments.cpu)
        raise
    directory = (arguments.output or Path("runs") / recipe.name).resolve()
    check_run(directory)
    actions = decide(stages, directory, arguments.rerun)
    chosen = arguments.only or list(actions)
    check_chosen(stages, actions, chosen)
    if unchosen := [name for name in arguments.rerun if name not in chosen]:
        raise InputError(f"--rerun {unchosen[0]}: not among the stages of --only; add it there")
    if recipe.notes:
        print(f"# note: {one_line('; '.join(recipe.notes))}", flush=True)
    if changed := kept(actions, chosen):
        _refuse_changes(arguments, directory, changed)
    due = [stage for stage in stages if stage.on_gpu and actions[stage.name].verb in ("run", "rerun")]
    if due:
        check_with_megatron(recipe.file, recipe.flag_sections, due, not arguments.cpu)
    if arguments.dry_run:
        print(shell_script([stage for stage in stages if stage.name in chosen], actions, directory))
        return 0
    records = {
        PLAN_FILE: json.dumps(plan_of(stages), indent=1) + "\n",
        "recipe.yaml": yaml.safe_dump(recipe.tree, sort_keys=False),
    }
    with Progress(directory, stages) as progress:
        code = run_stages(
            stages, directory, Machine.found(not arguments.cpu), progress, arguments.only, records, arguments.rerun
        )
    if code == 0 and (directory / "report" / "log.txt").is_file() and not arguments.only:
        print((directory / "report" / "log.txt").read_text(encoding="utf-8").rpartition("\n== ")[2].partition("\n")[2])
    return code


def _refuse_changes(arguments: argparse.Namespace, directory: Path, changed: Mapping[str, str]) -> NoReturn:
    """Say what changed in which stage, and the command that would run them again. Always raises InputError."""
    from megatron_btx.pipeline.stage import one_line

    for name, why in changed.items():
        print(f"{name}: {one_line(why)}", file=sys.stderr, flush=True)
    again = [*arguments.rerun, *(name for name in changed if name not in arguments.rerun)]
    command = ["btx", "run", str(arguments.recipe), "--output", str(directory)]
    for flag, words in (("--set", arguments.changes), ("--only", arguments.only), ("--rerun", again)):
        command += [flag, *words] if words else []
    command += ["--cpu"] if arguments.cpu else []
    raise InputError(
        f"{directory}: what was made otherwise (above: {len(changed)}) is kept, and nothing was run; take "
        f"another --output, or to run them again beside their old folders: {shlex.join(command)}"
    )


def shell_script(stages: Sequence[Stage], actions: Mapping[str, Action], directory: Path) -> str:
    """What a run would do, as a script that does the same by hand; stages that would be skipped are comments.

    A stage's folder gets the manifest that a run would write, so that a run can go on from what the script made.
    """
    from megatron_btx.pipeline.folder import dated
    from megatron_btx.pipeline.identity import identities, manifest_of
    from megatron_btx.pipeline.stage import command_text, one_line

    known = identities(stages)
    lines = ["set -euo pipefail", f"mkdir -p {shlex.quote(str(directory))}", f"cd {shlex.quote(str(directory))}"]
    for stage in stages:
        action, folder = actions[stage.name], shlex.quote(stage.name)
        lines += ["", f"# {one_line(stage.name)}: {action.verb} ({one_line(action.why)})"]
        command = [f"mkdir -p {folder}"]
        if action.verb == "rerun":
            command.insert(0, f"mv {folder} {shlex.quote(dated(directory / stage.name).name)}")
        if action.verb != "resume":
            manifest = json.dumps(manifest_of(stage, known[stage.name], "started by hand", action.rerun))
            command.append(f"printf '%s\\n' {shlex.quote(manifest)} > {folder}/manifest.json")
        command.append(f"OMP_NUM_THREADS={stage.threads} {command_text(stage)}")
        text = "\n".join(command)
        lines.append("# " + text.replace("\n", "\n# ") if action.verb == "skip" else text)
    return "\n".join(lines)


def status(directory: Path) -> int:
    """``btx status``: one table from the manifests and metrics of a run."""
    from megatron_btx.pipeline.folder import read_plan
    from megatron_btx.pipeline.progress import print_table, read_row, shown_manifest
    from megatron_btx.pipeline.runner import is_locked
    from megatron_btx.report.stages import left_out

    plan = directory / PLAN_FILE
    if not plan.is_file():
        raise InputError(f"{directory}: no {PLAN_FILE} in it; expected a run directory that btx run made")
    entries = read_plan(plan)
    if entries is None:
        raise InputError(f"{plan}: not the plan of a run; btx run with the same recipe and --output writes it again")
    at_work = is_locked(directory)
    manifests = {entry["stage"]: shown_manifest(directory / entry["stage"]) for entry in entries}
    outdated = left_out(directory, manifests)
    rows = []
    for entry in entries:
        stage = directory / entry["stage"]
        state = str(manifests[entry["stage"]].get("status", "waiting"))
        state = "interrupted" if state == "running" and not at_work else state
        state = "outdated" if entry["stage"] in outdated else state
        rows.append(read_row(stage, entry["stage"], state, entry.get("steps"), entry.get("tokens")))
    print_table(rows, str(directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
