"""AdamW in the form Megatron expects: torch's fused kernel, the step kept per parameter group.

Megatron's optimizers are written for apex's and Transformer Engine's FusedAdam, which keep one ``step`` per parameter
group. Without those packages Megatron falls back to ``torch.optim.AdamW``, which keeps one step tensor per parameter;
with the distributed optimizer such a run saves but cannot resume (``core/optimizer/distrib_optimizer.py``: an assertion
on empty state, one step tensor shared by all parameters, a dummy step restored). Instead of mending that fallback, this
optimizer has the form of the path that every large run uses: checkpoints written with it load under apex or Transformer
Engine, and the other way round.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from megatron_btx.common.errors import InputError
from megatron_btx.engine import patch
from megatron_btx.engine.patch import Call
from megatron_btx.model.groups import TrainedGroups, group_of

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def make_state(optimizer: MegatronOptimizer) -> None:
    """Make the state that Megatron's optimizer would get with its first update: zeros, by its own function.

    A checkpoint from before that update (bad steps are skipped, an fp16 scale still falls) could not be loaded without.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if one.optimizer and one.init_state_fn and not one.config.use_precision_aware_optimizer:
            one.init_state_fn(one.optimizer, one.config)


class GroupStepAdam(torch.optim.Optimizer):
    """Adam or AdamW over parameter groups that each carry their own integer ``step``."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
        **unsupported: Any,
    ) -> None:
        """Take the arguments that ``megatron.core.optimizer`` gives to FusedAdam.

        Raises:
            InputError: CUDA graphs of the optimizer, or its low-precision states: only the fused packages have them.
        """
        if capturable or unsupported:
            named = ", ".join(unsupported) or "--optimizer-cuda-graph"
            raise InputError(f"the optimizer settings {named} need Transformer Engine, which is not installed")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._functional = adamw if adam_w_mode else adam

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            if group["params"]:
                group["step"] = int(group.get("step", 0)) + 1
                self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        # The functional form counts each parameter's step up by one, in tensors that must not be shared.
        previous_step = torch.full((len(parameters),), float(group["step"] - 1), device=parameters[0].device)
        beta1, beta2 = group["betas"]
        self._functional(
            parameters,
            [p.grad for p in parameters],
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            [],
            list(previous_step.unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def install_schedule_logging() -> None:
    """Have Megatron log the schedule's learning rate also where every group that is trained has one of its own.

    It logs that of a group without one, and nothing where there is none, as with a multiplier on each.

    Raises:
        MegatronVersionError: the installed Megatron finds it elsewhere.
    """
    from megatron.training import training

    def get_optimizer_param_scheduler(build: Call, optimizer: object) -> OptimizerParamScheduler:
        scheduler = build(optimizer)

        def get_canonical_lr_for_logging(of_groups: Call, groups: list[dict[str, Any]]) -> float:
            found = of_groups(groups)
            if found is None:
                return float(scheduler.get_lr({}))
            return float(found)

        patch.around(training, "get_canonical_lr_for_logging", get_canonical_lr_for_logging)
        return scheduler

    patch.around(training, "get_optimizer_param_scheduler", get_optimizer_param_scheduler)


def install_lr_multipliers(groups: TrainedGroups) -> None:
    """Give groups their own peak and least learning rate, as Megatron does for its decoupled one.

    ``pretrain`` takes no overrides, so the function that makes them is wrapped. (Its scheduler ignores ``lr_mult``.)

    Raises:
        MegatronVersionError: the installed Megatron makes its overrides elsewhere.
    """
    if not groups.multipliers:
        return
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
    from megatron.training import training

    def get_megatron_optimizer_config(make: Call, args: argparse.Namespace) -> tuple[object, dict[ParamKey, Any]]:
        config, overrides = make(args)
        overrides = dict(overrides or {})
        for group, factor in groups.multipliers.items():

            def belongs(_parameter: object, name: str, group: str = group) -> bool:
                return group_of(name, groups.is_tied) == group

            key = ParamKey(with_name_predicate=ParamWithNamePredicate(name=f"btx_{group}", fn=belongs))
            overrides[key] = {"max_lr": factor * config.lr, "min_lr": factor * (config.min_lr or 0.0)}
        return config, overrides

    patch.around(training, "get_megatron_optimizer_config", get_megatron_optimizer_config)
