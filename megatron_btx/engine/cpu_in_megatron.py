"""The places in Megatron that insist on a GPU, and what stands there on the CPU."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from megatron_btx.engine import patch


def replace_in_megatron() -> None:
    """Replace the Megatron functions that cannot be satisfied by redirecting devices."""
    _replace_random_states()
    _replace_in_training()
    _replace_in_libraries()


def _replace_random_states() -> None:
    """The originals call into torch._C for CUDA generators."""
    import torch

    def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    def get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    random = "megatron.core.tensor_parallel.random"
    _replace(random, "_set_cuda_rng_state", ["new_state", "device", "graph_safe"], lambda _: set_rng_state)
    _replace(random, "_get_cuda_rng_state", ["device", "clone", "graph_safe"], lambda _: get_rng_state)


def _replace_in_training() -> None:
    """What the training program asks of a GPU."""
    # "Megatron requires CUDA": it has a switch for that, which pretrain() does not pass on.
    _replace(
        "megatron.training.training",
        "initialize_megatron",
        ["allow_no_cuda"],
        lambda original: functools.partial(original, allow_no_cuda=True),
        only_first=1,
    )
    # Warms up torch.compile'd functions that are not compiled here.
    _replace("megatron.training.training", "set_jit_fusion_options", ["tp_size"], lambda _: lambda tp_size=None: None)
    # The process that writes --async-save's checkpoints is a new program to Megatron, for CUDA's sake; without these
    # stand-ins it asks for a GPU and ends. A fork has them.
    _replace(
        "megatron.training.initialize",
        "init_persistent_async_worker",
        ["rank", "mp_mode"],
        lambda original: lambda rank, mp_mode="fork": original(rank, "fork"),
    )
    # torch's record of CUDA memory; asked for after the first step.
    _replace(
        "megatron.training.training",
        "report_memory",
        ["name", "process_group"],
        lambda _: lambda name, process_group=None: None,
    )

    # Loaders draw a number from the CPU's generator when they are asked for batches, which on a GPU no model uses. Here
    # it would move dropout and routers' noise: on resume after their state was loaded, in a new run before.
    _replace(
        "megatron.training.training",
        "build_pretraining_data_loader",
        ["dataset", "consumed_samples"],
        lambda original: lambda dataset, consumed_samples: _with_own_generator(original(dataset, consumed_samples)),
    )


def _replace_in_libraries() -> None:
    """What Megatron-core asks of a GPU."""
    import torch

    # The queue of the checkpoint writer lives in a process of its own. Megatron spawns it, because a CUDA context does
    # not survive a fork, which costs an import of torch per run; without CUDA a fork does.
    _replace(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "get_write_results_queue",
        ["mp_mode"],
        lambda original: lambda mp_mode="fork": original("fork"),
    )

    def as_on_a_gpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # The dispatcher wants split sizes as numpy arrays; the original converts only tensors found on a GPU.
        if torch.is_tensor(tensor) and as_numpy:
            return tensor.detach().cpu().numpy()
        return tensor

    name = "maybe_move_tensor_to_cpu"
    parameters = ["tensor", "as_numpy", "record_stream"]
    _replace("megatron.core.transformer.moe.moe_utils", name, parameters, lambda _: as_on_a_gpu)
    _replace("megatron.core.transformer.moe.token_dispatcher", name, parameters, lambda _: as_on_a_gpu)


def _with_own_generator(loader: Any) -> Any:
    import torch

    if loader is not None:
        loader.generator = torch.Generator()
    return loader


def _replace(
    module_name: str,
    name: str,
    parameters: list[str],
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
    only_first: int | None = None,
) -> None:
    """Replace a function of a module by ``make(original)``, after checking the names of the original's parameters."""
    module = importlib.import_module(module_name)
    patch.expect_parameters(module, name, parameters, only_first)
    patch.wrap(module, name, make)
