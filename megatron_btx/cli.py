"""``btx``: every command. ``btx NAME`` is a module with a main; recipes and runs are handled here.

Nothing here imports torch or Megatron, and a command's module is imported when it is called, so that help and status
answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from megatron_btx import __version__
from megatron_btx.common.errors import InputError, exits_with_one_line, printable

DISPATCHED = {
    "cancel": ("megatron_btx.slurm.submission", "cancel the jobs of a run in Slurm's queue"),
    "doctor": ("megatron_btx.doctor", "what this machine has of what training needs"),
    "report": ("megatron_btx.report.build", "write and print the report of a run, or of several side by side"),
    "preprocess": ("megatron_btx.data.preprocess", "turn JSONL, text or Parquet files into Megatron's datasets"),
    "datasets": ("megatron_btx.data.datasets", "turn the texts of several domains into the datasets of a run"),
    "convert": ("megatron_btx.mixing.cli", "mix experts' checkpoints into one mixture of experts"),
    "convert-hf": ("megatron_btx.mixing.convert_hf", "move one model between Hugging Face and Megatron"),
    "train": ("megatron_btx.training.program", "train a model: python -m megatron_btx.pretrain, for torchrun too"),
    "evaluate": ("megatron_btx.evaluation.program", "loss per domain of models: python -m megatron_btx.evaluate"),
    "route": ("megatron_btx.evaluation.analyze_routing", "who is routed where: figures, a page, routing.json"),
    "init-router": ("megatron_btx.evaluation.init_router", "fit a mixture's routers to the experts' domains"),
}
"""Commands that other modules implement, with their own --help: name -> module with a main(), what it does. It reads
the process's own command line, as Megatron does."""
_RUN_DESCRIPTION = """
Finished stages are skipped, stopped ones go on. A stage is the same as long as what decides its result is the same
(model, data and their order, budget, optimizer, seeds, parents, numerics): intervals, paths, threads and layout may
change. Where something that decides has changed, nothing is run and nothing removed: every such stage is named with
what changed. Then either --rerun STAGE ..., which keeps the old folder beside the new one as STAGE.YYYYMMDD-HHMMSS, or
another --output. A --rerun that was stopped or failed goes on with the same command; to begin it once more instead,
move the stage's folder away.
"""
_SUBMIT_DESCRIPTION = """
Make every stage that is not finished a job of Slurm, which waits for the jobs of the stages that it needs. The recipe's
cluster section says what the jobs ask for. Their scripts lie in RUN/slurm and are what is submitted. A job that meets
its time limit, is preempted or loses a process saves, starts again and goes on. The same command submits what is
missing and leaves alone what is in the queue; btx status RUN shows the jobs, and btx cancel RUN ends them.
"""
_PLAN_DESCRIPTION = """
Print the stages of a recipe as a table: what each does and how large it is, with an estimate of the tokens and FLOPs
of all that is to be trained. The converter looks at the given models and says what it would refuse; the texts are
looked for. Nothing is written, and Megatron is not asked. btx run RECIPE.yaml --dry-run asks it, and prints the
commands of the stages, too.
"""
_STATUS_DESCRIPTION = """
Print how far a run is, from what its stages wrote; it may be at work, and nothing is changed. A stage is waiting,
running, finished, failed, stopped (by a signal to btx run), or interrupted (btx run itself is gone): the same btx run
goes on from there. Or it is outdated: made with other settings, or from other stages, than the recipe of the run has.
"""


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Call the command that the command line names."""
    words = list(argv) if argv is not None else sys.argv[1:]
    if words and words[0] in DISPATCHED:
        module, _ = DISPATCHED[words[0]]
        sys.argv = [f"btx {words[0]}", *words[1:]]
        return int(importlib.import_module(module).main())
    arguments = make_parser().parse_args(words)
    if arguments.command == "status":
        from megatron_btx.report.status import print_status

        print_status(arguments.run)
        return 0
    if arguments.recipe is None:
        raise InputError(
            f"no RECIPE.yaml: it stands first, as in btx {arguments.command} RECIPE.yaml --set KEY=VALUE, because "
            "--set, --only and --rerun take all words behind them"
        )
    from megatron_btx.runner import api

    planned = api.plan_as_asked(arguments)
    if arguments.command == "submit":
        from megatron_btx.slurm import submission

        return submission.print_scripts(planned) if arguments.dry_run else submission.submit_run(planned)
    if arguments.command == "plan":
        print(planned.describe())
        return 0
    if arguments.dry_run:
        api.print_commands(planned)
        return 0
    return api.run_planned(planned, _print_report)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="btx",
        description="Branch-Train-MiX on Megatron-core.",
        epilog="btx COMMAND --help says more. To begin: bash examples/quickstart.sh",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    what = "run a recipe: train, mix, finetune, evaluate, report"
    run_command = _add_recipe_command(commands, "run", what, _RUN_DESCRIPTION, " [--dry-run] [--cpu]")
    run_command.add_argument("--dry-run", action="store_true", help="print the plan and a shell script that does it")
    run_command.add_argument("--cpu", action="store_true", help="use no GPU")
    what = "run a recipe as jobs of Slurm"
    submit_command = _add_recipe_command(commands, "submit", what, _SUBMIT_DESCRIPTION, " [--dry-run]")
    submit_command.add_argument("--dry-run", action="store_true", help="print the scripts; submit and write nothing")
    what = "print the stages of a recipe, with their tokens and FLOPs"
    _add_recipe_command(commands, "plan", what, _PLAN_DESCRIPTION)
    status_command = commands.add_parser("status", help="print how far a run is", description=_STATUS_DESCRIPTION)
    status_command.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/quickstart")
    for name, (_, what) in DISPATCHED.items():
        commands.add_parser(name, help=what)
    return parser


def _add_recipe_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    what: str,
    description: str,
    flags: str = "",
) -> argparse.ArgumentParser:
    """A command that takes a recipe; ``flags`` stand in its usage behind those of all."""
    usage = f"btx {name} RECIPE.yaml [--set KEY=VALUE ...] [--only STAGE ...] [--rerun STAGE ...] [--output RUN]{flags}"
    parser = commands.add_parser(name, help=what, description=description, usage=usage)
    parser.set_defaults(cpu=False)
    what = "the recipe, as examples/recipes/quickstart.yaml"
    parser.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE.yaml", help=what)
    lists = {
        "--set": "change settings of the recipe, as random-seed=7 or experts.math.tokens=600_000; a mapping is "
        "replaced as a whole, null takes a setting out",
        "--only": "these stages, which btx plan names (default: all)",
        "--rerun": "run these stages again whatever is there; the old folders are kept, dated, beside the new ones",
    }
    for flag, what in lists.items():
        metavar = "KEY=VALUE" if flag == "--set" else "STAGE"
        parser.add_argument(flag, metavar=metavar, nargs="+", action="extend", default=[], help=what)
    parser.add_argument("--output", type=Path, metavar="RUN", help="run directory (default: runs/NAME)")
    return parser


def _print_report(directory: Path) -> None:
    """Print the core of a run's report, which its last stage has written; what keeps it from being read is said."""
    from megatron_btx.report.build import make_report, print_core

    try:
        print_core(make_report(directory))
    except InputError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
