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
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_btx.common.cli_args import read_pairs
from megatron_btx.common.errors import InputError, exits_with_one_line
from megatron_btx.common.files import write_json
from megatron_btx.common.log import say
from megatron_btx.engine.checks.start import compare_with_stored
from megatron_btx.engine.program import start_tool
from megatron_btx.engine.restricted_loading import load_weights
from megatron_btx.evaluation.btm import Ensembles, MemberLosses, add_btm_arguments
from megatron_btx.mixing.loader import Source, open_source
from megatron_btx.model.build import build_model
from megatron_btx.model.step import MeanLoss, batches_of, forward
from megatron_btx.runner.run_dir import make_loss
from megatron_btx.runner.schemas import BITS_PER_BYTE, Score

if TYPE_CHECKING:
    import numpy as np


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
    add_btm_arguments(parser)
    return parser


class Text(NamedTuple):
    """What is evaluated of a domain."""

    path: str
    ids: np.ndarray
    """Its tokens, and one more: int64."""
    size_bytes: int | None
    """Of the tokens whose loss is measured, as UTF-8; None where the tokenizer cannot say."""

    @classmethod
    def of(cls, path: str, args: argparse.Namespace) -> Text:
        """The first tokens of a text, in whole batches."""
        from megatron_btx.data.texts import count_bytes, start_of, tokens_of_a_batch

        ids = start_of(path, args.btx_eval_tokens)
        batch = tokens_of_a_batch(args)
        ids = ids[: (len(ids) - 1) // batch * batch + 1]
        return cls(path, ids, count_bytes(ids, args))

    def score(self, model: str, domain: str, loss: MeanLoss) -> list[Score]:
        """The loss, and where the bytes are known also what it is per byte, which no tokenizer decides."""
        scores = [make_loss(model, domain, loss.nats, loss.tokens, loss.stderr)]
        if self.size_bytes:
            scale = loss.tokens / self.size_bytes / math.log(2)
            stderr = loss.stderr and loss.stderr * scale
            per_byte = Score(model=model, measure=BITS_PER_BYTE, data=domain, value=loss.nats * scale, stderr=stderr)
            scores.append(per_byte.model_copy(update={"count": self.size_bytes, "unit": "bits/byte"}))
        return scores


@exits_with_one_line
def main() -> int:
    """Evaluate what the command line names; see --help."""
    args, experts = start_tool(__doc__, add_evaluation_arguments, _check_words, _check_inputs)
    texts = {domain: Text.of(path, args) for domain, path in args.btx_eval_data.items()}
    ensembles = Ensembles.of(args)
    members = None
    if ensembles is not None:  # the texts first: a refusal would lose what was evaluated before it
        members = MemberLosses(ensembles, ensembles.read_nearness() if args.rank == 0 else None)
    model = build_model(args)
    scores: list[Score] = []
    about: dict[str, Any] = {}
    for name, path in args.btx_eval_model.items():
        load_weights(model, path)
        losses, about[name] = evaluate_model(model, name, texts, path, members)
        scores += losses
    if members is not None and args.rank == 0:
        experts = list(members.ensembles.texts)
        losses, of_ensembles = measure_ensembles(members, texts, args.micro_batch_size)
        scores += losses
        about |= of_ensembles
    if args.rank == 0:
        found = [score.model_dump() for score in scores]
        result = {"scores": found, "models": about, "experts": experts, "eod_mask_loss": args.eod_mask_loss}
        write_json(Path(args.btx_eval_output), result)
    return 0


def _check_words(args: argparse.Namespace) -> None:
    require(args, "btx_eval_model", "btx_eval_data", "btx_eval_output")
    Ensembles.of(args)


def _check_inputs(args: argparse.Namespace) -> list[str] | None:
    """Check the models and texts; returns the names of the experts, None for dense models."""
    from megatron_btx.data.texts import check_texts

    stored = {path: compare_with_stored(path, vars(args)) for path in args.btx_eval_model.values()}
    experts = expert_names(stored, args.num_experts)
    check_texts(args.btx_eval_data, "--btx-eval-data", args.btx_eval_tokens, "--btx-eval-tokens", args)
    ensembles = Ensembles.of(args)
    if ensembles is not None:
        ensembles.check()
    return experts


def evaluate_model(
    model: list[Any], name: str, texts: Mapping[str, Text], path: str, members: MemberLosses | None = None
) -> tuple[list[Score], dict[str, Any]]:
    """The losses of one loaded model, and what it is: parameters and, of a mixture, routing.

    Args:
        members: is told the losses of every token where the model is one of them.
    """
    from megatron.training import get_args

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
    is_member = members is not None and name in members.ensembles.texts
    losses = {}
    for domain, text in texts.items():
        where = f"{domain}: {text.path}"
        if args.num_experts:
            routed = route(model, where, text.path, args.btx_eval_tokens)
            losses[domain] = MeanLoss(routed.loss, routed.tokens, routed.stderr)
            about["routing"][domain] = divide_up(routed.counts.choices_LE).tolist()
        else:
            losses[domain] = forward(model, batches_of(text.ids, where), keep_losses=is_member)
    if members is not None and is_member:
        members.add(name, model, {domain: loss.losses_QS for domain, loss in losses.items()})
    return _score(name, texts, losses), about


def measure_ensembles(
    members: MemberLosses, texts: Mapping[str, Text], micro: int
) -> tuple[list[Score], dict[str, dict[str, Any]]]:
    """The losses of the ensembles, and what they are: the members' shares stand as the routing of one layer."""
    losses: dict[str, dict[str, MeanLoss]] = {}
    about: dict[str, dict[str, Any]] = {}
    for domain, text in texts.items():
        for name, found in members.measure(domain, text.ids, micro).items():
            losses.setdefault(name, {})[domain] = found.loss
            about.setdefault(name, {"routing": {}})["routing"][domain] = [found.shares]
    scores: list[Score] = []
    for name, of_model in losses.items():
        scores += _score(name, texts, of_model)
    return scores, about


def _score(model: str, texts: Mapping[str, Text], losses: Mapping[str, MeanLoss]) -> list[Score]:
    """A model's scores on all texts, which are said."""
    say(f"{model}: " + ", ".join(f"{domain} {loss.nats:.4f}" for domain, loss in losses.items()))
    scores: list[Score] = []
    for domain, loss in losses.items():
        scores += texts[domain].score(model, domain, loss)
    return scores


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
