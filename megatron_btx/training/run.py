"""One run of the training program: checked, described to Megatron, trained; and what to say when it fails."""

from __future__ import annotations

import argparse
import functools
import os
import pickle
import shutil
import traceback
from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_btx.common.errors import BTXError, CheckpointError, MachineError, print_error, refused
from megatron_btx.common.log import say
from megatron_btx.data.splits import check_splits
from megatron_btx.data.training import check_data_files, datasets_for
from megatron_btx.distributed.abort import AGAIN, Stopping
from megatron_btx.distributed.process_cleanup import end_helpers
from megatron_btx.engine import repairs
from megatron_btx.engine.checks.arguments import budget_of
from megatron_btx.engine.checks.start import check_against_checkpoint, checkpoint_to_load, finished
from megatron_btx.engine.fallback import verify_where_checksums_are
from megatron_btx.engine.flags import add_training_arguments
from megatron_btx.engine.optimizer import install_lr_multipliers, install_schedule_logging
from megatron_btx.engine.program import parse
from megatron_btx.engine.restricted_loading import cause_of, loading_failed
from megatron_btx.engine.saving import guard_async_saves, keep_to_its_line
from megatron_btx.model.build import model_config
from megatron_btx.model.groups import check_optimizers, freeze, resolve_groups
from megatron_btx.model.sampling import Step
from megatron_btx.model.step import forward_step
from megatron_btx.training import bad_steps, telemetry, validation
from megatron_btx.training.bad_steps import (
    SkippedSteps,
    begin_record,
    check_end,
    explain_exit,
    judge_every_step,
    show_losses,
)
from megatron_btx.training.hooks import install_callbacks
from megatron_btx.training.metrics import write_metrics
from megatron_btx.training.validation import watch_validation


def train() -> int:
    """Train what the command line describes; the CPU's stand-ins are installed."""
    step, stopping = Step(), Stopping()
    configuration, see_loss = prepare(step, stopping)
    if done := finished(get_args()):
        check_end(get_args())
        say(done)
        return 0
    try:
        pretrain(
            configuration,
            datasets_for(stopping),
            ModelType.encoder_or_decoder,
            functools.partial(forward_step, step=step, stopping=stopping, see_loss=see_loss),
        )
    except SystemExit as end:
        found = explain_exit(end.code)
        if found is not None:
            print_error(str(found))
        if end.code:
            raise
    except (CheckpointException, CheckpointingException, pickle.UnpicklingError) as failure:
        raise _checkpointing_failed(get_args(), failure) from cause_of(failure)
    except RuntimeError as failure:
        explained = _explain(failure, stopping)
        if explained is None:
            raise
        raise explained from failure
    finally:
        stopping.end()
        end_helpers()
    check_end(get_args())
    return 0


def _explain(failure: RuntimeError, stopping: Stopping) -> MachineError | None:
    """What a person can do something with, of a failure that is of the machine; None of any other."""
    if "DataLoader worker" not in str(failure):
        return stopping.explain(failure)
    reason = MachineError(
        f"a process that reads the data is gone: {failure}. A dataset was removed or is being written, or memory ran "
        f"out. {AGAIN}"
    )
    stopping.stop_all(reason)
    return reason


def check() -> str:
    """Check everything that needs no process group; returns what would be trained."""
    args = checked_arguments()
    _configuration(args, model_config(args))
    layout = (
        f"TP {args.tensor_model_parallel_size} x PP {args.pipeline_model_parallel_size} x "
        f"EP {args.expert_model_parallel_size} x DP {args.data_parallel_size}"
    )
    steps, samples = budget_of(args)
    tokens = samples * args.seq_length // max(steps, 1)
    return f"{args.world_size} processes, {layout}, {steps} steps of {tokens} tokens"


def _checkpointing_failed(args: argparse.Namespace, failure: BaseException) -> BTXError:
    """A failed checkpoint in one line, with what helps: most often the disk is full, and the last one stands."""
    if any(frame.name == "load_checkpoint" for frame in traceback.extract_tb(failure.__traceback__)):
        loaded = checkpoint_to_load(args)
        return loading_failed(str(loaded[0] if loaded else args.load), failure)
    if isinstance(failure, pickle.UnpicklingError):
        raise failure  # of no checkpoint
    cause = cause_of(failure)
    said = f"{type(cause).__name__}: {cause}"
    free_mib = shutil.disk_usage(args.save if os.path.isdir(args.save) else ".").free >> 20
    # Megatron passes on of an exception in a writing process its class alone, as text.
    room = "Make room and start" if isinstance(cause, OSError) or "OSError" in said else "Start"
    # Another process died: a writer; or a reader of data, of which PyTorch tells wherever this one stands just then.
    is_machine = room == "Start" and "RuntimeError" in said
    return (MachineError if is_machine else CheckpointError)(
        f"{args.save}: a checkpoint could not be written ({free_mib} MiB free there): {said}. {room} the same command "
        "again; it goes on from the last complete checkpoint"
    )


def prepare(step: Step, stopping: Stopping) -> tuple[Any, Callable[[Any, Any], None]]:
    """Check the command line, install what it asks for, and describe the run to Megatron.

    Args:
        step: where training stands, for the routers that are built here and the forward step that tells them.
        stopping: watches from the moment at which the model is built.

    Returns:
        Megatron's configuration container for ``pretrain``, and what sees the loss of every micro-batch.

    Raises:
        InputError: see :func:`checked_arguments`.
    """
    args = checked_arguments()
    groups = resolve_groups(vars(args))
    stopping.standstill_seconds = args.distributed_timeout_minutes * 60
    repairs.install()
    guard_async_saves(args, stopping)
    keep_to_its_line(args)
    loaded = checkpoint_to_load(args)
    verify_where_checksums_are(args, resumes=loaded is not None and loaded[1])
    callbacks = watch_validation(args)
    judge_every_step(args)
    see_loss = show_losses(args, step)
    if args.btx_skip_bad_steps:
        args.btx_taken_steps = begin_record(args.btx_taken_steps)
        skipped = SkippedSteps(args)
        callbacks.append(skipped)
        see_loss = skipped.see
    # Losses per domain are taken before Megatron logs a step, and the step's line is written after it.
    install_callbacks([*callbacks, *write_metrics(args)])
    install_schedule_logging()
    install_lr_multipliers(groups)

    def watch(built: list[Any]) -> list[Any]:
        """As a hook of the model: by then the ranks have met, and none has read a checkpoint."""
        stopping.watch()
        return built

    model = model_config(args, step)
    model.pre_wrap_hooks.append(watch)
    if groups.frozen:
        model.pre_wrap_hooks.append(freeze(groups, args))
    if args.num_experts:
        model.pre_wrap_hooks.append(telemetry.install(args))
    return _configuration(args, model), see_loss


def _configuration(args: argparse.Namespace, model: Any) -> Any:
    """Megatron's configuration of everything. Raises InputError for a part that Megatron, or its optimizer, refuses."""
    check_optimizers(args, resolve_groups(vars(args)), model.transformer)
    try:
        return pretrain_cfg_container_from_args(args, model)
    except (AssertionError, ValueError) as refusal:
        raise refused(refusal) from refusal


def checked_arguments() -> argparse.Namespace:
    """The arguments, checked against the checkpoint that the run starts from and the files that it reads.

    Raises:
        InputError: see :mod:`megatron_btx.engine.checks` and :mod:`megatron_btx.data.training`.
    """
    args = parse(add_training_arguments, trains=True)
    check_against_checkpoint(args)
    check_data_files(args)
    check_splits(args)
    validation.check(args)
    bad_steps.check(args)
    return args
