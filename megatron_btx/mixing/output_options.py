"""What the converting commands have in common: the options of the result, and the way from them to what is printed."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_btx.mixing.request import Options, Request

RESULT, DIFFERENCES, MIXTURE = "what the result holds", "what models may differ in", "which mixture is made"
"""Groups of options that decide a result. A recipe has each of them as a key, under the flag's own name."""


def option_group(p: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The group of this title; made where there is none."""
    for group in p._action_groups:
        if group.title == title:
            return group
    return p.add_argument_group(title)


def list_options(p: argparse.ArgumentParser, *titles: str) -> dict[str, argparse.Action]:
    """The options of these groups by their names, without leading dashes."""
    found = {}
    for title in titles:
        for action in option_group(p, title)._group_actions:
            found[action.option_strings[0].removeprefix("--")] = action
    return found


def add_output_options(p: argparse.ArgumentParser, output_format: str = "") -> None:
    """Add the flags of :class:`Options` and ``--output`` to a command line.

    Args:
        output_format: the only format that the command writes; "" to let the user choose.
    """
    p.add_argument("--output", metavar="PATH", help="folder for the result: a checkpoint root, or a model folder")
    if output_format:
        p.set_defaults(output_format=output_format)
    else:
        p.add_argument(
            "--output-format",
            choices=("megatron", "hf"),
            default="megatron",
            help="megatron: torch_dist, one release; hf: safetensors that transformers 4.57 and 5 read "
            "(default: megatron)",
        )
    p.add_argument(
        "--workers",
        metavar="W",
        type=int,
        help="threads that read, compute and write, in each process (default: the cores it may use, at most 4)",
    )
    result = option_group(p, RESULT)
    result.add_argument(
        "--pad-vocab-to-multiple-of",
        metavar="N",
        type=int,
        default=1,
        help="add rows to the embedding and the head until N divides them, as tensor parallelism needs it; a new row "
        "is the mean of all tokens' rows, so its probability is below the tokens' average, and belongs to no token "
        "(default: 1, add none)",
    )
    result.add_argument(
        "--allow-other-ids",
        action="store_true",
        help="write the tokenizer even where it gives texts other ids than the source's own, or cannot be compared "
        "with it (by default that is refused)",
    )
    p.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    p.add_argument(
        "--verify",
        action="store_true",
        help="read the result back and compare it with its sources, before it gets its name",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an existing output, after success only")


def carry_out(request: Request, options: argparse.Namespace, explained: str | None = None) -> int:
    """Plan, print, write and print again, in each process that a launcher started.

    Args:
        options: those of :func:`add_output_options`.
        explained: a tensor of the result whose origin is to be printed, instead of writing anything.
    """
    from megatron_btx.mixing.conversion import Conversion
    from megatron_btx.mixing.ranks import Ranks

    target = None
    if options.output is not None:
        target = Path(options.output)
    settings = Options(
        output_format=options.output_format,
        workers=options.workers,
        verify=options.verify,
        overwrite=options.overwrite,
        dry_run=options.dry_run or explained is not None,
        show_progress=True,
    )
    ranks = Ranks.of_launcher()
    conversion = Conversion(request, target, settings, ranks)
    text = conversion.summary
    if explained is not None:
        text = conversion.explain(explained)
    if ranks.rank == 0:
        print(text, flush=True)
    result = conversion.write()
    if ranks.rank == 0 and result.folder is not None:
        if result.verification:
            print(f"verified: {result.verification}")
        hint = ""
        if result.arguments_file is not None:
            hint = f"; continue with the flags in {result.arguments_file}"
        print(f"wrote {result.folder}{hint}")
    return 0
