"""What the programs would refuse of a recipe's flags and stages: a process that a recipe asks before its first stage.

They are Megatron's parser, Megatron's validation, and what our training and evaluation refuse.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from megatron_btx.common.cli_args import read_pairs
from megatron_btx.common.errors import InputError, exits_with_one_line, refused
from megatron_btx.data.description import ALLOWANCE, Tokenizer, check_description
from megatron_btx.data.inputs import form_of
from megatron_btx.engine.checks import check_arguments
from megatron_btx.engine.cpu import install_cpu_stand_ins, prepare_environment
from megatron_btx.engine.flags import add_btx_arguments
from megatron_btx.evaluation.program import add_evaluation_arguments
from megatron_btx.training.validation import check_masked_alike, read_bound


class RefusingParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are exceptions."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def megatron_parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    parser = RefusingParser(allow_abbrev=False, add_help=False)
    add_megatron_arguments(parser)
    return add_btx_arguments(parser)


def check_sections(parser: argparse.ArgumentParser, sections: Mapping[str, list[str]]) -> None:
    """Parse each section's command line with ``parser``; raises InputError naming the place and the close match."""
    known = parser._option_string_actions
    for where, argv in sections.items():
        for word in argv:
            if word.startswith("--") and word not in known:
                hint, name = "see python -m megatron_btx.pretrain --help-megatron", word.removeprefix("--")
                for close in difflib.get_close_matches(word, known, n=1):
                    hint = f"did you mean {close.removeprefix('--')}?"
                raise InputError(f"{where}.{name}: Megatron has no flag {word}; {hint}")
        try:
            parser.parse_args(argv)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def check_stages(parser: argparse.ArgumentParser, stages: Mapping[str, tuple[int, list[str]]]) -> None:
    """What a training or evaluating program would refuse of its arguments; the CPU's stand-ins must be installed.

    Megatron's parser, our checks, Megatron's validation: of what both refuse, some ends on the CPU in a search for a
    GPU there. What lies outside the run is checked, too; what a stage ahead will make is not there yet.

    Args:
        stages: name -> processes, words.

    Raises:
        InputError: the stage, and the program's own sentence.
    """
    parsed: dict[str, argparse.Namespace] = {}
    # Evaluation that a stage ahead writes -> whether it leaves out end-of-document tokens.
    masked: dict[Path, bool] = {}
    for stage, (processes, words) in stages.items():
        with _naming(stage):
            args = parsed[stage] = parser.parse_args(words)
            args.world_size, args.rank = processes, 0
            _unwrap_single_values(args)
            check_arguments(args, trains=args.btx_eval_output is None)
            bound = read_bound(args)
            if isinstance(bound, Path) and bound in masked:
                check_masked_alike(f"--btx-first-loss-bound {bound}", masked[bound], args.eod_mask_loss)
            if args.btx_eval_output is not None:
                masked[Path(args.btx_eval_output)] = args.eod_mask_loss
            _check_data(args)
    for stage, args in parsed.items():
        with _naming(stage):
            _validate(args)


@contextmanager
def _naming(stage: str) -> Iterator[None]:
    """Have refusals name the stage."""
    try:
        yield
    except InputError as error:
        raise InputError(f"stage {stage}: {error}") from None


def _unwrap_single_values(args: argparse.Namespace) -> None:
    """A list of one balancing loss becomes that loss, as Megatron's validation has it."""
    for name in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"):
        value = getattr(args, name)
        if isinstance(value, list) and len(value) == 1:
            setattr(args, name, value[0])


def _validate(args: argparse.Namespace) -> None:
    """Megatron's own validation. Raises InputError with its sentence."""
    from megatron.training.arguments import validate_args

    try:
        with redirect_stdout(io.StringIO()):  # it lists all arguments
            validate_args(args, {})
    except (AssertionError, ValueError) as refusal:
        raise refused(refusal) from None


def _check_data(args: argparse.Namespace) -> None:
    """Refuse datasets on which a stage would not start, or not end, before the stages ahead of it are trained.

    A run's own datasets lie at paths relative to its directory and may have to be made first: they are not looked at.
    """
    from megatron_btx.data.splits import LEGACY_SPLIT, check_splits, splits_of
    from megatron_btx.data.training import check_indexed_dataset

    trains = args.train_data_path or args.data_path or args.data_args_path or args.per_split_data_args_path
    if args.data_path and args.split is None:
        args.split = LEGACY_SPLIT
    named: dict[str, str] = {}
    for split in splits_of(args):
        named |= dict.fromkeys(split.blend[0], split.flag)
    for flag, words in (("--btx-valid-data", args.btx_valid_data), ("--btx-eval-data", args.btx_eval_data)):
        for name, path in read_pairs(words, flag).items():
            if form_of(path) is None:
                named[path] = f"{flag} {name}="
    given = {prefix: flag for prefix, flag in named.items() if os.path.isabs(prefix)}
    for prefix, flag in given.items():
        check_indexed_dataset(prefix, flag)
    if trains:
        check_splits(args, os.path.isabs)
    if given:
        tokenizer = Tokenizer.of(vars(args), None)
        for prefix, flag in given.items():
            check_description(prefix, flag, tokenizer, args.padded_vocab_size, ALLOWANCE in args.btx_allow_change)


@exits_with_one_line
def main() -> int:
    """Check the sections and stages given as JSON on standard input, which :mod:`megatron_btx.plan.checks` writes."""
    prepare_environment()
    install_cpu_stand_ins()
    asked: dict[str, Any] = json.load(sys.stdin)
    parser = megatron_parser()
    check_sections(parser, asked["sections"])
    add_evaluation_arguments(parser)  # set by the pipeline alone, so that no section may have them
    check_stages(parser, asked["stages"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
