"""Arrays and numbers of NumPy out of a stranger's pickle, without NumPy's own constructors.

``numpy.ndarray(shape, "O", some_bytes)`` takes the bytes for addresses of objects, and Python follows them. So a pickle
that may call it can crash the program, or worse, though nothing in it looks like code. What honest pickles ask for is
little: an empty array, a dtype of plain values, the array's bytes, or one number. These functions make just that; an
unpickler gives them out under NumPy's names.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Buffer, Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

if TYPE_CHECKING:
    import numpy

_PLAIN_KINDS = "biufcSUMm"
"""Truth values, numbers, texts and times; neither objects nor structures, which may hold some."""


@functools.cache
def numpy_stand_ins() -> Mapping[tuple[str, str], Callable[..., Any]]:
    """What is given out for NumPy's names, by module and name; NumPy is imported when it is first asked for."""
    array = _array_class()

    def empty_array(*_: object) -> numpy.ndarray[Any, Any]:
        import numpy

        return numpy.ndarray.__new__(array, (0,), numpy.int8)

    found: dict[tuple[str, str], Callable[..., Any]] = {("numpy", "ndarray"): array, ("numpy", "dtype"): _dtype}
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        found |= {(module, "_reconstruct"): empty_array, (module, "scalar"): _scalar}
    return found


def _array_class() -> type:
    import numpy

    class Array(numpy.ndarray):
        """An array that gets its content from a pickle."""

        def __new__(cls, *_: object) -> NoReturn:
            raise pickle.UnpicklingError("an array of raw addresses, which no checkpoint needs and could run code")

        def __setstate__(self, state: Any, /) -> None:
            *before, kind, in_columns, content = state
            super().__setstate__((*before, _plain(kind), in_columns, content))

        def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
            return self.view(numpy.ndarray).__reduce_ex__(protocol)

    return Array


def _dtype(code: object, *_: object) -> numpy.dtype[Any]:
    """As ``numpy.dtype`` of a code. A copy, because a pickle then sets its byte order."""
    import numpy

    if not isinstance(code, str):
        raise pickle.UnpicklingError("a NumPy dtype that is no code of plain values")
    return numpy.dtype(_plain(numpy.dtype(code)), copy=True)


def _scalar(kind: object, content: Buffer = b"", *_: object) -> numpy.generic:
    import numpy

    return numpy.frombuffer(content, _plain(kind), 1)[0]


def _plain(kind: object) -> numpy.dtype[Any]:
    """The dtype made anew from its name, because a pickle may have changed anything else in it."""
    import numpy

    if not isinstance(kind, numpy.dtype) or kind.kind not in _PLAIN_KINDS:
        raise pickle.UnpicklingError(f"an array of {kind}, where plain values are expected")
    return numpy.dtype(kind.str)
