"""Megatron's flags as a recipe spells them: merge, write as a command line, check against Megatron's own parser.

A flag mapping has Megatron's names without the leading dashes as keys. ``true`` is a bare flag, ``false`` and null
are "not given" (which takes back what an outer section gave), a list is one flag with several values.
"""

from __future__ import annotations

import argparse
import difflib
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from megatron_btx.errors import InputError, exits_with_one_line

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


def check_with_megatron(file: str, sections: Mapping[str, Flags]) -> None:
    """Refuse flags and values that the installed Megatron does not know; ``sections``: place in ``file`` -> flags.

    Another process does it, because importing Megatron takes some 10 s and 500 MB that would then stay in this one.
    """
    asked = json.dumps({where: to_argv(flags) for where, flags in sections.items()})
    command = [sys.executable, "-W", "ignore", "-m", "megatron_btx.recipe.flags"]
    answer = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or [f"Megatron's parser ended with status {answer.returncode}"]
        raise InputError(f"{file}: {lines[-1].removeprefix('error: ')}")


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


@exits_with_one_line
def main() -> int:
    """Check the sections given as JSON on standard input; see :func:`check_with_megatron`."""
    sections: dict[str, Any] = json.load(sys.stdin)
    check_sections(_megatron_parser(), sections)
    return 0


if __name__ == "__main__":
    sys.exit(main())
