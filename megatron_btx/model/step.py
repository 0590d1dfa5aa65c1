"""One micro-batch through the model, in training and in evaluation: the same function and the same masks."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_btx.common.errors import InputError

if TYPE_CHECKING:
    import torch

    from megatron_btx.distributed.abort import Stopping
    from megatron_btx.model.sampling import Step


def forward_step(
    data_iterator: Iterator[Any],
    model: Any,
    step: Step | None = None,
    stopping: Stopping | None = None,
    micro_batch_size: int | None = None,
    see_loss: Callable[[Any, Any], None] | None = None,
    keep_losses: bool = False,
) -> tuple[Any, Any]:
    """One micro-batch through this stage: the per-token losses on the last one, and how to reduce them.

    Args:
        step: in training, is told which micro-batch this is.
        stopping: is told that this rank got on, and tells all ranks when one of them reads what it cannot use.
        micro_batch_size: sequences of the micro-batch; by default as Megatron's flags for training or evaluation say.
        see_loss: is shown the sum of losses and the tokens of every micro-batch that is trained on.
        keep_losses: report the loss of every token, too.
    """
    from megatron.core import mpu
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args

    from megatron_btx.data.training import ForeignIdError, get_batch

    if stopping is not None:
        stopping.moved()
    args, chunk = get_args(), get_attr_wrapped_model(model, "vp_stage")
    if step is not None and model.training:
        step.begin_microbatch(
            args.curr_iteration,
            args.consumed_train_samples,
            get_num_microbatches(),
            args.micro_batch_size,
            mpu.get_data_parallel_world_size(),
            mpu.get_data_parallel_rank(),
            chunk or 0,
        )
    micro = micro_batch_size or (args.micro_batch_size if model.training else args.eval_micro_batch_size)
    try:
        batch = get_batch(data_iterator, chunk, micro, model.training)
    except ForeignIdError as refusal:
        if stopping is not None:
            stopping.stop_all(refusal)
        raise
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    if not model.training:
        see_loss = None
    mask = batch["loss_mask"]
    return output, functools.partial(language_model_loss, mask, see_loss=see_loss, keep_losses=keep_losses)


def language_model_loss(
    loss_mask_BS: Any, losses_BS: Any, see_loss: Callable[[Any, Any], None] | None = None, keep_losses: bool = False
) -> tuple[Any, Any, dict[str, Any]]:
    """Sum of the per-token cross-entropies in nats, the number of tokens, and both for reporting.

    Args:
        loss_mask_BS: [B, S], 1 where a token counts.
        losses_BS: [B, S], cross-entropy per token.
        see_loss: is shown the sum and the number.
        keep_losses: report every token's loss as well, NaN where it does not count.
    """
    import torch

    mask = loss_mask_BS.reshape(-1).float()
    total = torch.sum(losses_BS.reshape(-1).float() * mask)
    tokens = mask.sum().to(torch.int)
    if see_loss is not None:
        see_loss(total, tokens)
    report = {"lm loss": torch.stack([total.detach(), tokens.to(total.dtype)])}
    if keep_losses:
        report["losses"] = losses_BS.detach().float().masked_fill(loss_mask_BS == 0, math.nan)
    return total, tokens, report


class MeanLoss(NamedTuple):
    """The mean loss over everybody's batches; the same on all ranks."""

    nats: float
    """Per token."""
    tokens: int
    stderr: float | None
    """Standard error over micro-batches; None of a single one."""
    losses_QS: Any = None
    """Loss of every token, [sequences, S] fp32 on the CPU, NaN where it does not count; None where nobody asked."""


def forward(model: list[Any], batches: list[dict[str, Any]], keep_losses: bool = False) -> MeanLoss:
    """The mean loss over everybody's batches; with ``keep_losses`` also that of every token."""
    import torch
    from megatron.core import mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.training import get_args

    args = get_args()
    with torch.no_grad():
        losses = get_forward_backward_func()(
            forward_step_func=functools.partial(
                forward_step, micro_batch_size=args.micro_batch_size, keep_losses=keep_losses
            ),
            data_iterator=[iter(batches) for _ in model] if len(model) > 1 else iter(batches),
            model=model,
            num_microbatches=len(batches),
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=True,
        )
    sums = torch.zeros(2, dtype=torch.float64, device="cuda")
    spread = torch.zeros(2, dtype=torch.float64, device="cuda")
    is_counted = mpu.is_pipeline_last_stage(ignore_virtual=True) and mpu.get_tensor_model_parallel_rank() == 0
    if is_counted:
        for loss in losses:
            sums += loss["lm loss"].double()
    torch.distributed.all_reduce(sums)
    mean = sums[0] / sums[1]
    if is_counted:
        for loss in losses:
            total, tokens = loss["lm loss"].double()
            spread += torch.stack([(total - mean * tokens) ** 2, torch.ones_like(mean)])
    torch.distributed.all_reduce(spread)
    squares, count = spread.tolist()
    stderr = None
    if count > 1 and sums[1] > 0:
        stderr = math.sqrt(squares * count / (count - 1)) / sums[1].item()
    losses_QS = None
    if keep_losses:
        losses_QS = _gather_losses([loss["losses"] for loss in losses] if is_counted else [], len(batches))
    return MeanLoss(mean.item(), int(sums[1].item()), stderr, losses_QS)


def _gather_losses(own: list[torch.Tensor], steps: int) -> torch.Tensor:
    """Everybody's losses in the order of the sequences, [Q, S] on every rank.

    Args:
        own: [B, S / CP] of each step; empty on a rank that another one stands for.
    """
    import torch
    from megatron.core import mpu
    from megatron.training import get_args

    args = get_args()
    ranks, parts = mpu.get_data_parallel_world_size(), mpu.get_context_parallel_world_size()
    # With context parallelism a rank has two parts of a sequence: one from its beginning, one from its end.
    halves = 2 * parts if parts > 1 else 1
    shape = (steps, ranks, args.micro_batch_size, halves, args.seq_length // halves)
    losses = torch.zeros(shape, dtype=torch.float32, device="cuda")
    if own:
        at = mpu.get_context_parallel_rank()
        mine = [at, halves - 1 - at] if parts > 1 else [0]
        stacked = torch.stack(own)
        losses[:, mpu.get_data_parallel_rank()][:, :, mine] = stacked.view(steps, shape[2], len(mine), shape[4])
    torch.distributed.all_reduce(losses)
    return losses.view(-1, args.seq_length).cpu()


def batches_of(text: Any, where: str) -> list[dict[str, Any]]:
    """This data-parallel rank's micro-batches of a text: its consecutive sequences, as far as they fill batches.

    Raises:
        InputError: the text is shorter than one batch, or holds ids beyond the vocabulary; ``where`` says which.
    """
    import numpy as np
    import torch
    from megatron.core import mpu
    from megatron.training import get_args

    from megatron_btx.data.texts import tokens_of_a_batch
    from megatron_btx.data.training import check_text

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


def masks_and_positions(tokens_BS: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
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
