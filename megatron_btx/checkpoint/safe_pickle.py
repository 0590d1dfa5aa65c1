"""Reading pickles from strangers: an allow-list, so that a checkpoint cannot run code.

PyTorch's distributed checkpoints keep their index in a pickle (``.metadata``) and Megatron keeps its arguments in
another. Both are read here by an unpickler that knows the few classes they need. Megatron's enums come back as
:class:`ForeignValue`: inert, and good enough to be compared or dropped, without importing Megatron.

The training programs let Megatron unpickle for itself, which needs the real classes. They hold it to this same list:
see :mod:`megatron_btx.engine.restricted_loading`.
"""

from __future__ import annotations

import functools
import importlib
import pickle
from typing import Any, BinaryIO

from megatron_btx.checkpoint.safe_numpy import numpy_stand_ins
from megatron_btx.common.errors import CheckpointError

_PLAIN_BUILTINS = {
    *("set", "frozenset", "slice", "complex", "bytearray", "range"),
    *("bool", "bytes", "dict", "float", "int", "list", "str", "tuple"),
}
_ALLOWED = {
    "argparse": {"Namespace"},
    "builtins": _PLAIN_BUILTINS,
    "__builtin__": _PLAIN_BUILTINS,  # as torch.save spells it, whose pickles are of protocol 2
    "collections": {"OrderedDict", "defaultdict", "deque"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "Path"},
    "_codecs": {"encode"},
    "_io": {"BytesIO"},  # extra states of Transformer Engine's first generation
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_parameter"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
}
UNREADABLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What damaged pickles have been seen to raise: the unpickler obeys whatever the bytes happen to say."""

_PROPERTIES = ("torch.distributed.checkpoint.metadata", "TensorProperties")
OLD_VALUES = 5
"""How many values a TensorProperties pickles in the form that every version of PyTorch reads."""

_INERT_PACKAGES = ("megatron.", "transformer_engine.")
_INERT_MODULES = {"signal", "enum"}
_GENERATOR = ("torch._C", "Generator")
"""A random generator of a GPU, which a machine without one could not make."""


class ForeignValue:
    """Stands for an object of a class that is not imported: an enum of Megatron's, say."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ForeignValue) and type(self) is type(other) and self.arguments == other.arguments

    def __hash__(self) -> int:
        return hash(str(self.arguments))

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.arguments}"


@functools.cache
def _foreign_class(module: str, name: str) -> type[ForeignValue]:
    """One class per name, so that equal values of two files are equal."""
    return type(name, (ForeignValue,), {"__module__": module})


@functools.cache
def _tensor_properties() -> type:
    """PyTorch's TensorProperties, read alike from every version: 2.15 added strides to what an index says of a tensor.

    Older versions do not know this sixth value. Megatron 0.19 hands all values to ``torch.empty``, which knows no
    strides (``load_tensors_metadata``). A checkpoint's tensors are contiguous, so nothing is lost.
    """
    from torch.distributed.checkpoint.metadata import TensorProperties

    class Properties(TensorProperties):
        def __setstate__(self, state: tuple[Any, ...]) -> None:
            super().__setstate__(state[:OLD_VALUES])
            self.__dict__.pop("strides", None)
            self.__class__ = TensorProperties  # type: ignore[assignment]  # which can be pickled again

    return Properties


class AllowListUnpickler(pickle.Unpickler):
    """Unpickles the allowed classes, turns Megatron's own into ForeignValue, refuses everything else."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        super().__init__(file)
        self._where = where

    def load(self) -> Any:
        """What the pickle holds.

        Raises:
            CheckpointError: truncated, not a pickle, or asking for more than the list allows.
        """
        try:
            return super().load()
        except UNREADABLE as error:
            raise CheckpointError(
                f"{self._where}: cannot be read ({first_line(error)}); it is truncated or not a checkpoint's"
            ) from error

    def find_class(self, module: str, name: str) -> Any:
        """Resolve one global of the pickle.

        Raises:
            CheckpointError: the global is not on the list, so the file might run code.
        """
        if (module, name) == _PROPERTIES:
            return _tensor_properties()
        if module.partition(".")[0] == "numpy" and (module, name) in numpy_stand_ins():
            return numpy_stand_ins()[module, name]
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and "." not in name and _is_plain_torch_value(name):
            return super().find_class(module, name)
        is_inert = module in _INERT_MODULES or module.startswith(_INERT_PACKAGES)
        if (is_inert and "." not in name) or (module, name) == _GENERATOR:
            return _foreign_class(module, name)
        raise CheckpointError(
            f"{self._where} wants to load {module}.{name}, which no checkpoint needs and which could run code; "
            "do not use it, or have its owner save it again with stock Megatron"
        )


def _is_plain_torch_value(name: str) -> bool:
    """Whether torch.NAME is a dtype, a layout or a storage class, which cannot do anything."""
    import torch

    return name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype | torch.layout)


def load_pickle(file: BinaryIO, where: str) -> Any:
    """Unpickle a plain pickle with the allow-list, as :meth:`AllowListUnpickler.load`."""
    return AllowListUnpickler(file, where).load()


def allowed_globals() -> list[tuple[Any, str]]:
    """The list as PyTorch's own restricted unpickler takes it: every object with the full name that pickles give it.

    What this Python spells otherwise is left out: nothing it reads can be asked for by that name.
    """
    found = [(maker, f"{module}.{name}") for (module, name), maker in numpy_stand_ins().items()]
    for module, names in _ALLOWED.items():
        try:
            owner = importlib.import_module(module)
        except ImportError:
            continue
        found += [(getattr(owner, name), f"{module}.{name}") for name in sorted(names) if hasattr(owner, name)]
    return found


def first_line(error: BaseException) -> str:
    """What an error says, or what it is, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
