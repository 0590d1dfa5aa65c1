"""The training program: seed, expert, dense baseline and mixture alike.

    torchrun --nproc-per-node 8 -m megatron_btx.pretrain [Megatron's flags] [--btx-... flags]

It is Megatron's own ``megatron.training.pretrain`` with our layers and data, after checking what Megatron does not.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import io
import logging
import os
import pickle
import shutil
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

from megatron_btx.common.errors import CheckpointError, MachineError, exits_with_one_line, print_error, refused
from megatron_btx.common.log import say
from megatron_btx.distributed.abort import AGAIN, Stopping
from megatron_btx.distributed.process_cleanup import end_helpers, leave_no_orphans
from megatron_btx.engine.checks.arguments import budget_of
from megatron_btx.engine.cpu import install_cpu_stand_ins, prepare_environment
from megatron_btx.engine.flags import help_if_asked
from megatron_btx.engine.program import parse_training
from megatron_btx.model.build import model_config
from megatron_btx.model.step import forward_step

if TYPE_CHECKING:
    from megatron_btx.engine.options import Options
    from megatron_btx.model.sampling import Step


def add_training_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flag of this program to Megatron's parser."""
    parser.add_argument_group("megatron_btx training", "used by python -m megatron_btx.pretrain").add_argument(
        "--btx-check",
        action="store_true",
        help="check the command line, the checkpoint and the data in one process, say what would be trained and train "
        "nothing; WORLD_SIZE says for how many processes (default: off)",
    )
    return parser


@exits_with_one_line
def main() -> int:
    """Train what the command line describes; see --help."""
    prepare_environment()
    help_if_asked(__doc__, add_training_arguments)
    if "--btx-check" in sys.argv[1:]:
        return check()
    leave_no_orphans()
    faulthandler.enable()  # a dataset that is cut while it is mapped ends a process by a signal, without a word
    install_cpu_stand_ins()
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.enums import ModelType
    from megatron.training import get_args, pretrain
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_btx.data.training import datasets_for
    from megatron_btx.engine.checks.start import finished
    from megatron_btx.engine.restricted_loading import cause_of
    from megatron_btx.model.sampling import Step
    from megatron_btx.training.bad_steps import check_end, explain_exit

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


def check() -> int:
    """Check everything that needs no process group, and say in one line what would be trained."""
    # The last value of a flag wins: a check writes nowhere.
    sys.argv += ["--tensorboard-dir=", "--wandb-project=", "--no-one-logger"]
    # Megatron has no switch for its list of all arguments and what it says of them and of missing libraries. Errors of
    # ours and tracebacks are printed after this block.
    logging.disable()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            install_cpu_stand_ins()
            args, options = checked_arguments()
            _configuration(args, options, model_config(args))
    finally:
        logging.disable(logging.NOTSET)
    layout = (
        f"TP {args.tensor_model_parallel_size} x PP {args.pipeline_model_parallel_size} x "
        f"EP {args.expert_model_parallel_size} x DP {args.data_parallel_size}"
    )
    steps, samples = budget_of(args)
    tokens = samples * args.seq_length // max(steps, 1)
    say(f"checked: {args.world_size} processes, {layout}, {steps} steps of {tokens} tokens")
    return 0


def _checkpointing_failed(args: argparse.Namespace, failure: BaseException) -> CheckpointError:
    """A failed checkpoint in one line, with what helps: most often the disk is full, and the last one stands."""
    from megatron_btx.engine.checks.start import checkpoint_to_load
    from megatron_btx.engine.restricted_loading import cause_of, loading_failed

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
    return CheckpointError(
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
    from megatron_btx.engine import repairs
    from megatron_btx.engine.checks.start import checkpoint_to_load
    from megatron_btx.engine.fallback import verify_where_checksums_are
    from megatron_btx.engine.optimizer import install_lr_multipliers, install_schedule_logging
    from megatron_btx.engine.saving import guard_async_saves, keep_to_its_line
    from megatron_btx.model.groups import freeze
    from megatron_btx.training import telemetry
    from megatron_btx.training.bad_steps import ShownLosses, SkippedSteps, begin_record, judge_every_step
    from megatron_btx.training.hooks import follow_training
    from megatron_btx.training.metrics import write_metrics
    from megatron_btx.training.validation import watch_validation

    args, options = checked_arguments()
    stopping.standstill_seconds = args.distributed_timeout_minutes * 60
    repairs.install()
    guard_async_saves(args, stopping)
    keep_to_its_line(args)
    loaded = checkpoint_to_load(args)
    verify_where_checksums_are(args, resumes=loaded is not None and loaded[1])
    followers = watch_validation(args, options)
    judge_every_step(args)
    see_loss = ShownLosses(args, step).see
    if args.btx_skip_bad_steps:
        args.btx_taken_steps = begin_record(args.btx_taken_steps)
        skipped = SkippedSteps(args)
        followers.append(skipped)
        see_loss = skipped.see
    # Losses per domain are taken before Megatron logs a step, and the step's line is written after it.
    follow_training([*followers, *write_metrics(args, options)])
    install_schedule_logging()
    install_lr_multipliers(options.groups)
    model = model_config(args, step)
    model.pre_wrap_hooks.append(functools.partial(_watch, stopping))
    if options.groups.frozen:
        model.pre_wrap_hooks.append(freeze(options.groups, args))
    if args.num_experts:
        model.pre_wrap_hooks.append(telemetry.install(args))
    return _configuration(args, options, model), see_loss


def _configuration(args: argparse.Namespace, options: Options, model: Any) -> Any:
    """Megatron's configuration of everything. Raises InputError for a part that Megatron, or its optimizer, refuses."""
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_btx.model.groups import check_optimizers

    check_optimizers(args, options.groups, model.transformer)
    try:
        return pretrain_cfg_container_from_args(args, model)
    except (AssertionError, ValueError) as refusal:
        raise refused(refusal) from refusal


def _watch(stopping: Stopping, model: list[Any]) -> list[Any]:
    """Begin to watch, as a hook of the model: by then the ranks have met, and none has read a checkpoint."""
    stopping.watch()
    return model


def checked_arguments() -> tuple[Any, Options]:
    """The arguments, checked against the checkpoint that the run starts from and the files that it reads; our options.

    Raises:
        InputError: see :mod:`megatron_btx.engine.checks` and :mod:`megatron_btx.data.training`.
    """
    from megatron_btx.data.splits import check_splits
    from megatron_btx.data.training import check_data_files
    from megatron_btx.engine.checks.start import check_against_checkpoint
    from megatron_btx.training import bad_steps, validation

    args, options = parse_training(add_training_arguments)
    check_against_checkpoint(args, options.groups)
    check_data_files(args)
    check_splits(args)
    validation.check(args, options)
    bad_steps.check(args)
    return args, options


if __name__ == "__main__":
    sys.exit(main())
