"""``btx convert-hf`` and ``tools/convert_hf.py``: one model between Hugging Face and Megatron, bit for bit."""

from __future__ import annotations

import argparse

from megatron_btx.ground.errors import InputError, exits_with_one_line
from megatron_btx.mixing.cli import add_output_options


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
    for command, format_ in ((into, "megatron"), (out, "hf")):
        add_output_options(command, format_)
    return p


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Plan, print, write and verify; see --help."""
    options = parser().parse_args(argv)
    if options.output is None and not options.dry_run:
        raise InputError("--output is missing; name the folder for the result, or look at the plan with --dry-run")
    from megatron_btx.checkpoint.iterations import is_checkpoint
    from megatron_btx.checkpoint.paths import model_path
    from megatron_btx.checkpoint.safetensors import is_model_folder
    from megatron_btx.mixing.convert import convert
    from megatron_btx.mixing.plan import Request

    path = model_path(options.hf_model if options.command == "import" else options.checkpoint)
    into = options.command == "import"
    if path.is_dir() and (is_checkpoint(path) if into else is_model_folder(path)):
        other = "is a Megatron checkpoint" if into else "is a Hugging Face model folder"
        raise InputError(f"{path}: {other}; import takes a Hugging Face model folder, export a Megatron checkpoint")
    request = Request(
        (("model", str(path)),),
        method="copy",
        pad_vocabulary=options.pad_vocab_to_multiple_of,
        allow_other_ids=options.allow_other_ids,
    )
    return convert(request, options)


if __name__ == "__main__":
    raise SystemExit(main())
