"""No code out of a checkpoint: what Megatron and PyTorch unpickle in a training program passes the allow-list too.

Our own reader has the list (:mod:`megatron_btx.checkpoint.safe_pickle`) and looks at a checkpoint before a run starts.
Then Megatron loads it for itself. PyTorch's distributed checkpoint unpickles its index and every entry that is not a
tensor (extra states, random states, the optimizer's groups, arguments) without any restriction. Here that unpickling
itself is restricted, so that nothing depends on which file was looked at before, or when.

- ``torch.load``: PyTorch's own switch for a whole process makes every call a restricted one, whatever the caller says.
  What it may make beside tensors and plain values is our list, Megatron's list and Megatron's enums.
- ``.metadata``: PyTorch's reader gets our unpickler in place of ``pickle.load``.
- Extra states of FP8 inside a tensor: Megatron's own unpickler gets stand-ins for NumPy's constructors.
"""

from __future__ import annotations

import enum
import importlib
import io
import os
import pickle
import re
import textwrap
from types import ModuleType
from typing import Any, BinaryIO

from megatron_btx.checkpoint.iterations import list_iterations, resolve_iteration
from megatron_btx.checkpoint.safe_numpy import numpy_stand_ins
from megatron_btx.checkpoint.safe_pickle import allowed_globals, load_pickle
from megatron_btx.common.errors import CheckpointError
from megatron_btx.common.version_guard import mismatch
from megatron_btx.engine import patch
from megatron_btx.engine.patch import Call

_ALWAYS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_NEVER = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_ENUM_MODULES = (
    "megatron.core.enums",
    "megatron.core.transformer.enums",
    "megatron.core.rerun_state_machine",
    "signal",
)


def restrict_unpickling() -> None:
    """Hold every ``torch.load`` and every checkpoint index of this process, and of those it starts, to the list.

    Raises:
        MegatronVersionError: this PyTorch does not obey, or reads an index in another way.
    """
    import numpy
    import torch
    from megatron.core import rerun_state_machine, safe_globals
    from torch.distributed.checkpoint import filesystem

    os.environ.pop(_NEVER, None)  # PyTorch takes one of the two switches
    os.environ[_ALWAYS] = "1"
    # The classes of NumPy's plain dtypes, which PyTorch wants listed one by one; objects are none of them.
    dtypes = dict.fromkeys(type(numpy.dtype(code)) for code in "?bBhHiIlLqQefdgFDGSUMm")
    # What the re-run machinery has found is saved with the step to take again.
    patch.expect(rerun_state_machine, "Call", "Caller")
    allowed = [*allowed_globals(), *dtypes, rerun_state_machine.Call, rerun_state_machine.Caller]
    # Megatron's arguments hold enums; its own list has those of its newest version alone.
    for module in _ENUM_MODULES:
        values = vars(importlib.import_module(module)).values()
        allowed += [value for value in values if isinstance(value, type) and issubclass(value, enum.Enum)]
    ours = {_name(one) for one in allowed}
    # Megatron's list has NumPy's own constructors, which take bytes for objects: see safe_numpy.py.
    others = [one for one in torch.serialization.get_safe_globals() if _name(one) not in ours]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*others, *allowed])
    _expect_refusal()
    reads = filesystem.FileSystemReader.read_metadata.__code__.co_names
    if not {"pickle", "load"} <= set(reads) or not hasattr(filesystem, "pickle"):
        raise mismatch("PyTorch does not read a checkpoint's index with pickle.load")
    patch.replace(filesystem, "pickle", _IndexPickle("pickle"))

    def find_class(find: Call, unpickler: pickle.Unpickler, module: str, name: str) -> Any:
        """For Megatron's own unpickler of the extra states of FP8: its list has NumPy's constructors as well."""
        found = find(unpickler, module, name)
        return numpy_stand_ins().get((module, name), found)

    patch.around(safe_globals.SafeUnpickler, "find_class", find_class, ("self", "module", "name"))


def _name(given: Any) -> str:
    """The name by which a pickle asks for an entry of PyTorch's list."""
    return given[1] if isinstance(given, tuple) else f"{given.__module__}.{given.__qualname__}"


def _expect_refusal() -> None:
    """See for ourselves that ``torch.load`` now refuses what is not on the list."""
    import torch

    record = io.BytesIO()
    torch.save(_expect_refusal, record)
    record.seek(0)
    try:
        torch.load(record, weights_only=False)
    except pickle.UnpicklingError:
        return
    raise mismatch(f"PyTorch loads pickles without restriction in spite of {_ALWAYS}, so a checkpoint could run code")


class _IndexPickle(ModuleType):
    """The pickle module as PyTorch's checkpoint reader sees it: loading has the allow-list."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)

    @staticmethod
    def load(file: BinaryIO) -> Any:
        """Unpickle an index."""
        return load_pickle(file, str(getattr(file, "name", "the checkpoint's index")))


def load_weights(model: list[Any], path: str) -> None:
    """Load a checkpoint's weights with Megatron's own loader, from its root or one iteration folder."""
    from megatron.training import get_args
    from megatron.training.checkpointing import load_checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    folder = resolve_iteration(path)
    args = get_args()
    args.load, args.finetune, args.no_load_optim, args.no_load_rng = str(folder.parent), True, True, True
    args.ckpt_step = int(folder.name.removeprefix("iter_")) if folder.name.startswith("iter_") else None
    try:
        load_checkpoint(model, None, None)
    except (CheckpointException, pickle.UnpicklingError) as failure:
        raise loading_failed(path, failure) from cause_of(failure)


def loading_failed(path: str, failure: BaseException) -> CheckpointError:
    """What kept Megatron from loading a checkpoint, in one line.

    Args:
        path: the checkpoint.
        failure: of ``megatron.training.checkpointing.load_checkpoint``: PyTorch's CheckpointException, Megatron's
            CheckpointingException, or an UnpicklingError.
    """
    cause = cause_of(failure)
    if isinstance(cause, CheckpointError):
        return cause
    if isinstance(cause, pickle.UnpicklingError):
        return CheckpointError(
            f"{path}: holds a pickle {_offence(str(cause))}; do not use it, or have its owner save it again with stock "
            "Megatron"
        )
    older = _older(path)
    said = textwrap.shorten(f"{type(cause).__name__}: {cause}", 300)  # it can name every tensor
    return CheckpointError(
        f"{path}: the checkpoint could not be read: {said}. It holds other state than this "
        f"command needs, or is damaged: give the flags it was written with, or an older one with --ckpt-step{older}"
    )


def cause_of(failure: BaseException) -> BaseException:
    """The first failure of those that PyTorch's CheckpointException holds; any other is its own cause."""
    for cause, _ in getattr(failure, "failures", {}).values():
        return cause
    return failure


def _older(path: str) -> str:
    """The step of the checkpoint before, where there is one: ``path`` may be none at all."""
    try:
        folder = resolve_iteration(path)
    except CheckpointError:
        return ""
    steps = [f" {step}" for step, other in list_iterations(folder.parent) if other.name < folder.name]
    return steps[-1] if steps else ""


def _offence(said: str) -> str:
    """What PyTorch's restricted unpickler met, out of the page of advice that it raises."""
    named = re.search(r"GLOBAL ([\w.]+)", said)
    if named:
        return f"that wants to load {named[1]}, which no checkpoint needs and which could run code"
    _, _, rest = said.partition("WeightsUnpickler error:")
    return f"that is not of plain values ({((rest or said).strip().splitlines() or [said])[0]})"
