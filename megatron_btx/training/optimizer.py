"""Learning rates of groups of parameters, and the one that Megatron logs."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from megatron_btx.engine import patch
from megatron_btx.model.groups import TrainedGroups, group_of


def install_schedule_logging() -> None:
    """Have Megatron log the schedule's learning rate also where every group that is trained has one of its own.

    It logs that of a group without one, and nothing where there is none, as with a multiplier on each.

    Raises:
        MegatronVersionError: the installed Megatron finds it elsewhere.
    """
    from megatron.training import training

    patch.expect(training, "get_optimizer_param_scheduler", "get_canonical_lr_for_logging")
    build, of_groups = training.get_optimizer_param_scheduler, training.get_canonical_lr_for_logging

    @functools.wraps(build)
    def remembered(optimizer: Any) -> Any:
        """Megatron's scheduler, whose learning rate is logged where no group's is."""
        scheduler = build(optimizer)

        @functools.wraps(of_groups)
        def learning_rate(groups: list[dict[str, Any]]) -> float:
            found = of_groups(groups)
            if found is None:
                return float(scheduler.get_lr({}))
            return found

        patch.replace(training, "get_canonical_lr_for_logging", learning_rate)
        return scheduler

    patch.replace(training, "get_optimizer_param_scheduler", remembered)


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

    patch.expect(training, "get_megatron_optimizer_config")
    original = training.get_megatron_optimizer_config

    @functools.wraps(original)
    def with_multipliers(args: argparse.Namespace) -> Any:
        """Megatron's configuration of the optimizer, with an override for every group of another rate."""
        config, overrides = original(args)
        overrides = dict(overrides or {})
        for group, factor in groups.multipliers.items():

            def belongs(_parameter: Any, name: str, group: str = group) -> bool:
                return group_of(name, groups.is_tied) == group

            key = ParamKey(with_name_predicate=ParamWithNamePredicate(name=f"btx_{group}", fn=belongs))
            overrides[key] = {"max_lr": factor * config.lr, "min_lr": factor * (config.min_lr or 0.0)}
        return config, overrides

    patch.replace(training, "get_megatron_optimizer_config", with_multipliers)
