"""Megatron's flags as a recipe spells them: merge, write as a command line, check what arithmetic can.

A flag mapping has Megatron's names without the leading dashes as keys. ``true`` is a bare flag, ``false`` and null
are "not given" (which takes back what an outer section gave), a list is one flag with several values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_btx.common.errors import InputError
from megatron_btx.cost.layouts import ParallelSizes

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
_SIZES = LAYOUT_FLAGS[:5]

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
        raise MissingFlagError(f"{name} is not given; {expected}")
    if isinstance(value, bool) or not str(value).isdecimal() or int(str(value)) < 1:
        raise InputError(f"{name} is {value!r}; {expected}")
    return int(str(value))


def parallel_sizes(flags: Flags) -> ParallelSizes:
    """Over how many processes the flags spread each dimension of a model."""
    given = {name.replace("-", "_"): number(flags, name) for name in _SIZES if name in flags}
    return ParallelSizes.of(given)


def check_layout(stage: str, processes: int, flags: Flags) -> None:
    """Refuse a layout that cannot be: the arithmetic between processes, parallel sizes, layers, experts and batch."""
    misfit = next(_find_misfits(processes, flags), None)
    if misfit is not None:
        raise InputError(f"stage {stage}: the layout does not fit: {misfit}")


def _find_misfits(processes: int, flags: Flags) -> Iterator[str]:
    """Source: ``megatron/core/parallel_state.py``, initialize_model_parallel."""
    sizes = parallel_sizes(flags)
    remedy = "change its layout"
    tensor, pipeline, expert = sizes.tensor, sizes.pipeline, sizes.expert
    if processes % sizes.model_ranks:
        found = f"{processes} processes for TP {tensor} x PP {pipeline} x CP {sizes.context}"
        yield f"{found}; expected a multiple of their product; {remedy}"
    if "num-experts" not in flags:
        if expert > 1:
            yield f"expert-model-parallel-size {expert} for a dense model; expected 1; {remedy}"
    else:
        experts = number(flags, "num-experts")
        if processes % sizes.expert_ranks:
            found = f"{processes} processes for EP {expert} x expert TP {sizes.expert_tensor} x PP {pipeline}"
            yield f"{found}; expected a multiple of their product; {remedy}"
        if experts % expert:
            yield f"{experts} experts over EP {expert}; expected a number of experts that EP divides; {remedy}"
    layers, heads = number(flags, "num-layers"), number(flags, "num-attention-heads")
    if layers % pipeline and not any(name in flags for name in _UNEVEN_PIPELINE):
        yield f"{layers} layers over PP {pipeline}; expected a number of layers that PP divides; {remedy}"
    if heads % tensor:
        yield f"{heads} attention heads over TP {tensor}; expected a number of heads that TP divides; {remedy}"
    micro_batch, global_batch = number(flags, "micro-batch-size"), number(flags, "global-batch-size")
    ranks = processes // sizes.model_ranks
    if global_batch % (micro_batch * ranks):
        yield (
            f"global-batch-size {global_batch} with micro-batch-size {micro_batch} on DP {ranks}; expected a multiple "
            f"of {micro_batch * ranks}; lower micro-batch-size or its processes, or raise global-batch-size"
        )


def measured_batch(processes: int, flags: Flags) -> int:
    """Tokens of one batch to measure on; measurements are rounded down to whole ones."""
    sizes = parallel_sizes(flags)
    ranks = processes // (sizes.tensor * sizes.context)
    return number(flags, "micro-batch-size") * ranks * number(flags, "seq-length")


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
