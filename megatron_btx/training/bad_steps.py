"""Steps whose loss or gradient is no number, infinite, or far above the last ones: stopped at, or skipped.

**Stopped at** by Megatron's re-run machinery (``core/rerun_state_machine.py``), the default. It takes the step again to
tell a fault of the machine from one of the data or the model, and ends the run with status 16 or 17. It sees gradients
by itself. Losses it sees only where a loss function shows them, as :func:`show_losses` does.

**Skipped** with ``--btx-skip-bad-steps``. Megatron skips a step whose optimizer finds an infinity in its gradients
(``core/optimizer/optimizer.py``, prepare_grads): weights, their state and the schedule stay, and the run goes on with
the next samples. :class:`SkippedSteps` has it find more.

Either way what routers have counted in such a step is put back: experts' biases, running loads of ``global_aux_loss``.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from megatron_btx.common.errors import InputError, MachineError
from megatron_btx.common.log import say
from megatron_btx.engine import patch
from megatron_btx.engine.optimizer import make_state
from megatron_btx.engine.patch import Call
from megatron_btx.model.sampling import Step
from megatron_btx.training.hooks import Callback, log_scalars

if TYPE_CHECKING:
    import torch
    from megatron.core.optimizer import MegatronOptimizer

SPIKE_FACTOR = 10
"""--check-for-spiky-loss: Megatron's own factor on the largest of the first 100 losses (``pretrain_gpt.py``)."""
WINDOW_STEPS = 128
"""How many taken steps --btx-spike-sigma compares with."""
LEAST_STEPS = WINDOW_STEPS // 2
SKIPPED_AT_MOST = 10
"""Bad steps in a row after which a run ends: it would only skip what is left."""
SKIPPED_AT_THE_END = 2
"""Bad steps at a run's end after which nobody knows whether it still learns; one may be a bad batch."""
_RESUME_TO_DISAMBIGUATE, _FAILED_VALIDATION = 16, 17
"""Megatron's statuses."""


def judge_every_step(args: argparse.Namespace) -> None:
    """Have the first step of a start judged as every other, and put back what a step counted that is not taken.

    Megatron lets the first one pass: the optimizer may have no state yet to be saved with the step before. Here it has
    one from the start, and nothing is saved then: the run has begun with it.
    """
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import training

    buffers: list[torch.Tensor] = []

    def train_step(
        step: Call, forward: object, data: object, model: list[Any], optimizer: MegatronOptimizer, *rest: object,
        **named: object,
    ) -> Any:  # fmt: skip
        machine = get_rerun_state_machine()
        is_first = not machine.first_iteration_complete
        if is_first:
            make_state(optimizer)
            patch.replace(machine, "first_iteration_complete", True)
            buffers.extend(buffer for chunk in model for _, buffer in chunk.named_buffers())
        counts = [buffer.clone() for buffer in buffers]
        losses, skipped, saves, *others = step(forward, data, model, optimizer, *rest, **named)
        if skipped and not args.fp16:  # its scaler skips steps whose forward pass is good
            for buffer, before in zip(buffers, counts, strict=True):
                buffer.copy_(before)
        return losses, skipped, bool(saves and args.save and not is_first), *others

    patch.around(training, "train_step", train_step, ("forward_step_func", "data_iterator", "model", "optimizer"))


def show_losses(args: argparse.Namespace, step: Step) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """What shows the losses of training to Megatron's re-run machinery, each with the samples that it is of."""
    import torch
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    def see(total: torch.Tensor, tokens: torch.Tensor) -> None:
        """One micro-batch's sum of losses in nats, and its tokens."""
        machine = get_rerun_state_machine()
        first = step.first_sample
        of = f"the loss of samples {first} to {first + args.micro_batch_size - 1}"
        if args.check_for_nan_in_loss_and_grad:
            for word, rejects in (("is no number (NaN)", torch.isnan), ("is infinite", torch.isinf)):
                machine.validate_result(
                    result=total, rejection_func=rejects, message=f"{of} {word}", tolerance=0.0, fatal=True
                )
        if args.check_for_spiky_loss:
            machine.validate_result(
                result=total / tokens.clamp(min=1),
                rejection_func=functools.partial(machine.is_unexpectedly_large, threshold=SPIKE_FACTOR, context="loss"),
                message=f"{of} is {SPIKE_FACTOR} times the largest before",
                tolerance=0.0,
                fatal=False,
            )

    return see


def explain_exit(status: object) -> MachineError | None:
    """What the re-run machinery found, on a rank that found it; None on the others and for any other status."""
    if status not in (_RESUME_TO_DISAMBIGUATE, _FAILED_VALIDATION):
        return None
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    machine = get_rerun_state_machine()
    if machine.failed_validation_call is None:
        return None
    # Its own lines count one step more.
    found = f"step {get_args().curr_iteration + 1}: {machine.failed_validation_call.caller.message}"
    if "samples" not in found:
        found += f", of {_samples(get_args())}"
    if status == _RESUME_TO_DISAMBIGUATE:
        return MachineError(
            f"{found}, and again when it was taken a second time; what is saved is of before it. Start the same "
            "command on another GPU to learn whether this one is at fault, or go on over such steps with "
            "--btx-skip-bad-steps"
        )
    return MachineError(
        f"{found}, and a second time it was otherwise, or another GPU has found the same: the lines above say which. "
        "Start the same command again; it goes on from its last checkpoint"
    )


def _samples(args: argparse.Namespace) -> str:
    """The samples of the step that is being taken."""
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size

    first = args.consumed_train_samples
    return f"samples {first} to {first + get_current_global_batch_size() - 1}"


class SkippedSteps(Callback):
    """Lets bad steps change nothing. All ranks decide alike, from the same two numbers."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._total: torch.Tensor | float = 0.0
        self._tokens: torch.Tensor | float = 0.0
        self._skips = False
        self._wrapped = False

    def see(self, total: torch.Tensor, tokens: torch.Tensor) -> None:
        """One micro-batch's sum of losses in nats, and its tokens."""
        self._total = self._total + total.detach().double()
        self._tokens = self._tokens + tokens.double()

    def before_step(self, iteration: int, model: list[Any], optimizer: MegatronOptimizer) -> None:
        """Begin a step; before the first one, have the optimizer ask."""
        self._total = self._tokens = 0.0
        if not self._wrapped:
            self._wrapped = True
            patch.around(optimizer, "prepare_grads", functools.partial(self._prepare_grads, optimizer))

    def after_step(self, done: int, model: list[Any], optimizer: MegatronOptimizer, losses: dict[str, Any]) -> None:
        """Log whether the step was skipped, where Megatron's scalars go."""
        log_scalars({"skipped": float(self._skips)}, done)

    def _prepare_grads(self, optimizer: MegatronOptimizer, prepare: Callable[[], bool]) -> bool:
        import torch

        found_infinity = prepare()
        # Nats and tokens of everybody's batches; ranks without losses add nothing.
        sums = torch.zeros(2, dtype=torch.float64, device="cuda")
        sums += torch.stack([torch.as_tensor(self._total).to(sums), torch.as_tensor(self._tokens).to(sums)])
        torch.distributed.all_reduce(sums)
        self._judge({"loss": (sums[0] / sums[1]).item(), "gradient norm": float(optimizer.get_grad_norm())})
        return found_infinity or self._skips

    def _judge(self, step: dict[str, float]) -> None:
        """Decide on a step, say so, and remember one that is taken; InputError where too many in a row are bad."""
        record = self._args.btx_taken_steps
        why = _find_fault(step, record, self._args.btx_spike_sigma)
        self._skips = why is not None
        if why is None:
            record["skipped in a row"] = 0
            for name, value in step.items():
                record[name] = [*record[name], value][-WINDOW_STEPS:]
            return
        record["skipped in a row"] += 1
        text = f"step {self._args.curr_iteration + 1} ({_samples(self._args)}): {why}"
        if record["skipped in a row"] >= SKIPPED_AT_MOST:
            raise InputError(
                f"{text}; {SKIPPED_AT_MOST} steps in a row are bad, so nothing is learned any more: the run ends. Go "
                "back with --ckpt-step, lower --lr, or look at the data"
            )
        say(f"skipped: {text}")


def _find_fault(step: dict[str, float], record: dict[str, Any], sigma: float | None) -> str | None:
    """Why a step is bad, by its loss and gradient norm and those of the steps before; None of a good one."""
    for name, value in step.items():
        if not math.isfinite(value):
            return f"the {name} is {value}"
    for name, value in step.items():
        before = record[name]
        if sigma is None or len(before) < LEAST_STEPS:
            continue
        bound = statistics.fmean(before) + sigma * statistics.stdev(before)
        if value > bound:
            return f"the {name} is {value:.4f}, above {bound:.4f} ({sigma} sigma of {len(before)} steps)"
    return None


def begin_record(stored: Mapping[str, Any] | None) -> dict[str, Any]:
    """The record of taken steps that a run goes on with: the checkpoint's, or for None that of a new run."""
    return dict(stored or {"loss": [], "gradient norm": [], "skipped in a row": 0})


def check_end(args: argparse.Namespace) -> None:
    """Refuse to call a run finished that has skipped its last steps. Raises InputError."""
    done = getattr(args, "curr_iteration", None)  # None where nothing was left to train
    record = begin_record(args.btx_taken_steps)
    skipped = record["skipped in a row"]
    ends = done is None or done + 1 >= args.train_iters
    if ends and (skipped >= SKIPPED_AT_THE_END or (skipped and not record["loss"])):
        raise InputError(
            f"the last {skipped} steps of the run were all skipped as bad, so it is not finished: go back with "
            "--ckpt-step, lower --lr, look at the data, or see with more --train-iters whether it goes on"
        )


def check(args: argparse.Namespace) -> None:
    """Refuse what contradicts skipping, and have Megatron leave bad steps to it. Raises InputError."""
    sigma = args.btx_spike_sigma
    if sigma is not None and not 0 < sigma < math.inf:
        raise InputError(f"--btx-spike-sigma {sigma}: expected a number above 0; 6 is usual")
    if not args.btx_skip_bad_steps:
        if sigma is not None:
            raise InputError("--btx-spike-sigma: nothing is skipped without --btx-skip-bad-steps; give that too")
        return
    if args.fp16:
        raise InputError("--btx-skip-bad-steps: with --fp16 Megatron's loss scaler skips steps; leave it out")
    if args.check_for_spiky_loss:
        raise InputError("--check-for-spiky-loss: with --btx-skip-bad-steps use --btx-spike-sigma in its place")
    args.check_for_nan_in_loss_and_grad = False
    args.rerun_mode = "disabled"  # else a checkpoint that it has saved would take the bad step again
