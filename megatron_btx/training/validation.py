"""Watching a run by domain: its loss on each domain's validation text, and whether a mixture starts sound.

Megatron's own validation knows one number, or several sets under conditions that pipelines break; this is its forward
pass over the same fixed text of every domain each time, with the function that ``megatron_btx.evaluate`` uses.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.common.cli_args import read_pairs
from megatron_btx.common.errors import InputError
from megatron_btx.common.log import say, say_from_last_rank
from megatron_btx.engine.checks.start import checkpoint_to_load
from megatron_btx.runner.run_dir import read_evaluation
from megatron_btx.training.hooks import Callback, log_scalars

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

TAG = "lm loss validation"
MARGIN_NATS = 0.1
"""By how much a mixture may start above the worst expert: averaged shared weights cost something before training."""


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before any process group exists.

    Raises:
        InputError: a text that is not there or fills no batch, or a bound that is neither a number nor an evaluation;
            either of them where no step is taken that could be watched.
    """
    from megatron_btx.data.texts import check_texts

    texts = valid_texts(args)
    if texts:
        check_texts(texts, "--btx-valid-data", args.btx_valid_tokens, "--btx-valid-tokens", args)
    if "mean" in texts:
        raise InputError(f"--btx-valid-data mean={texts['mean']}: the mean of all domains is logged as that; rename it")
    if texts and args.skip_train:
        raise InputError("--btx-valid-data: --skip-train takes no step to follow; use python -m megatron_btx.evaluate")
    if args.btx_first_loss_bound is not None and not starts_from_a_mix(args):
        why = "no checkpoint is loaded that could be broken"
        if not args.num_experts:
            why = "the model has no experts"
        elif args.skip_train:
            why = "--skip-train takes no step"
        raise InputError(f"--btx-first-loss-bound {args.btx_first_loss_bound}: {why}; leave it out")
    find_bounds(args)


def valid_texts(args: argparse.Namespace) -> dict[str, str]:
    """Domain -> prefix of a dataset, or a text file, whose loss is taken while training."""
    return read_pairs(args.btx_valid_data, "--btx-valid-data")


class FirstLoss(Callback):
    """Stops a mixture's finetuning at its first step when the mixture is broken."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._bounds = args, find_bounds(args)

    def before_step(self, iteration: int, model: list[Any], optimizer: MegatronOptimizer) -> None:
        """Refuse a mix that is worse than its worst expert on a domain, where the experts' losses are given."""
        if iteration != 0 or not isinstance(self._bounds, dict):
            return
        losses = _losses(model, optimizer, self._args)
        say(" the mix before its first step | " + _listed(losses))
        for domain, (loss, expert) in self._bounds.items():
            if not losses[domain] <= loss + MARGIN_NATS:
                raise InputError(
                    f"the mix starts with a loss of {losses[domain]:.4f} on {domain}, above that of its worst expert "
                    f"there ({expert}: {loss:.4f}) by more than {MARGIN_NATS}: it is broken; check it with "
                    "tools/convert_experts.py --verify, its flags and its tokenizer"
                )

    def after_step(self, done: int, model: list[Any], optimizer: MegatronOptimizer, losses: dict[str, Any]) -> None:
        """Refuse a first step whose loss no sound mix has."""
        import torch

        if done != 1:
            return
        bound = self._bounds
        if isinstance(bound, dict):
            # The training text may hold other domains than those that are watched, and one batch is noise.
            bound = _guessing(self._args)
        found = torch.tensor([-math.inf, 0.0], device="cuda")  # the loss, and whether it is no number
        if "lm loss" in losses:  # on the last pipeline stage alone
            loss = losses["lm loss"].detach().float().reshape(()).to(found.device)
            found = torch.stack([loss.nan_to_num(nan=math.inf), loss.isnan().float()])
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        first = math.nan if found[1].item() else found[0].item()
        say(f" first step | loss {first:.4f}, sound up to {bound:.4f}")
        if not first <= bound:
            raise InputError(
                f"the first step's loss is {first:.4f} nats per token, above {bound:.4f} (--btx-first-loss-bound): "
                "the mix is broken, or its data are of another vocabulary; nothing was saved. Check it with "
                "tools/convert_experts.py --verify"
            )


class DomainLosses(Callback):
    """Takes and logs the loss on every domain of --btx-valid-data, when it is due."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args

    def after_step(self, done: int, model: list[Any], optimizer: MegatronOptimizer, losses: dict[str, Any]) -> None:
        """Before Megatron logs the step, so that they stand in its line; the rank that logs says them too."""
        if not is_due(done, self._args):
            return
        found = _losses(model, optimizer, self._args)
        logged = {f"{TAG} {domain}": loss for domain, loss in found.items()}
        logged[f"{TAG} mean"] = sum(found.values()) / len(found)
        log_scalars(logged, done)
        say_from_last_rank(f" validation after step {done} | " + _listed(found))


def watch_validation(args: argparse.Namespace) -> list[Callback]:
    """What must follow the steps: the check of a mixture's first, and the losses per domain."""
    callbacks: list[Callback] = []
    if starts_from_a_mix(args):
        callbacks.append(FirstLoss(args))
    if args.btx_valid_data:
        callbacks.append(DomainLosses(args))
    return callbacks


def is_due(done: int, args: argparse.Namespace) -> bool:
    """Whether the losses per domain are taken after ``done`` steps: Megatron's own flags decide, as for its loss."""
    is_last = done == args.train_iters or (args.exit_interval and done % args.exit_interval == 0)
    return bool(done >= (args.start_eval_at_iter or 0) and (is_last or done % args.eval_interval == 0))


def starts_from_a_mix(args: argparse.Namespace) -> bool:
    """Whether this run may take the first step of a mixture that it did not train: it does if its iteration is 0.

    A fresh mix is a release, which ``--load`` takes without ``--finetune`` and starts at iteration 0.
    """
    return bool(args.num_experts and not args.skip_train and checkpoint_to_load(args))


def find_bounds(args: argparse.Namespace) -> float | dict[str, tuple[float, str]]:
    """The largest sound loss in nats: of the first step, or of every domain with the expert that sets it."""
    bound = read_bound(args)
    if bound is None:
        return _guessing(args)
    if isinstance(bound, Path):
        return _worst_experts(f"--btx-first-loss-bound {bound}", bound, list(valid_texts(args)), args.eod_mask_loss)
    return bound


def read_bound(args: argparse.Namespace) -> float | Path | None:
    """--btx-first-loss-bound: a number of nats, or the evaluation of the experts that it comes from."""
    text = args.btx_first_loss_bound
    if text is None:
        return None
    bound = math.nan
    try:
        bound = float(text)
    except ValueError:
        if text:
            return Path(text)
    if not 0 < bound < math.inf:
        raise InputError(
            f"--btx-first-loss-bound {text}: expected a loss above 0 in nats per token, or a file of "
            "megatron_btx.evaluate"
        )
    return bound


def _guessing(args: argparse.Namespace) -> float:
    """The loss of a model that holds every token equally likely."""
    return math.log(args.padded_vocab_size)


def _worst_experts(where: str, file: Path, names: list[str], eod_mask_loss: bool) -> dict[str, tuple[float, str]]:
    again = f"evaluate the experts with megatron_btx.evaluate on every domain of --btx-valid-data ({', '.join(names)})"
    if not names:
        raise InputError(f"{where}: bounds the loss on every domain; name them with --btx-valid-data DOMAIN=TEXT")
    try:
        result = read_evaluation(file)
    except InputError as error:
        raise InputError(f"{where}: is no result of megatron_btx.evaluate ({error}); {again}") from error
    if not result.models:
        raise InputError(f"{where}: holds no model; {again}")
    check_masked_alike(where, bool(result.eod_mask_loss), eod_mask_loss)
    worst: dict[str, tuple[float, str]] = {}
    for domain in names:
        losses = []
        for name, model in result.models.items():
            loss = model.losses.get(domain)
            if loss is None:
                raise InputError(f"{where}: has no {domain!r}; {again}")
            if not 0 < loss < math.inf:
                raise InputError(f"{where}: the loss of {name} on {domain} is {loss}, expected above 0; {again}")
            losses.append((loss, name))
        worst[domain] = max(losses)
    return worst


def check_masked_alike(where: str, masked: bool, eod_mask_loss: bool) -> None:
    """Refuse a bound that was measured on other tokens: with ``--eod-mask-loss`` where the run has none, or without."""
    words = {True: "with", False: "without"}
    if masked != eod_mask_loss:
        raise InputError(
            f"{where}: its losses are measured {words[masked]} --eod-mask-loss and this run's {words[eod_mask_loss]}, "
            "which are of other tokens; give the flag to both, or to neither"
        )


def _losses(model: list[Any], optimizer: MegatronOptimizer, args: argparse.Namespace) -> dict[str, float]:
    """The mean loss on every domain, in nats per token, equal on all ranks."""
    from megatron.core.utils import get_model_config
    from megatron.training import get_timers, training

    from megatron_btx.data.texts import start_of
    from megatron_btx.model.step import batches_of, forward

    timer = get_timers()("interval-time")
    timer.stop()
    # The timers of forward passes (--timing-log-level 2) are of training.
    config = get_model_config(model[0])
    timers, config.timers = config.timers, None
    # With overlapped parameter gathering the optimizer updates each rank's own shards, and the others' are fetched when
    # a forward pass in training asks for them. Here all must be there before.
    overlaps = training.should_disable_forward_pre_hook(args)
    hooked = overlaps and bool(model[0].remove_forward_pre_hook_handles)
    if hooked:
        training.disable_forward_pre_hook(model, optimizer=optimizer)
    elif overlaps:  # Megatron turns its hooks on only after the first step of a start has come back
        training.force_param_sync(model, optimizer=optimizer)
    for chunk in model:
        chunk.eval()
    losses: dict[str, float] = {}
    for domain, text in valid_texts(args).items():
        batches = batches_of(start_of(text, args.btx_valid_tokens), f"{domain}: {text}")
        losses[domain] = forward(model, batches).nats
    for chunk in model:
        chunk.train()
    if hooked:
        training.enable_forward_pre_hook(model)
    config.timers = timers
    timer.start()
    return losses


def _listed(losses: dict[str, float]) -> str:
    return ", ".join(f"{domain} {loss:.4f}" for domain, loss in losses.items())
