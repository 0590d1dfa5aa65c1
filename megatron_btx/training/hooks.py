"""What follows a training step: one list, in order.

Megatron's loop (``training/training.py``) calls ``train_step``, then ``training_log``, then, when it is due,
``evaluate_and_print_results``. Each of the three is wrapped once here, and the followers are called in their order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from megatron_btx.engine import patch

_STEP = (
    *("forward_step_func", "data_iterator", "model", "optimizer", "opt_param_scheduler", "config"),
    *("forward_backward_func", "iteration"),
)
_LOG = ("loss_dict", "total_loss_dict", "learning_rate", "iteration")
_EVALUATION = ("prefix", "forward_step_func", "data_iterator", "model", "iteration")
"""Parameters that the three functions must take first."""


class Follower:
    """Something that follows training; what it does not override does nothing."""

    def before_step(self, iteration: int, model: list[Any], optimizer: Any) -> None:
        """Before a step is taken. ``iteration`` counts the steps that are done."""

    def after_step(self, done: int, model: list[Any], optimizer: Any, losses: dict[str, Any]) -> None:
        """After a step, before it is logged.

        Args:
            done: steps that are done, this one among them.
            losses: what the step's loss function reported; empty but on the last pipeline stage.
        """

    def after_log(self, iteration: int, losses: dict[str, Any]) -> None:
        """After Megatron has logged a step, or has found that its log intervals leave it out."""

    def after_evaluation(self, iteration: int, is_test: bool) -> None:
        """After Megatron's own evaluation on the validation set or the test set."""


def follow_training(followers: Sequence[Follower]) -> None:
    """Have the followers called, in their order, by Megatron's training loop.

    Raises:
        MegatronVersionError: the installed Megatron's loop is of another form.
    """
    if not followers:
        return
    from megatron.training import training

    def step_with_followers(step: Any) -> Any:
        """Megatron's training step, with the followers before and after it."""

        @functools.wraps(step)
        def train_step(forward: Any, data: Any, model: Any, optimizer: Any, *rest: Any, **named: Any) -> Any:
            iteration = named["iteration"]
            for follower in followers:
                follower.before_step(iteration, model, optimizer)
            result = step(forward, data, model, optimizer, *rest, **named)
            for follower in followers:
                follower.after_step(iteration + 1, model, optimizer, result[0])
            return result

        return train_step

    def log_with_followers(log: Any) -> Any:
        """Megatron's log of a step, with the followers after it."""

        @functools.wraps(log)
        def training_log(
            losses: dict[str, Any], total_losses: Any, learning_rate: Any, iteration: int, *rest: Any, **named: Any
        ) -> Any:
            result = log(losses, total_losses, learning_rate, iteration, *rest, **named)
            for follower in followers:
                follower.after_log(iteration, losses)
            return result

        return training_log

    def evaluation_with_followers(evaluate: Any) -> Any:
        """Megatron's evaluation, with the followers after it."""

        @functools.wraps(evaluate)
        def evaluate_and_print_results(
            prefix: str, forward: Any, data: Any, model: Any, iteration: int, *rest: Any, **named: Any
        ) -> Any:
            result = evaluate(prefix, forward, data, model, iteration, *rest, **named)
            for follower in followers:
                follower.after_evaluation(iteration, prefix.endswith("on test set"))
            return result

        return evaluate_and_print_results

    patch.wrap(training, "train_step", step_with_followers, _STEP)
    patch.wrap(training, "training_log", log_with_followers, _LOG)
    patch.wrap(training, "evaluate_and_print_results", evaluation_with_followers, _EVALUATION)
