"""``btx convert-hf`` and ``tools/convert_hf.py``: one model between Hugging Face and Megatron, bit for bit."""

from __future__ import annotations

import argparse

from megatron_btx.checkpoint.iterations import is_checkpoint
from megatron_btx.checkpoint.paths import model_path
from megatron_btx.checkpoint.safetensors import is_model_folder
from megatron_btx.common.errors import InputError, exits_with_one_line
from megatron_btx.mixing.cli import add_output_options, work_of
from megatron_btx.mixing.reading import read_request


def parser() -> argparse.ArgumentParser:
    """The command line; importing and printing it needs neither torch nor Megatron."""
    p = argparse.ArgumentParser(
        prog="btx convert-hf",
        description="Move one model, dense or a mixture of experts, between Hugging Face safetensors and Megatron "
        "torch_dist, bit for bit. To mix several models, whatever their format, use convert_experts.py.",
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    into = commands.add_parser("import", help="a Hugging Face model folder into a Megatron checkpoint")
    into.add_argument("--hf-model", metavar="PATH", required=True, help="model folder with safetensors")
    out = commands.add_parser("export", help="a Megatron checkpoint into a Hugging Face model folder")
    out.add_argument(
        "--checkpoint", metavar="PATH", required=True, help="checkpoint root (its latest iteration) or one iter_ folder"
    )
    for command, output_format in ((into, "megatron"), (out, "hf")):
        add_output_options(command, output_format)
    return p


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Plan, print, write and verify; see --help."""
    options = parser().parse_args(argv)
    settings = {"pad_vocabulary": options.pad_vocabulary, "allow_other_ids": options.allow_other_ids}
    from megatron_btx.mixing.api import run_command

    if options.command == "import":
        path, is_other, other = model_path(options.hf_model), is_checkpoint, "Megatron checkpoint"
    else:
        path, is_other, other = model_path(options.checkpoint), is_model_folder, "Hugging Face model folder"
    if path.is_dir() and is_other(path):  # what else it may be is seen later
        raise InputError(
            f"{path}: is a {other}; import takes a Hugging Face model folder, export a Megatron checkpoint"
        )
    request = read_request([("model", str(path))], "copy", settings)
    return run_command(request, work_of(options), options.output)


if __name__ == "__main__":
    raise SystemExit(main())
