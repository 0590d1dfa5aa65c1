"""Megatron's flags as a recipe spells them: merge, write as a command line, check what arithmetic can.

A flag mapping has Megatron's names without the leading dashes as keys. ``true`` is a bare flag, ``false`` and null
are "not given" (which takes back what an outer section gave), a list is one flag with several values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from megatron_btx.ground.errors import InputError

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

_LAYERS_AT_MOST = 10_000
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


class MissingFlagError(InputError):
    """A flag that a stage needs is not given; another may have been meant for it."""


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
    """The whole number that flag ``name`` has.

    Raises:
        MissingFlagError: it is not given and has no default.
        InputError: it is no whole number above zero.
    """
    value = flags.get(name, default)
    expected = "expected a whole number above zero (model, training, megatron)"
    if value is None:
        raise MissingFlagError(f"--{name} is not given; {expected}")
    if isinstance(value, bool) or not str(value).isdecimal() or int(str(value)) < 1:
        raise InputError(f"--{name} is {value!r}; {expected}")
    return int(str(value))


def check_layout(stage: str, processes: int, flags: Flags) -> None:
    """Refuse a layout that cannot be: the arithmetic between processes, parallel sizes, layers, experts and batch."""
    tensor, pipeline, context, expert = (number(flags, name, 1) for name in LAYOUT_FLAGS[:4])
    expert_tensor = number(flags, "expert-tensor-parallel-size", tensor)
    num_experts = number(flags, "num-experts", 0) if "num-experts" in flags else 0

    def refuse(found: str, expected: str, remedy: str = "change its layout") -> NoReturn:
        raise InputError(f"stage {stage}: the layout does not fit: {found}; expected {expected}; {remedy}")

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
    if layers > _LAYERS_AT_MOST:
        refuse(f"{layers} layers", f"at most {_LAYERS_AT_MOST}", "lower num-layers")
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
            "lower micro-batch-size or its processes, or raise global-batch-size",
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


def check_saving(stage: str, flags: Flags) -> None:
    """Refuse a stage that Megatron would refuse at its start, because it is not told how often to save."""
    if flags.get("save-interval") is None:
        raise MissingFlagError(
            f"stage {stage}: no save-interval; put it under training, in steps (as save-interval: 200): a stopped "
            "stage goes on from its last checkpoint"
        )
    number(flags, "save-interval")
