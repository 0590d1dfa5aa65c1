"""The flags this project adds to Megatron's: only for what Megatron cannot say, all starting with ``--btx-``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from megatron_btx.engine.cpu import has_gpu
from megatron_btx.model.groups import GROUPS

TORCH_NATIVE_DEFAULTS: dict[str, Any] = {
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
}
"""Defaults where neither Transformer Engine nor apex is installed: their fused kernels do not exist there."""
CPU_DEFAULTS: dict[str, Any] = TORCH_NATIVE_DEFAULTS | {
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    # Megatron's torch.compile'd functions are not compiled there, and only cost detours.
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
}
"""Defaults without a GPU."""

SAMPLE_DECAY = 1e-4
"""The paper's, per iteration."""
SAMPLE_MIN_TEMPERATURE = 0.5
"""The paper's."""


def add_btx_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags to Megatron's parser, and this machine's defaults to Megatron's own flags.

    Defaults depend on what is installed; whatever they are, they are stored in the checkpoint and compared on resume
    (:mod:`megatron_btx.checkpoint.arguments`), so that a run cannot change numerics by moving to another machine.
    """
    parser.set_defaults(**machine_defaults())
    add_own_arguments(parser)
    return parser


def add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every program of ours takes, beside Megatron's: a group for each thing they are about."""
    group = parser.add_argument_group("megatron_btx", "Branch-Train-MiX on top of Megatron-core")
    group.add_argument(
        "--btx-metrics", metavar="FILE",
        help="append one JSON object per training step to FILE: every scalar that Megatron logs, in full precision "
        "(default: none)",
    )  # fmt: skip
    group.add_argument(
        "--btx-allow-change", metavar="ARGUMENT", nargs="+", default=[],
        help="names of stored model arguments (as norm_epsilon) that may differ from those of the checkpoint that is "
        "loaded; without it a difference that would silently change the model is refused. dataset_tokenizer allows "
        "datasets that were made with another tokenizer than this run's (default: none)",
    )  # fmt: skip

    group = parser.add_argument_group("megatron_btx saving", "which checkpoints of --save are kept")
    group.add_argument(
        "--btx-keep-last", metavar="K", type=int,
        help="keep the K newest whole checkpoints and remove older ones after each save; from 2 on a damaged last one "
        "costs one interval (default: all are kept)",
    )  # fmt: skip
    group.add_argument(
        "--btx-keep-every", metavar="STEPS", type=int,
        help="beside those of --btx-keep-last, keep every checkpoint whose step is a multiple of STEPS (default: none)",
    )  # fmt: skip

    group = parser.add_argument_group(
        "megatron_btx bad steps", "by default Megatron takes such a step again and ends the run with status 16 or 17"
    )
    group.add_argument(
        "--btx-skip-bad-steps", action="store_true",
        help="a step whose loss or gradient is NaN or infinite changes nothing, and the run goes on; ten in a row end "
        "it with status 2, and so do the last two (default: off)",
    )  # fmt: skip
    group.add_argument(
        "--btx-spike-sigma", metavar="SIGMA", type=float,
        help="with --btx-skip-bad-steps: skip a step, too, whose loss or gradient norm is more than SIGMA standard "
        "deviations above the mean of the last 128 steps, once there are 64 (default: none; 6 is usual)",
    )  # fmt: skip

    group = parser.add_argument_group("megatron_btx finetuning", "top-k, switch and soft routing are Megatron's flags")
    group.add_argument(
        "--btx-sample-top1", action="store_true",
        help="route each token to one sampled expert (Gumbel-softmax, annealed) in training and to the likeliest in "
        "evaluation; the first mixture layer takes all experts. With --moe-router-topk 1 --moe-router-pre-softmax "
        "(default: off)",
    )  # fmt: skip
    group.add_argument(
        "--btx-sample-decay", metavar="RATE", type=float, default=SAMPLE_DECAY,
        help="how fast the sampling temperature exp(-RATE x iteration) falls, per iteration (default: 1e-4)",
    )  # fmt: skip
    group.add_argument(
        "--btx-sample-min-temperature", metavar="T", type=float, default=SAMPLE_MIN_TEMPERATURE,
        help="the temperature of --btx-sample-top1 falls from 1 to this, above 0 and at most 1 (default: 0.5)",
    )  # fmt: skip
    group.add_argument(
        "--btx-load-balancing", choices=("megatron", "paper"), default="megatron",
        help="form of the balancing losses aux_loss and global_aux_loss: Megatron's, which counts hard choices, or the "
        "paper's alpha N sum u p with mean gates u; alpha is --moe-aux-loss-coeff (default: megatron)",
    )  # fmt: skip
    group.add_argument(
        "--btx-freeze", metavar="GROUP", nargs="+", action="extend", default=[],
        help=f"parameters that are not trained: any of {', '.join(GROUPS)}, or all-but:GROUP[,GROUP] (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--btx-lr-multiplier", metavar="GROUP=X", nargs="+", action="extend", default=[],
        help="factor on peak and least learning rate of a group, as router=10 (default: 1 for every group)",
    )  # fmt: skip

    group = parser.add_argument_group("megatron_btx validation", "loss per domain while training")
    group.add_argument(
        "--btx-valid-data", metavar="DOMAIN=TEXT", nargs="+", action="extend", default=[],
        help="for every domain the prefix of an indexed dataset, or a text file (docs/recipes.md); its loss is taken "
        "every --eval-interval steps and after the last one, whatever --eval-iters says (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--btx-valid-tokens", metavar="TOKENS", type=int, default=65536,
        help="tokens per domain of --btx-valid-data, rounded down to whole batches, from the start (default: 65536)",
    )  # fmt: skip
    group.add_argument(
        "--btx-first-loss-bound", metavar="NATS|FILE",
        help="stop a mixture's finetuning at its first step when its loss is above NATS per token; FILE, an evaluation "
        "of the experts by megatron_btx.evaluate, bounds it on every domain of --btx-valid-data by the worst expert "
        "there (default: ln of the vocabulary, the loss of guessing)",
    )  # fmt: skip


def add_training_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flag of the training program alone."""
    parser.add_argument_group("megatron_btx training", "used by python -m megatron_btx.pretrain").add_argument(
        "--btx-check",
        action="store_true",
        help="check the command line, the checkpoint and the data in one process, say what would be trained and train "
        "nothing; WORLD_SIZE says for how many processes (default: off)",
    )
    return parser


def help_if_asked(
    description: str | None, extra: Callable[[argparse.ArgumentParser], argparse.ArgumentParser] | None = None
) -> None:
    """Answer ``--help`` and ``--help-megatron`` on rank 0, and end with status 0; otherwise do nothing.

    Ours at once, without importing Megatron, whose own --help takes long and in 0.19 ends in an error: texts of its
    flags have percent signs that argparse takes for placeholders. ``--help-megatron`` lists those too.
    """
    asked = {"-h", "--help", "--help-megatron"} & set(sys.argv[1:])
    if not asked:
        return
    if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")) == "0":
        parser = argparse.ArgumentParser(
            usage="%(prog)s [Megatron's flags] [--btx-... flags]",
            description=description,
            epilog="Every flag of Megatron-core's training program is taken too: --help-megatron lists them.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("--help-megatron", action="store_true", help="list Megatron's flags too, and exit")
        if extra:
            extra(parser)
        add_own_arguments(parser)
        if "--help-megatron" in asked:
            from megatron.training.arguments import add_megatron_arguments

            add_megatron_arguments(parser)
            parser.set_defaults(**machine_defaults())
            for action in parser._actions:
                try:
                    (action.help or "") % vars(action)
                except (ValueError, TypeError, KeyError):
                    action.help = str(action.help).replace("%", "%%")
        parser.print_help()
        sys.stdout.flush()
    raise SystemExit(0)


def machine_defaults() -> dict[str, Any]:
    """Defaults for Megatron's flags that follow from what this machine has (a GPU, Transformer Engine, apex)."""
    defaults: dict[str, Any] = {
        # Megatron 0.19 has no default for the evaluation interval and divides by it even with --eval-iters 0.
        "eval_interval": 1000,
        # Without it Megatron only warns, and saves as if --async-save were not given.
        "use_persistent_ckpt_worker": True,
    }
    # Megatron's default for --async-save is a library of its own, and a traceback where that is absent.
    if find_spec("nvidia_resiliency_ext") is None:
        defaults["async_strategy"] = "mcore"
    if not has_gpu():
        defaults |= CPU_DEFAULTS
    elif find_spec("transformer_engine") is None:
        defaults |= TORCH_NATIVE_DEFAULTS
    return defaults
