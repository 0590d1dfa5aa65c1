"""Loss per domain and routing per layer, for one or several checkpoints of one architecture.

    torchrun --nproc-per-node N -m megatron_btx.evaluate [Megatron's model and layout flags]
        --btx-eval-model NAME=PATH ... --btx-eval-data DOMAIN=TEXT ... --btx-eval-output FILE

Works under any layout, pipelines included. Each domain's text is read from its beginning in consecutive sequences, so
that every model, layout and batch size sees the same tokens; sums are kept in fp64.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_btx.common.cli_args import read_pairs
from megatron_btx.common.errors import InputError, exits_with_one_line
from megatron_btx.common.files import write_json
from megatron_btx.common.log import say
from megatron_btx.engine.checks.start import compare_with_stored
from megatron_btx.engine.program import start_tool
from megatron_btx.engine.restricted_loading import load_weights
from megatron_btx.mixing.loader import Source, open_source
from megatron_btx.model.build import build_model
from megatron_btx.model.step import batches_of, forward
from megatron_btx.runner.run_dir import make_loss
from megatron_btx.runner.schemas import Score


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of this program to Megatron's parser."""
    group = parser.add_argument_group("megatron_btx evaluation", "used by python -m megatron_btx.evaluate")
    models = "a checkpoint to evaluate, and the name it gets in the results; repeat for several of one architecture "
    add_pairs(group, "--btx-eval-model", "NAME=PATH", f"{models}(required)")
    texts = (
        "the prefix of an indexed dataset, or a text file (docs/recipes.md), and the domain it stands for (required)"
    )
    add_pairs(group, "--btx-eval-data", "DOMAIN=TEXT", texts)
    group.add_argument(
        "--btx-eval-tokens",
        metavar="TOKENS",
        type=int,
        default=65536,
        help="tokens per domain, rounded down to whole batches of sequences, from the start of each dataset "
        "(default: 65536)",
    )
    group.add_argument("--btx-eval-output", metavar="FILE", help="where to write the results as JSON (required)")
    return parser


@exits_with_one_line
def main() -> int:
    """Evaluate what the command line names; see --help."""
    args, experts = start_tool(__doc__, add_evaluation_arguments, _check_words, _check_inputs)
    model = build_model(args)
    scores, about = [], {}
    for name, path in args.btx_eval_model.items():
        load_weights(model, path)
        losses, about[name] = evaluate_model(model, name, args.btx_eval_data, path)
        scores += [score.model_dump() for score in losses]
        say(f"{name}: " + ", ".join(f"{score.data} {score.value:.4f}" for score in losses))
    if args.rank == 0:
        result = {"scores": scores, "models": about, "experts": experts, "eod_mask_loss": args.eod_mask_loss}
        write_json(Path(args.btx_eval_output), result)
    return 0


def _check_words(args: argparse.Namespace) -> None:
    require(args, "btx_eval_model", "btx_eval_data", "btx_eval_output")


def _check_inputs(args: argparse.Namespace) -> list[str] | None:
    """Check the models and texts; returns the names of the experts, None for dense models."""
    from megatron_btx.data.texts import check_texts

    stored = {path: compare_with_stored(path, vars(args)) for path in args.btx_eval_model.values()}
    experts = expert_names(stored, args.num_experts)
    check_texts(args.btx_eval_data, "--btx-eval-data", args.btx_eval_tokens, "--btx-eval-tokens", args)
    return experts


def evaluate_model(model: list[Any], name: str, data: dict[str, str], path: str) -> tuple[list[Score], dict[str, Any]]:
    """The losses of one loaded model, and what it is: parameters and, of a mixture, routing."""
    from megatron.training import get_args

    from megatron_btx.data.texts import start_of
    from megatron_btx.evaluation.routing import divide_up, route

    source = open_source("the model", path)
    args = get_args()
    total, active = count_parameters(source, args.moe_router_topk, args.btx_sample_top1)
    about: dict[str, Any] = {
        "checkpoint": str(Path(path).resolve()),
        "parameters": total,
        "active_parameters": active,
        "routing": {} if source.sizes.experts else None,
    }
    scores = []
    for domain, prefix in data.items():
        if args.num_experts:
            routed = route(model, f"{domain}: {prefix}", prefix, args.btx_eval_tokens)
            scores.append(make_loss(name, domain, routed.loss, routed.tokens, routed.stderr))
            about["routing"][domain] = divide_up(routed.counts.choices_LE).tolist()
        else:
            loss = forward(model, batches_of(start_of(prefix, args.btx_eval_tokens), f"{domain}: {prefix}"))
            scores.append(make_loss(name, domain, loss.nats, loss.tokens, loss.stderr))
    return scores, about


def count_parameters(source: Source, topk: int, sampled: bool) -> tuple[int, int]:
    """All parameters of a model, and those active for one token.

    Args:
        topk: experts per token and mixture layer.
        sampled: sampled top-1 routing, whose first mixture layer takes all experts.
    """
    sizes = {name: math.prod(held.shape) for name, held in source.pieces.items()}
    total = sum(sizes.values())
    in_experts = sum(n for name, n in sizes.items() if ".experts." in name)
    if not in_experts:
        return total, total
    experts, layers = source.sizes.experts, sum(source.sizes.mixture_layers)
    taken = layers * topk + (experts - topk if sampled else 0)
    return total, total - in_experts + in_experts * taken // (experts * layers)


def add_pairs(group: argparse._ActionsContainer, flag: str, metavar: str, what: str) -> None:
    """Add a flag that takes NAME=PATH words, and may stand several times."""
    group.add_argument(flag, metavar=metavar, nargs="+", action="extend", default=[], help=what)


def require(args: argparse.Namespace, *names: str) -> None:
    """Refuse a program's flag that is not given. NAME=PATH words become a mapping. Raises InputError."""
    for name in names:
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if not value:
            raise InputError(f"{flag} is missing; --help says what it takes")
        if isinstance(value, list):
            setattr(args, name, read_pairs(value, flag))


def expert_names(stored: Mapping[str, Mapping[str, Any]], count: int | None) -> list[str] | None:
    """The names of the experts, in the order of the mixtures; None for dense models.

    Args:
        stored: path -> the arguments that its checkpoint holds.

    Raises:
        InputError: two mixtures of other experts, or of the same in another order, which one list would mislabel.
    """
    if not count:
        return None
    named = {path: list(arguments["btx_experts"]) for path, arguments in stored.items() if arguments.get("btx_experts")}
    if not named:
        return [f"expert {number}" for number in range(count)]
    first, names = next(iter(named.items()))
    for path, others in named.items():
        if others != names:
            raise InputError(
                f"{path}: its experts are {', '.join(others)}, those of {first} {', '.join(names)}; mixtures of other "
                "experts, or in another order, need a run of their own"
            )
    return names


if __name__ == "__main__":
    sys.exit(main())
