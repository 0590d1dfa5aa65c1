"""Loss per domain and routing per layer, for one or several checkpoints of one architecture.

    torchrun --nproc-per-node N -m megatron_btx.evaluate [Megatron's model and layout flags]
        --btx-eval-model NAME=PATH ... --btx-eval-data DOMAIN=TEXT ... --btx-eval-output FILE

Works under any layout, pipelines included. Each domain's text is read from its beginning in consecutive sequences, so
that every model, layout and batch size sees the same tokens; sums are kept in fp64.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.engine.cpu import install_cpu_stand_ins, prepare_environment
from megatron_btx.engine.flags import help_if_asked
from megatron_btx.ground.errors import InputError, exits_with_one_line
from megatron_btx.ground.files import write_json

if TYPE_CHECKING:
    import torch

    from megatron_btx.mixing.sources import Source

prepare_environment()


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


@exits_with_one_line
def main() -> int:
    """Evaluate what the command line names; see --help."""
    help_if_asked(__doc__, add_evaluation_arguments)
    install_cpu_stand_ins()
    from megatron.training import initialize

    from megatron_btx.data.texts import check_texts
    from megatron_btx.engine import repairs
    from megatron_btx.engine.checks.start import compare_with_stored
    from megatron_btx.engine.cpu import has_gpu
    from megatron_btx.engine.program import parse_arguments

    args = parse_arguments(add_evaluation_arguments, quiet=True, check_own=_inputs)
    models, data = _inputs(args)
    stored = [compare_with_stored(path, vars(args)) for path in models.values()]
    experts = expert_names(dict(zip(models.values(), stored, strict=True)), args.num_experts)
    check_texts(data, "--btx-eval-data", args.btx_eval_tokens, "--btx-eval-tokens", args)
    repairs.install()
    initialize.initialize_megatron(allow_no_cuda=not has_gpu())
    model = build_model(args)
    results = {}
    for name, path in models.items():
        load_weights(model, path)
        results[name] = evaluate_model(model, data, path)
        _say(f"{name}: " + ", ".join(f"{d} {loss:.4f}" for d, loss in results[name]["losses"].items()))
    if args.rank == 0:
        result = {"models": results, "experts": experts, "eod_mask_loss": args.eod_mask_loss}
        write_json(Path(args.btx_eval_output), result)
    return 0


def _inputs(args: Any) -> tuple[dict[str, str], dict[str, str]]:
    return inputs_of(args, "eval", "the file")


def inputs_of(args: Any, kind: str, output: str) -> tuple[dict[str, str], dict[str, str]]:
    """The models and the texts, name -> path, of ``--btx-KIND-model`` and ``--btx-KIND-data``.

    Args:
        output: what ``--btx-KIND-output`` names, for the refusal.

    Raises:
        InputError: something is missing or has another form.
    """
    models, data = (named_paths(getattr(args, f"btx_{kind}_{of}"), f"--btx-{kind}-{of}") for of in ("model", "data"))
    if getattr(args, f"btx_{kind}_output") is None:
        raise InputError(f"--btx-{kind}-output is missing; name {output} for the results")
    return models, data


def named_paths(texts: list[str], flag: str) -> dict[str, str]:
    """NAME=PATH words as a mapping. Raises InputError for another form, a name given twice, or none."""
    if not texts:
        raise InputError(f"{flag} is missing; give at least one NAME=PATH")
    pairs = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not separator or not name or not path or name in pairs:
            raise InputError(f"{flag} {text}: expected NAME=PATH, every name once")
        pairs[name] = path
    return pairs


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


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def build_model(args: Any) -> list[Any]:
    """The model chunks of this rank, without gradients, buffers or optimizer."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_btx.training.program import model_config

    config = model_config(args)
    config.finalize()
    model = GPTModelBuilder(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    for chunk in model:
        chunk.eval()
    return model


def load_weights(model: list[Any], path: str) -> None:
    """Load a checkpoint's weights with Megatron's own loader, from its root or one iteration folder."""
    from megatron.training import get_args
    from megatron.training.checkpointing import load_checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_btx.checkpoint.iterations import resolve_iteration
    from megatron_btx.engine.restricted_loading import loading_failed

    folder = resolve_iteration(path)
    args = get_args()
    args.load, args.finetune, args.no_load_optim, args.no_load_rng = str(folder.parent), True, True, True
    args.ckpt_step = int(folder.name.removeprefix("iter_")) if folder.name.startswith("iter_") else None
    try:
        load_checkpoint(model, None, None)
    except (CheckpointException, pickle.UnpicklingError) as failure:
        raise loading_failed(path, failure) from failure


def evaluate_model(model: list[Any], data: dict[str, str], path: str) -> dict[str, Any]:
    """Losses, token counts, parameter counts and routing of one loaded model."""
    from megatron.training import get_args

    from megatron_btx.mixing.opening import open_source

    source = open_source("the model", path)
    args = get_args()
    total, active = count_parameters(source, args.moe_router_topk, args.btx_sample_top1)
    result: dict[str, Any] = {
        "checkpoint": str(Path(path).resolve()),
        "parameters": total,
        "active_parameters": active,
        "losses": {},
        "tokens": {},
        "routing": {} if source.sizes.experts else None,
    }
    for domain, prefix in data.items():
        loss, tokens, shares_LE = evaluate_domain(model, domain, prefix)
        result["losses"][domain], result["tokens"][domain] = loss, tokens
        if shares_LE is not None:
            result["routing"][domain] = shares_LE
    return result


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


def evaluate_domain(
    model: list[Any], domain: str, prefix: str, tokens: int | None = None
) -> tuple[float, int, list[list[float]] | None]:
    """Mean loss in nats per token over the first tokens of a dataset.

    Args:
        tokens: how many at most; by default --btx-eval-tokens.

    Returns:
        loss; tokens; for mixtures the share of tokens per layer and expert, all choices counted, else None.
    """
    import torch
    from megatron.training import get_args

    from megatron_btx.data.texts import start_of
    from megatron_btx.model.watch import watching

    args = get_args()
    batches = batches_of(start_of(prefix, args.btx_eval_tokens if tokens is None else tokens), f"{domain}: {prefix}")
    counts_LE = torch.zeros(args.num_layers, args.num_experts or 1, dtype=torch.float64, device="cuda")

    def count(layer: int, _router: Any, _inputs: Any, outputs: Any) -> None:
        counts_LE[layer] += outputs[1].reshape(-1, counts_LE.size(1)).sum(dim=0).double()

    with watching(model, count):
        loss, counted = forward(model, batches)
    torch.distributed.all_reduce(counts_LE)
    shares_LE = None
    if args.num_experts:
        shares_LE = (counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
    return loss, counted, shares_LE


def forward(model: list[Any], batches: list[dict[str, Any]]) -> tuple[float, int]:
    """The mean loss in nats per token over everybody's batches, and the tokens; the same on all ranks."""
    import torch
    from megatron.core import mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.training import get_args

    from megatron_btx.training.program import forward_step

    args = get_args()
    with torch.no_grad():
        losses = get_forward_backward_func()(
            forward_step_func=functools.partial(forward_step, micro_batch_size=args.micro_batch_size),
            data_iterator=[iter(batches) for _ in model] if len(model) > 1 else iter(batches),
            model=model,
            num_microbatches=len(batches),
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=True,
        )
    sums = torch.zeros(2, dtype=torch.float64, device="cuda")
    if mpu.is_pipeline_last_stage(ignore_virtual=True) and mpu.get_tensor_model_parallel_rank() == 0:
        for loss in losses:
            sums += loss["lm loss"].double()
    torch.distributed.all_reduce(sums)
    return (sums[0] / sums[1]).item(), int(sums[1].item())


def batches_of(text: Any, where: str) -> list[dict[str, Any]]:
    """This data-parallel rank's micro-batches of a text: its consecutive sequences, as far as they fill batches.

    Raises:
        InputError: the text is shorter than one batch, or holds ids beyond the vocabulary; ``where`` says which.
    """
    import numpy as np
    import torch
    from megatron.core import mpu
    from megatron.training import get_args

    from megatron_btx.data.foreign_ids import check_text
    from megatron_btx.data.texts import tokens_of_a_batch

    args = get_args()
    check_text(text, where, args)
    length, micro, ranks = args.seq_length, args.micro_batch_size, mpu.get_data_parallel_world_size()
    stages = args.pipeline_model_parallel_size
    steps = (len(text) - 1) // tokens_of_a_batch(args) * stages
    if steps == 0:
        raise InputError(
            f"{where}: {len(text)} tokens, fewer than one batch of {micro * ranks} sequences of {length} for every "
            "pipeline stage; give more tokens or use a smaller batch"
        )
    order = np.arange(steps * micro * ranks).reshape(steps, ranks, micro)[:, mpu.get_data_parallel_rank()]
    batches = []
    for sequences in order:
        rows = torch.from_numpy(np.stack([text[s * length : (s + 1) * length + 1] for s in sequences]))
        tokens = rows[:, :-1].contiguous()
        batches.append({"tokens": tokens, "labels": rows[:, 1:].contiguous(), **masks_and_positions(tokens, args)})
    return batches


def masks_and_positions(tokens_BS: torch.Tensor, args: Any) -> dict[str, Any]:
    """Which tokens count, who sees whom and where everybody stands: the same as in training, by Megatron's function.

    ``--eod-mask-loss``, ``--reset-position-ids`` and ``--reset-attention-mask`` decide.

    Returns:
        loss_mask: [B, S] float, 1 where a token counts; position_ids: [B, S] int64; attention_mask: [B, 1, S, S]
        boolean, true where nothing is seen, or None where the layers make their own.
    """
    import torch
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
    from megatron.training import get_tokenizer

    # Tensor-parallel ranks broadcast a mask to each other exactly where Megatron's datasets would have made one.
    flags = (args.reset_position_ids, args.reset_attention_mask, args.eod_mask_loss)
    has_mask = args.create_attention_mask_in_dataloader
    eod = get_tokenizer().eod
    rows = [_get_ltor_masks_and_position_ids(tokens_S, eod, *flags, has_mask) for tokens_S in tokens_BS]
    attention, loss, positions = zip(*rows, strict=True)
    return {
        "loss_mask": torch.stack(loss),
        "position_ids": torch.stack(positions),
        "attention_mask": torch.stack(attention) if has_mask else None,
    }


if __name__ == "__main__":
    sys.exit(main())
