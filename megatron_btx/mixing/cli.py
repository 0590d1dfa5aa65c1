"""``btx convert`` and ``tools/convert_experts.py``: mix experts into one mixture of experts."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_btx.common.cli_args import split_pair
from megatron_btx.common.errors import exits_with_one_line
from megatron_btx.common.plugins import load_plugins
from megatron_btx.mixing.methods import METHODS
from megatron_btx.mixing.options import DIFFERENCES, MIXTURE, RESULT, WORK
from megatron_btx.mixing.reading import list_options, read_request
from megatron_btx.mixing.request import Options, Request


def parser() -> argparse.ArgumentParser:
    """The command line; importing and printing it needs neither torch nor Megatron."""
    load_plugins()
    p = argparse.ArgumentParser(
        prog="btx convert",
        description="Mix domain experts into one mixture of experts (Branch-Train-MiX): feed-forward blocks become the "
        "experts bit for bit, everything else is averaged, routers are new. Needs no GPU; under torchrun or srun every "
        "process writes its share. With --verify and --output alone, an old output is checked against its manifest.",
    )
    p.add_argument(
        "--expert",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="an expert: a name, and its Megatron torch_dist checkpoint (the root, or one iter_ folder in it) or its "
        "Hugging Face model folder; repeat, in the order the experts get in the mixture; give the seed too, to keep a "
        "generalist",
    )
    add_output_options(p)
    mixture = p.add_argument_group(MIXTURE)
    methods = "; ".join(f"{name}: {row.summary}" for name, row in METHODS.items())
    mixture.add_argument(
        "--method", choices=tuple(METHODS), default=Request.method, help=f"{methods} (default: %(default)s)"
    )
    for title, group in ((MIXTURE, mixture), (DIFFERENCES, p.add_argument_group(DIFFERENCES))):
        for row in list_options(title).values():
            row.add_to(group)
    p.add_argument("--explain", metavar="TENSOR", help="print where a tensor of the result comes from; write nothing")
    return p


def add_output_options(p: argparse.ArgumentParser, output_format: str = "") -> None:
    """Add what the converting commands have in common; ``output_format`` is the only one of a command that has one."""
    p.add_argument("--output", metavar="PATH", help="folder for the result: a checkpoint root, or a model folder")
    p.set_defaults(output_format=output_format)
    for row in list_options(WORK).values():
        if not (output_format and row.name == "output_format"):
            row.add_to(p)
    group = p.add_argument_group(RESULT)
    for row in list_options(RESULT).values():
        row.add_to(group)


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Plan, print, write and verify; see --help."""
    options = parser().parse_args(argv)
    if options.verify and options.output and not options.expert:
        from megatron_btx.mixing.api import check_result

        folder = Path(options.output)
        count = check_result(folder, show_progress=True)
        print(f"verified: all {count} tensors and all files of {folder} are as they were written")
        return 0
    request, work = request_of(options), work_of(options)
    from megatron_btx.mixing.api import run_command

    return run_command(request, work, options.output, options.explain)


def request_of(options: argparse.Namespace) -> Request:
    """The request that a command line makes.

    Raises:
        InputError: a flag's value is not of its form, or is none that the method takes.
    """
    expected = "NAME=PATH, as --expert math=runs/math/checkpoint"
    experts = [split_pair(text, "--expert", expected) for text in options.expert]
    rows = list_options(RESULT, DIFFERENCES, MIXTURE).values()
    return read_request(experts, options.method, {row.name: getattr(options, row.name) for row in rows})


def work_of(options: argparse.Namespace) -> Options:
    """How a command line wants its work done."""
    return Options(**{row.name: getattr(options, row.name) for row in list_options(WORK).values()})


if __name__ == "__main__":
    raise SystemExit(main())
