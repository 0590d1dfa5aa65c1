"""Loss per domain and routing per layer, for one or several checkpoints of one architecture.

    torchrun --nproc-per-node N -m megatron_btx.evaluate [Megatron's model and layout flags]
        --btx-eval-model NAME=PATH ... --btx-eval-data DOMAIN=TEXT ... --btx-eval-output FILE

Works under any layout, pipelines included. Each domain's text is read from its beginning in consecutive sequences, so
that every model, layout and batch size sees the same tokens; sums are kept in fp64.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_btx.common.errors import exits_with_one_line
from megatron_btx.common.files import write_json
from megatron_btx.common.log import say
from megatron_btx.engine.bootstrap import start_tool
from megatron_btx.engine.restricted_loading import load_weights
from megatron_btx.evaluation.inputs import expert_names, inputs_of
from megatron_btx.evaluation.losses import evaluate_model
from megatron_btx.model.build import build_model


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of this program to Megatron's parser."""
    group = parser.add_argument_group("megatron_btx evaluation", "used by python -m megatron_btx.evaluate")
    group.add_argument(
        "--btx-eval-model",
        metavar="NAME=PATH",
        nargs="+",
        action="extend",
        default=[],
        help="a checkpoint to evaluate, and the name it gets in the results; repeat for several of one architecture "
        "(required)",
    )
    group.add_argument(
        "--btx-eval-data",
        metavar="DOMAIN=TEXT",
        nargs="+",
        action="extend",
        default=[],
        help="the prefix of an indexed dataset, or a text file (docs/data.md), and the domain it stands for (required)",
    )
    group.add_argument(
        "--btx-eval-tokens",
        metavar="TOKENS",
        type=int,
        default=65536,
        help="tokens per domain, rounded down to whole batches of sequences, from the start of each dataset "
        "(default: 65536)",
    )
    group.add_argument(
        "--btx-eval-output", metavar="FILE", default=None, help="where to write the results as JSON (required)"
    )
    return parser


@dataclass(frozen=True)
class _Inputs:
    """What is evaluated, checked."""

    models: dict[str, str]
    """Name -> path."""
    data: dict[str, str]
    """Domain -> path of its text."""
    experts: list[str] | None
    """None for dense models."""


@exits_with_one_line
def main() -> int:
    """Evaluate what the command line names; see --help."""
    args, inputs = start_tool(__doc__, add_evaluation_arguments, _names_of, _check_inputs)
    model = build_model(args)
    scores, about = [], {}
    for name, path in inputs.models.items():
        load_weights(model, path)
        losses, about[name] = evaluate_model(model, name, inputs.data, path)
        scores += [score.model_dump() for score in losses]
        say(f"{name}: " + ", ".join(f"{score.data} {score.value:.4f}" for score in losses))
    if args.rank == 0:
        result = {"scores": scores, "models": about, "experts": inputs.experts, "eod_mask_loss": args.eod_mask_loss}
        write_json(Path(args.btx_eval_output), result)
    return 0


def _names_of(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    return inputs_of(args, "eval", "the file")


def _check_inputs(args: argparse.Namespace) -> _Inputs:
    from megatron_btx.data.texts import check_texts
    from megatron_btx.engine.checks.start import compare_with_stored

    models, data = _names_of(args)
    stored = {}
    for path in models.values():
        stored[path] = compare_with_stored(path, vars(args))
    experts = expert_names(stored, args.num_experts)
    check_texts(data, "--btx-eval-data", args.btx_eval_tokens, "--btx-eval-tokens", args)
    return _Inputs(models, data, experts)


if __name__ == "__main__":
    sys.exit(main())
