"""What follows a training step: one list, in order.

Megatron's loop (``training/training.py``) calls ``train_step``, then ``training_log``, then, when it is due,
``evaluate_and_print_results``. Each of the three is wrapped once here, and the callbacks are called in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_btx.engine import patch
from megatron_btx.engine.patch import Call

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

_STEP = (
    *("forward_step_func", "data_iterator", "model", "optimizer", "opt_param_scheduler", "config"),
    *("forward_backward_func", "iteration"),
)
_LOG = ("loss_dict", "total_loss_dict", "learning_rate", "iteration")
_EVALUATION = ("prefix", "forward_step_func", "data_iterator", "model", "iteration")
"""Parameters that the three functions must take first."""


class Callback:
    """Something that follows training; what it does not override does nothing."""

    def before_step(self, iteration: int, model: list[Any], optimizer: MegatronOptimizer) -> None:
        """Before a step is taken. ``iteration`` counts the steps that are done."""

    def after_step(self, done: int, model: list[Any], optimizer: MegatronOptimizer, losses: dict[str, Any]) -> None:
        """After a step, before it is logged.

        Args:
            done: steps that are done, this one among them.
            losses: what the step's loss function reported; empty but on the last pipeline stage.
        """

    def after_log(self, iteration: int, losses: dict[str, Any]) -> None:
        """After Megatron has logged a step, or has found that its log intervals leave it out."""

    def after_evaluation(self, iteration: int, is_test: bool) -> None:
        """After Megatron's own evaluation on the validation set or the test set."""


def log_scalars(values: Mapping[str, float], iteration: int) -> None:
    """Send values where Megatron's scalars go, on the rank that has these places."""
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    if (writer := get_tensorboard_writer()) is not None:
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log(dict(values), iteration)


def install_callbacks(callbacks: Sequence[Callback]) -> None:
    """Have the callbacks called, in their order, by Megatron's training loop.

    Raises:
        MegatronVersionError: the installed Megatron's loop is of another form.
    """
    if not callbacks:
        return
    from megatron.training import training

    def train_step(
        step: Call, forward: object, data: object, model: list[Any], optimizer: MegatronOptimizer, *rest: object,
        iteration: int, **named: object,
    ) -> Any:  # fmt: skip
        for callback in callbacks:
            callback.before_step(iteration, model, optimizer)
        result = step(forward, data, model, optimizer, *rest, iteration=iteration, **named)
        for callback in callbacks:
            callback.after_step(iteration + 1, model, optimizer, result[0])
        return result

    def training_log(
        log: Call, losses: dict[str, Any], total: object, rate: object, iteration: int, *rest: object, **named: object
    ) -> Any:
        result = log(losses, total, rate, iteration, *rest, **named)
        for callback in callbacks:
            callback.after_log(iteration, losses)
        return result

    def evaluate(
        evaluation: Call, prefix: str, forward: object, data: object, model: object, iteration: int, *rest: object,
        **named: object,
    ) -> Any:  # fmt: skip
        result = evaluation(prefix, forward, data, model, iteration, *rest, **named)
        for callback in callbacks:
            callback.after_evaluation(iteration, prefix.endswith("on test set"))
        return result

    patch.around(training, "train_step", train_step, _STEP)
    patch.around(training, "training_log", training_log, _LOG)
    patch.around(training, "evaluate_and_print_results", evaluate, _EVALUATION)
