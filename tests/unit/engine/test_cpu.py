"""The CPU stand-ins: each refuses a Megatron of another form, all are inert beside a GPU, and they do their job.

Each check replaces functions of torch and Megatron, so it runs in a process of its own: :func:`main` is what the zygote
runs there, with the check's name in the environment.
"""

from __future__ import annotations

import importlib
import os
from importlib.metadata import version

import pytest

from tests.support.runner import Zygote

REPLACED = {
    "megatron.core.tensor_parallel.random": ["_set_cuda_rng_state", "_get_cuda_rng_state"],
    "megatron.training.initialize": ["init_persistent_async_worker"],
    "megatron.training.training": [
        "initialize_megatron",
        "set_jit_fusion_options",
        "report_memory",
        "build_pretraining_data_loader",
    ],
    "megatron.core.dist_checkpointing.strategies.filesystem_async": ["get_write_results_queue"],
    "megatron.core.transformer.moe.moe_utils": ["maybe_move_tensor_to_cpu"],
    "megatron.core.transformer.moe.token_dispatcher": ["maybe_move_tensor_to_cpu"],
}
TORCH = {"torch": ["zeros", "rand"], "torch.cuda": ["is_available", "Stream", "memory_stats"]}
PAIRS = [(module, name) for table in (REPLACED, TORCH) for module, names in table.items() for name in names]


def main() -> int:
    """Run the check that the environment names; its assertions end the process."""
    check, _, rest = os.environ["CHECK"].partition(" ")
    globals()[f"check_{check}"](*rest.split())
    print("checked")
    return 0


def run(zygote: Zygote, check: str, tmp_path) -> str:
    """Run a check in a process of its own; its output."""
    done = zygote.start(1, [], tmp_path / "log", entry="tests.unit.engine.test_cpu", environment={"CHECK": check})
    text = zygote.wait(done).text()
    assert text.endswith("checked\n"), text
    return text


def check_missing(module_name: str, name: str) -> None:
    from megatron_btx.common.errors import MegatronVersionError
    from megatron_btx.engine import cpu

    cpu.has_gpu = lambda: False
    delattr(importlib.import_module(module_name), name)
    try:
        cpu.install_cpu_stand_ins()
    except MegatronVersionError as error:
        print(error)
        return
    raise AssertionError("not noticed")


def check_signature(module_name: str, name: str) -> None:
    from megatron_btx.common.errors import MegatronVersionError
    from megatron_btx.engine import cpu

    cpu.has_gpu = lambda: False
    setattr(importlib.import_module(module_name), name, lambda something, entirely, different: None)
    try:
        cpu.install_cpu_stand_ins()
    except MegatronVersionError as error:
        print(error)
        return
    raise AssertionError("not noticed")


def everything() -> dict[str, int]:
    """The identity of all that could be replaced."""
    import torch

    owners = {"torch": torch, "Tensor": torch.Tensor, "Module": torch.nn.Module, "cuda": torch.cuda}
    owners |= {"random": torch.cuda.random, "nvtx": torch.cuda.nvtx}
    owners |= {name: importlib.import_module(name) for name in REPLACED}
    return {f"{owner}.{name}": id(value) for owner, o in owners.items() for name, value in vars(o).items()}


def check_inert() -> None:
    from megatron_btx.engine import cpu, patch

    cpu.has_gpu = lambda: True
    before = everything()
    assert cpu.install_cpu_stand_ins() is False
    assert everything() == before
    cpu.has_gpu = lambda: False
    assert cpu.install_cpu_stand_ins() is True
    changed = {name for name, identity in everything().items() if before.get(name) != identity}
    assert "torch.zeros" in changed and "cuda.Stream" in changed
    # The table above names all of Megatron's functions that are replaced.
    of_megatron = {name for name in changed if name.startswith("megatron")}
    assert of_megatron == {f"{module}.{name}" for module, names in REPLACED.items() for name in names}, of_megatron
    # So does the list that every program keeps.
    listed = {name for name in patch.list_replaced() if name.startswith("megatron")}
    assert {name.split(".")[-1] for name in listed} == {name.split(".")[-1] for name in of_megatron}, listed


def check_cuda_means_the_cpu() -> None:
    import torch

    from megatron_btx.engine import cpu

    cpu.has_gpu = lambda: False
    cpu.install_cpu_stand_ins()
    for device in ("cuda", "cuda:3", 0, torch.device("cuda"), torch.device("cuda", 1), None, "cpu"):
        made = [torch.zeros(2, device=device), torch.tensor([1], device=device), torch.ones(2).to(device=device)]
        made += [torch.ones(2).new_zeros(3, device=device), torch.zeros_like(torch.ones(2), device=device)]
        assert all(tensor.device.type == "cpu" for tensor in made), device
    x = torch.ones(2)
    assert x.cuda() is x and x.to("cuda").device.type == "cpu" and torch.nn.Linear(1, 1).cuda(0).weight.is_cpu
    assert x.to(torch.float16).dtype == torch.float16 and x.to(torch.ones(1, dtype=torch.int32)).dtype == torch.int32
    assert x.to("cuda", torch.float64).dtype == torch.float64
    assert x.type() == "torch.cuda.FloatTensor" and x.type(torch.int64).dtype == torch.int64


def check_nothing_is_compiled() -> None:
    import torch

    from megatron_btx.engine import cpu

    cpu.has_gpu = lambda: False
    compile_for_real = torch.compile
    os.environ["TORCH_COMPILE_DISABLE"] = "0"
    cpu._leave_uncompiled()
    assert torch.compile is compile_for_real  # who wants it compiled gets it
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    cpu.install_cpu_stand_ins()
    assert torch.compile(everything) is everything
    assert torch.compile(dynamic=True)(everything) is everything


def check_cuda_answers() -> None:
    import torch

    from megatron_btx.engine import cpu

    cpu.has_gpu = lambda: False
    cpu.install_cpu_stand_ins()
    assert torch.cuda.is_available() is False and torch.cuda.device_count() == 1 and torch.cuda.current_device() == 0
    with torch.cuda.stream(torch.cuda.Stream()):
        event = torch.cuda.current_stream().record_event()
        event.wait()
        torch.cuda.Event(enable_timing=True).record()
    assert torch.cuda.max_memory_allocated() == 0 and torch.cuda.memory_stats() == {}
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first), "dropout's random numbers are saved and restored"
    torch.cuda.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(("module", "name"), PAIRS)
def test_what_is_replaced_must_be_there(module, name, zygote, tmp_path):
    """Renamed in another version: an error that names the function and both versions."""
    text = run(zygote, f"missing {module} {name}", tmp_path)
    for part in (name, "megatron-core 0.19", f"megatron-core {version('megatron-core')}", "install the pinned version"):
        assert part in text


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in REPLACED.items() for name in names])
def test_what_is_replaced_must_have_the_known_form(module, name, zygote, tmp_path):
    """Another signature: the same error, with what was found and what was expected."""
    text = run(zygote, f"signature {module} {name}", tmp_path)
    for part in (f"{module}.{name}", "entirely", "expected", f"megatron-core {version('megatron-core')}"):
        assert part in text


@pytest.mark.parametrize("check", ["inert", "cuda_means_the_cpu", "cuda_answers", "nothing_is_compiled"])
def test_the_stand_ins(check, zygote, tmp_path):
    """Nothing is replaced with a GPU; without one, "cuda" means the CPU everywhere."""
    run(zygote, check, tmp_path)


def test_a_gpu_is_looked_for_once(monkeypatch):
    """The answer stays, since a stand-in may answer later."""
    import torch

    from megatron_btx.engine import cpu

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append(1) or True)
    cpu.has_gpu.cache_clear()
    try:
        assert cpu.has_gpu() and cpu.has_gpu() and asked == [1]
    finally:
        cpu.has_gpu.cache_clear()
