"""The command line of every program that is Megatron inside: parsed, checked, and refused in one line."""

from __future__ import annotations

import argparse
import difflib
import functools
import logging
import os
import pickle
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megatron_btx.checkpoint.iterations import is_checkpoint, resolve_iteration, root_of
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.checkpoint.unsupported import refuse_placeholders
from megatron_btx.common.errors import InputError, refused
from megatron_btx.common.log import say
from megatron_btx.distributed import launcher as launch
from megatron_btx.engine import patch, repairs
from megatron_btx.engine.checks import check_arguments
from megatron_btx.engine.cpu import has_gpu, install_cpu_stand_ins, prepare_environment
from megatron_btx.engine.fallback import check_save_folder, choose_checkpoint
from megatron_btx.engine.flags import add_btx_arguments, help_if_asked
from megatron_btx.engine.restricted_loading import cause_of, loading_failed, restrict_unpickling
from megatron_btx.tokenizers.vocabulary import TOKENIZER_FILES, locate_tokenizer

_MODEL_FLAGS = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
"""What Megatron's validation asks for of every model."""


def start_tool[Checked](
    documentation: str | None,
    add_arguments: Callable[[ArgumentParser], ArgumentParser],
    check_words: Callable[[argparse.Namespace], object],
    check_inputs: Callable[[argparse.Namespace], Checked],
) -> tuple[argparse.Namespace, Checked]:
    """Parse the command line, check what it names, and initialise Megatron. The model is built by the caller.

    All that can be refused is refused before the ranks meet, so that no rank waits for one that has ended.

    Args:
        check_words: refuses what is wrong with the tool's own flags, before Megatron looks at its own.
        check_inputs: refuses what is wrong with the files that the flags name; returns what the tool needs of them.

    Returns:
        Megatron's arguments and ours; the result of ``check_inputs``.

    Raises:
        InputError: of the checks, or what Megatron refuses.
    """
    prepare_environment()
    help_if_asked(documentation, add_arguments)
    install_cpu_stand_ins()
    # Megatron may be imported only now, because what it finds on import was changed.
    from megatron.training import initialize

    args = parse(add_arguments, check_words, trains=False)
    checked = check_inputs(args)
    repairs.install()
    initialize.initialize_megatron(allow_no_cuda=not has_gpu())
    return args, checked


def parse(
    extra: Callable[[ArgumentParser], ArgumentParser],
    check_own: Callable[[argparse.Namespace], object] | None = None,
    *,
    trains: bool,
) -> argparse.Namespace:
    """Megatron's arguments and ours, parsed and validated by Megatron, and checked.

    Args:
        extra, check_own: as :func:`start_tool` takes them.
        trains: of the training program. A tool's own lines are few: there Megatron logs warnings alone, and no list of
            all arguments; ``--logging-level`` or its variable says otherwise.

    Raises:
        InputError: Megatron's own validation refuses them; it does so by assertions, whose text is passed on. Or this
            process is one of several and cannot know its place; see :mod:`megatron_btx.distributed.launcher`.
    """
    from megatron.training import arguments

    launch.join(checking="--btx-check" in sys.argv[1:])
    # Before Megatron parses: --use-checkpoint-args makes it load a checkpoint's arguments while it does.
    restrict_unpickling()
    repairs.count_numbers_of_tokenizers()

    def add(parser: ArgumentParser) -> ArgumentParser:
        """Our flags, and our checks between Megatron's parsing and its validation."""
        # argparse itself prints Megatron's 900 lines of usage.
        parser.error = functools.partial(_refuse, parser)  # type: ignore[method-assign]
        parser = extra(add_btx_arguments(parser))
        if not trains:
            level = int(os.environ.get("MEGATRON_LOGGING_LEVEL", logging.WARNING))
            logging.getLogger().setLevel(level)
            parser.set_defaults(logging_level=level)  # Megatron sets it again when it is initialised
            patch.replace(arguments, "_print_args", lambda *_: None)
        parse_words = parser.parse_args

        def parse_and_look(*words: Any) -> argparse.Namespace:
            args = parse_words(*words)
            if check_own:
                check_own(args)
            check_model_flags(args)
            choose_checkpoint(args)
            # Before Megatron looks at them: it takes a path that is gone for the name of a model on the hub.
            return find_tokenizer(args)

        parser.parse_args = parse_and_look  # type: ignore[method-assign,assignment]
        return parser

    args = _parse_and_validate(add)
    check_arguments(args, trains)
    if trains:
        check_save_folder(args)
    for name in ("tokenizer_model", "vocab_file", "merge_file"):
        file = getattr(args, name)
        if file and os.path.exists(file):
            # Stored in the checkpoint, where a path that depends on the working directory would mean nothing.
            setattr(args, name, os.path.abspath(file))
    return args


def _refuse(parser: ArgumentParser, message: str) -> NoReturn:
    """Refuse what argparse does not take; the closest flag is named where the message names one that does not exist."""
    known = parser._option_string_actions
    for word in message.split():
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in known:
            for close in difflib.get_close_matches(flag, known, n=1):
                raise InputError(f"{message}; did you mean {close}? --help and --help-megatron list all flags")
    raise InputError(f"{message}; --help and --help-megatron list all flags")


def _parse_and_validate(add: Callable[[ArgumentParser], ArgumentParser]) -> argparse.Namespace:
    """Parse and validate as Megatron does.

    Raises:
        InputError: what Megatron, its tokenizer libraries or its loader raise, in one line.
    """
    from megatron.training.arguments import parse_and_validate_args
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        args: argparse.Namespace = parse_and_validate_args(add)
        return args
    except AssertionError as refusal:
        raise refused(refusal) from refusal
    except (CheckpointException, pickle.UnpicklingError) as failure:
        raise loading_failed("the checkpoint of --use-checkpoint-args", failure) from cause_of(failure)
    except (RuntimeError, ValueError, OSError) as failure:
        # Validation ends with building the tokenizer, whose libraries raise what they like for a bad file.
        if any("tokenizers" in frame.filename for frame in traceback.extract_tb(failure.__traceback__)):
            raise InputError(
                f"the tokenizer cannot be read: {failure}; check --tokenizer-model and its type"
            ) from failure
        if isinstance(failure, ValueError):
            raise refused(failure) from failure
        raise


def check_model_flags(args: argparse.Namespace) -> None:
    """Refuse a command line without the flags that every model needs, which Megatron asserts one by one.

    Raises:
        InputError: names those of the model that are missing and where they stand, or --micro-batch-size.
    """
    if args.yaml_cfg is not None:
        return
    names = [] if args.use_checkpoint_args else list(_MODEL_FLAGS)
    missing = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is None]
    if missing:
        raise InputError(
            f"missing: {', '.join(missing)}; give the model's flags: they stand in megatron_args.txt beside a mixture"
        )
    if args.micro_batch_size is None:
        raise InputError("--micro-batch-size is missing; give the number of sequences of one step on one process")


def find_tokenizer(args: argparse.Namespace) -> argparse.Namespace:
    """Arguments with the tokenizer that lies beside the checkpoint, where the path that is given or stored is gone.

    So the flags in megatron_args.txt hold after its folder was moved.

    Raises:
        CheckpointError: a file of the tokenizer is a pointer of Git LFS, or ``--use-checkpoint-args`` finds nothing.
    """
    names = ("tokenizer_type", *TOKENIZER_FILES)
    for root in (args.pretrained_checkpoint, args.load):
        if not root or not is_checkpoint(Path(root)):
            continue
        given = {name: getattr(args, name) for name in names}
        if args.use_checkpoint_args and args.use_tokenizer_model_from_checkpoint_args:
            stored = TorchDistReader(resolve_iteration(root)).arguments()
            given = {name: stored.get(name) for name in names}
        # What is no whole path is a name on the hub, or a slip of the person at the keyboard.
        if not all(os.path.isabs(given[name] or "/") for name in TOKENIZER_FILES):
            continue
        found = locate_tokenizer(given, root_of(Path(root)))
        if found != given:
            gone = next(name for name in names if given[name] != found[name])
            say(f"tokenizer: {given[gone]} is not there, {found[gone]} is used")
            vars(args).update(found)
            args.use_tokenizer_model_from_checkpoint_args = False
            break
    for name in TOKENIZER_FILES:
        if getattr(args, name):
            refuse_placeholders(Path(getattr(args, name)))
    return args
