"""Megatron without a GPU: every stand-in, and the reason for each.

Megatron-core's layers are plain torch and run anywhere; its training program takes a CUDA device for granted.
On a machine without one, :func:`install_cpu_stand_ins` redirects "cuda" to the CPU and turns streams, events and
device statistics into no-ops, so that the *same* program trains over gloo: at real tensor, pipeline, expert and data
parallelism, slowly and exactly. On a machine with a GPU nothing here runs.

Every stand-in goes through :mod:`megatron_btx.engine.patch`, which first checks that what it replaces is there.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from megatron_btx.engine import patch

if TYPE_CHECKING:
    import torch

# torch functions that take a `device`: Megatron passes them "cuda" or torch.cuda.current_device() literally.
_FACTORIES = (
    "arange empty empty_like full full_like linspace ones ones_like rand randint randn randperm tensor as_tensor "
    "zeros zeros_like eye"
).split()
_METHODS = "new_empty new_full new_ones new_tensor new_zeros".split()

KERNELS_FOR_GPUS = ("transformer_engine", "apex", "amp_C")
"""Megatron calls these wherever they can be imported, whatever the layers are, for router logits and gradient norms: on
a machine that has them and no GPU, a container's login node say, that ends in CUDA's errors."""


@functools.cache
def has_gpu() -> bool:
    """Whether torch sees a CUDA device: answered once, before any stand-in could answer for it."""
    import torch

    return torch.cuda.is_available()


def prepare_environment() -> None:
    """Set what must be set before torch is imported; call first thing in a program.

    Megatron decorates small functions with torch.compile. On the CPU that would start a C++ compiler in every
    process for nothing.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron demands it for TP before Blackwell
    if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))):
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def install_cpu_stand_ins() -> bool:
    """Make Megatron's training program run on the CPU when there is no GPU; otherwise do nothing.

    Returns:
        True when stand-ins were installed.

    Raises:
        MegatronVersionError: something to be replaced is missing or has another signature.
    """
    if has_gpu():
        return False
    hide_kernels_for_gpus()
    _leave_uncompiled()
    _redirect_devices()
    _answer_for_cuda()
    _replace_in_megatron()
    return True


def hide_kernels_for_gpus() -> None:
    """Make importing :data:`KERNELS_FOR_GPUS` an ImportError; call before Megatron is imported."""
    for name in KERNELS_FOR_GPUS:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _leave_uncompiled() -> None:
    """Make ``torch.compile`` return what it is given, where compiling is off.

    PyTorch calls the function itself then, but imports its compiler when Megatron decorates one: two of the six
    seconds that a start takes.
    """
    import torch

    def leave(function: Any = None, **_options: Any) -> Any:
        if function is None:
            return leave
        return function

    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        patch.replace(torch, "compile", leave)


# --- torch: "cuda" means the CPU ------------------------------------------------------------------------------


def _is_cuda(device: Any) -> bool:
    """Whether a device argument means a GPU: "cuda", "cuda:0", torch.device("cuda"), or a bare index."""
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return getattr(device, "type", None) == "cuda"


def _redirect_devices() -> None:
    """Send tensor factories, ``.to`` and ``.cuda`` to the CPU.

    Patching the factories costs nothing elsewhere; a TorchFunctionMode would tax every operation and does not reach
    autograd's threads.
    """
    import torch

    def redirected(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") is not None and _is_cuda(kwargs["device"]):
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return on_cpu

    for name in _FACTORIES:
        patch.wrap(torch, name, redirected)
    for name in _METHODS:
        patch.wrap(torch.Tensor, name, redirected)

    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]) and not isinstance(args[0], torch.dtype):
            args = ("cpu", *args[1:])
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return original_to(self, *args, **kwargs)

    def cuda(self: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The optimizers and the gradient norm tell precisions apart by the *name* of the CUDA tensor type.
        answer = original_type(self, *args, **kwargs)
        if isinstance(answer, str):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    patch.replace(torch.Tensor, "to", to)
    patch.replace(torch.Tensor, "cuda", cuda)
    patch.replace(torch.Tensor, "type", type_)
    patch.replace(torch.nn.Module, "cuda", lambda self, device=None: self)


class _Nothing:
    """A stream, an event or a context that does nothing: on the CPU every operation is already in order."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_args: object) -> None: ...

    def __getattr__(self, _name: str) -> Callable[..., _Nothing]:
        return lambda *_args, **_kwargs: self  # record_event() must give something to wait for


def _get_rng_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
    """The CPU's random state, whichever device and form are asked for."""
    import torch

    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
    import torch

    torch.set_rng_state(new_state)


def _answer_for_cuda() -> None:
    """Answer torch.cuda's questions: device counts, streams, generators, statistics."""
    import torch

    nothing = _Nothing()
    # What Megatron reads of a device's properties.
    properties = SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=1)
    answers: dict[str, Any] = {
        # Some of torch's own ways to find out count devices, which the next line answers for Megatron's sake.
        "is_available": lambda: False,
        # Megatron skips model-parallel set-up where there are zero devices.
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "Stream": _Nothing,
        "Event": _Nothing,
        "current_stream": lambda device=None: nothing,
        "default_stream": lambda device=None: nothing,
        "set_stream": lambda stream: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": torch.default_generator.manual_seed,
        "memory_stats": lambda device=None: collections.defaultdict(int),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: "cpu",
        "get_device_capability": lambda device=None: (0, 0),
        "mem_get_info": lambda device=None: (0, 0),
    }
    for name, answer in answers.items():
        patch.replace(torch.cuda, name, answer)
    patch.replace(torch.cuda.random, "get_rng_state", _get_rng_state)
    patch.replace(torch.cuda.random, "set_rng_state", _set_rng_state)
    patch.replace(torch.cuda.nvtx, "range_push", lambda message: 0)
    patch.replace(torch.cuda.nvtx, "range_pop", lambda: 0)


def _replace_in_megatron() -> None:
    """Replace the Megatron functions that cannot be satisfied by redirecting devices."""
    import torch
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.training import initialize, training

    def put(owner: object, name: str, parameters: str, stand_in: Callable[..., Any]) -> None:
        patch.expect_parameters(owner, name, parameters.split())
        patch.replace(owner, name, stand_in)

    def surround(owner: object, name: str, parameters: str, call: Callable[..., Any]) -> None:
        patch.expect_parameters(owner, name, parameters.split())
        patch.around(owner, name, call)

    def as_on_a_gpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if torch.is_tensor(tensor) and as_numpy:
            return tensor.detach().cpu().numpy()
        return tensor

    def allow_no_cuda(start: patch.Call) -> patch.Call:
        return functools.partial(start, allow_no_cuda=True)

    def load(build: patch.Call, dataset: object, consumed_samples: int) -> Any:
        loader = build(dataset, consumed_samples)
        if loader is not None:
            loader.generator = torch.Generator()
        return loader

    # The originals call into torch._C for CUDA generators.
    put(random, "_set_cuda_rng_state", "new_state device graph_safe", _set_rng_state)
    put(random, "_get_cuda_rng_state", "device clone graph_safe", _get_rng_state)
    # "Megatron requires CUDA": it has a switch for that, which pretrain() does not pass on.
    patch.wrap(training, "initialize_megatron", allow_no_cuda, ["allow_no_cuda"])
    # Warms up torch.compile'd functions that are not compiled here.
    put(training, "set_jit_fusion_options", "tp_size", lambda tp_size=None: None)
    # torch's record of CUDA memory; asked for after the first step.
    put(training, "report_memory", "name process_group", lambda name, process_group=None: None)
    # Loaders draw a number from the CPU's generator when they are asked for batches, which on a GPU no model uses. Here
    # it would move dropout and routers' noise: on resume after their state was loaded, in a new run before.
    surround(training, "build_pretraining_data_loader", "dataset consumed_samples", load)
    # The process that writes --async-save's checkpoints is a new program to Megatron, for CUDA's sake; without these
    # stand-ins it asks for a GPU and ends. A fork has them.
    surround(
        initialize,
        "init_persistent_async_worker",
        "rank mp_mode",
        lambda start, rank, mp_mode="fork": start(rank, "fork"),
    )
    # The queue of the checkpoint writer lives in a process of its own. Megatron spawns it, because a CUDA context does
    # not survive a fork, which costs an import of torch per run; without CUDA a fork does.
    surround(filesystem_async, "get_write_results_queue", "mp_mode", lambda make, mp_mode="fork": make("fork"))
    # The dispatcher wants split sizes as numpy arrays; the original converts only tensors found on a GPU.
    for module in (moe_utils, token_dispatcher):
        put(module, "maybe_move_tensor_to_cpu", "tensor as_numpy record_stream", as_on_a_gpu)
