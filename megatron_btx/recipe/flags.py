"""Megatron's flags as a recipe spells them: merge, write as a command line, check with the programs' own checks.

A flag mapping has Megatron's names without the leading dashes as keys. ``true`` is a bare flag, ``false`` and null
are "not given" (which takes back what an outer section gave), a list is one flag with several values.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_btx.errors import InputError, exits_with_one_line

if TYPE_CHECKING:
    from megatron_btx.recipe.stage import Stage

FlagValue = bool | int | float | str | tuple[int | float | str, ...] | None
Flags = Mapping[str, FlagValue]

LAYOUT_FLAGS = (
    "tensor-model-parallel-size",
    "pipeline-model-parallel-size",
    "context-parallel-size",
    "expert-model-parallel-size",
    "expert-tensor-parallel-size",
    "num-layers-per-virtual-pipeline-stage",
    "num-virtual-stages-per-pipeline-rank",
    "sequence-parallel",
    "use-distributed-optimizer",
)
"""Megatron's flags that say how a stage is spread over processes; they belong in ``layout``."""

_DATA = "the stage's blend and data"
DERIVED_FLAGS = {
    "seed": "random-seed",
    "save": "the stage's own directory",
    "load": "the stage's own directory",
    "pretrained-checkpoint": "from",
    "finetune": "from",
    "train-iters": "tokens",
    "train-samples": "tokens",
    "data-path": _DATA,
    "train-data-path": _DATA,
    "valid-data-path": _DATA,
    "test-data-path": _DATA,
    "data-cache-path": "the stage's own directory",
    "tokenizer-type": "data.tokenizer",
    "tokenizer-model": "data.tokenizer",
    "num-experts": "mix.experts",
    "moe-router-topk": "mix.routing and mix.top-k",
    "moe-router-pre-softmax": "mix.routing",
    "btx-sample-top1": "mix.routing",
    "btx-load-balancing": "mix.load-balancing",
    "btx-valid-data": "ablation",
    "btx-valid-tokens": "ablation",
    "btx-metrics": "the stage's own directory",
}
"""Flags that the planner sets, and what they are derived from; in a recipe they would be said twice."""

_UNEVEN_PIPELINE = (
    "pipeline-model-parallel-layout",
    "decoder-first-pipeline-num-layers",
    "decoder-last-pipeline-num-layers",
    "account-for-embedding-in-pipeline-split",
)


def merged(*sections: Flags) -> dict[str, FlagValue]:
    """One mapping in which each flag stands once: a later section wins, and its false or null takes a flag back."""
    everything: dict[str, FlagValue] = {}
    for section in sections:
        everything |= section
    return {name: value for name, value in everything.items() if value is not None and value is not False}


def to_argv(flags: Flags) -> list[str]:
    """The command line of ``flags``, for example ``{"swiglu": True, "lr": 0.001}`` -> ``--swiglu --lr 0.001``."""
    argv: list[str] = []
    for name, value in merged(flags).items():
        argv.append(f"--{name}")
        if value is not True:
            argv.extend(str(item) for item in (value if isinstance(value, tuple) else (value,)))
    return argv


def number(flags: Flags, name: str, default: int | None = None) -> int:
    """The whole number that flag ``name`` has. Raises InputError when it is absent without a default, or is none."""
    value = flags.get(name, default)
    if isinstance(value, bool) or not str(value).isdecimal() or int(str(value)) < 1:
        found = "is not given" if value is None else f"is {value!r}"
        raise InputError(f"--{name} {found}; expected a whole number above zero (model, training, megatron)")
    return int(str(value))


def check_layout(stage: str, processes: int, flags: Flags) -> None:
    """Refuse a layout that cannot be: the arithmetic between processes, parallel sizes, layers, experts and batch."""
    tensor, pipeline, context, expert = (number(flags, name, 1) for name in LAYOUT_FLAGS[:4])
    expert_tensor = number(flags, "expert-tensor-parallel-size", tensor)
    num_experts = number(flags, "num-experts", 0) if "num-experts" in flags else 0

    def refuse(found: str, expected: str) -> NoReturn:
        raise InputError(f"stage {stage}: the layout does not fit: {found}; expected {expected}; change its layout")

    if processes % (tensor * pipeline * context):
        refuse(f"{processes} processes for TP {tensor} x PP {pipeline} x CP {context}", "a multiple of their product")
    if expert > 1 and not num_experts:
        refuse(f"expert-model-parallel-size {expert} for a dense model", "1")
    if num_experts and processes % (expert_tensor * expert * pipeline):
        refuse(
            f"{processes} processes for EP {expert} x expert TP {expert_tensor} x PP {pipeline}",
            "a multiple of their product",
        )
    if num_experts % expert:
        refuse(f"{num_experts} experts over EP {expert}", "a number of experts that EP divides")
    layers = number(flags, "num-layers")
    if layers % pipeline and not any(name in flags for name in _UNEVEN_PIPELINE):
        refuse(f"{layers} layers over PP {pipeline}", "a number of layers that PP divides")
    heads = number(flags, "num-attention-heads")
    if heads % tensor:
        refuse(f"{heads} attention heads over TP {tensor}", "a number of heads that TP divides")
    data_parallel = processes // (tensor * pipeline * context)
    micro, batch = number(flags, "micro-batch-size"), number(flags, "global-batch-size")
    if batch % (micro * data_parallel):
        refuse(
            f"global-batch-size {batch} with micro-batch-size {micro} on DP {data_parallel}",
            f"a multiple of {micro * data_parallel}",
        )


def measured_batch(processes: int, flags: Flags) -> int:
    """Tokens of one batch to measure on; measurements are rounded down to whole ones."""
    tensor, context = number(flags, LAYOUT_FLAGS[0], 1), number(flags, LAYOUT_FLAGS[2], 1)
    return number(flags, "micro-batch-size") * (processes // (tensor * context)) * number(flags, "seq-length")


def check_measured(stage: str, tokens: int, processes: int, flags: Flags) -> None:
    """Refuse a measurement of fewer ``tokens`` per domain than one batch, which would end the stage when it is due."""
    batch_tokens = measured_batch(processes, flags)
    sequences = batch_tokens // number(flags, "seq-length")
    if tokens < batch_tokens:
        raise InputError(
            f"stage {stage}: {tokens} tokens per domain are fewer than one batch to measure on ({sequences} sequences "
            f"= {batch_tokens} tokens under its layout); raise the tokens of evaluate or ablation"
        )


def check_with_megatron(file: str, sections: Mapping[str, Flags], stages: Iterable[Stage] = ()) -> None:
    """Refuse what the installed Megatron does not know, and what the programs of ``stages`` would refuse themselves.

    Another process does it, because importing Megatron takes some 10 s and 500 MB that would then stay in this one.

    Args:
        sections: place in ``file`` -> flags.
        stages: those that train or evaluate.
    """
    asked = {
        "sections": {where: to_argv(flags) for where, flags in sections.items()},
        "stages": {stage.name: (stage.processes, program_words(stage)) for stage in stages},
    }
    command = [sys.executable, "-W", "ignore", "-m", "megatron_btx.recipe.flags"]
    answer = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or [f"Megatron's parser ended with status {answer.returncode}"]
        raise InputError(f"{file}: {lines[-1].removeprefix('error: ')}")


def program_words(stage: Stage) -> list[str]:
    """The command line of the program that torchrun starts in ``stage``: what follows the second -m MODULE."""
    return list(stage.command[stage.command.index("-m", stage.command.index("-m") + 1) + 2 :])


class _RefusingParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are exceptions."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _megatron_parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    from megatron_btx.arguments import add_btx_arguments

    parser = _RefusingParser(allow_abbrev=False, add_help=False)
    add_megatron_arguments(parser)
    return add_btx_arguments(parser)


def check_sections(parser: argparse.ArgumentParser, sections: Mapping[str, list[str]]) -> None:
    """Parse each section's command line with ``parser``; raises InputError naming the place and the close match."""
    known = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    for where, argv in sections.items():
        for name in (word.removeprefix("--") for word in argv if word.startswith("--")):
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = (
                    f"; did you mean {close[0]}?" if close else "; see python -m megatron_btx.pretrain --help-megatron"
                )
                raise InputError(f"{where}.{name}: Megatron has no flag --{name}; {hint}")
        try:
            parser.parse_args(argv)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def check_stages(parser: argparse.ArgumentParser, stages: Mapping[str, tuple[int, list[str]]]) -> None:
    """What a training or evaluating program checks of its arguments alone; ``stages``: name -> processes, words.

    Raises:
        InputError: the stage, and the program's own sentence.
    """
    from megatron_btx import checks

    for stage, (processes, words) in stages.items():
        try:
            args = parser.parse_args(words)
            args.world_size, args.rank = processes, 0
            for name in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"):  # as Megatron's validation does
                value = getattr(args, name)
                setattr(args, name, value[0] if isinstance(value, list) and len(value) == 1 else value)
            checks.check_flags(args)
            checks.check_layout(args)
            checks.check_finetuning(args)
            _check_bound(args)
            _check_data(args)
        except InputError as error:
            raise InputError(f"stage {stage}: {error}") from None


def _check_data(args: Any) -> None:
    """Refuse datasets on which a stage would not start, or not end, before the stages ahead of it are trained.

    A run's own datasets lie at paths relative to its directory and may have to be made first: they are not looked at.
    """
    from megatron_btx.data.description import ALLOWANCE, Tokenizer, check_description
    from megatron_btx.data.inputs import form_of
    from megatron_btx.data.splits import LEGACY_SPLIT, check_splits, splits_of
    from megatron_btx.data.training import check_indexed_dataset

    trains = args.train_data_path or args.data_path or args.data_args_path or args.per_split_data_args_path
    if args.data_path and args.split is None:
        args.split = LEGACY_SPLIT
    named: dict[str, str] = {}
    for split in splits_of(args):
        named |= dict.fromkeys(split.blend[0], split.flag)
    for flag, words in (("--btx-valid-data", args.btx_valid_data), ("--btx-eval-data", args.btx_eval_data)):
        for name, _, path in (word.partition("=") for word in words):
            if form_of(path) is None:
                named[path] = f"{flag} {name}="
    given = {prefix: flag for prefix, flag in named.items() if os.path.isabs(prefix)}
    for prefix, flag in given.items():
        check_indexed_dataset(prefix, flag)
    if trains:
        check_splits(args, os.path.isabs)
    tokenizer = Tokenizer.of(vars(args), None) if given else None
    for prefix, flag in given.items():
        assert tokenizer is not None
        check_description(prefix, flag, tokenizer, args.padded_vocab_size, ALLOWANCE in args.btx_allow_change)


def _check_bound(args: Any) -> None:
    """A bound that is a number is checked; a file may be one that an earlier stage will make."""
    from megatron_btx import validation

    try:
        float(args.btx_first_loss_bound)
    except (TypeError, ValueError):
        return
    validation.bounds(args)


@exits_with_one_line
def main() -> int:
    """Check the sections and stages given as JSON on standard input; see :func:`check_with_megatron`."""
    from megatron_btx.evaluate import add_evaluation_arguments

    asked: dict[str, Any] = json.load(sys.stdin)
    parser = _megatron_parser()
    check_sections(parser, asked["sections"])
    add_evaluation_arguments(parser)  # set by the pipeline alone, so that no section may have them
    check_stages(parser, asked["stages"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
