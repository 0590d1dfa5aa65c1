"""Helpers of the tests that mix: run the converter, and make experts that differ where a test wants them to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_btx.checkpoint.iterations import resolve_iteration
from megatron_btx.checkpoint.stored import bytes_of
from megatron_btx.checkpoint.torch_dist import TorchDistLayout, TorchDistReader
from megatron_btx.mixing.cli import main
from megatron_btx.mixing.planning import make_plan
from megatron_btx.mixing.reading import read_request
from megatron_btx.mixing.verify import check_against_sources
from megatron_btx.mixing.writers import lay_out_result


def mix(experts: dict[str, Path], output: Path, *more: str) -> Path:
    """Mix experts with the command line's own main."""
    words = [f"--expert={name}={path}" for name, path in experts.items()]
    assert main([*words, "--output", str(output), *more]) == 0
    return output


def planned(experts: Mapping[str, Path], target: Path, output_format: str = "megatron", **request: object):
    """The plan of a mix, and its output as it would lie at ``target``."""
    method = request.pop("method", "btx")
    plan = make_plan(read_request([(name, str(path)) for name, path in experts.items()], str(method), request))
    return plan, lay_out_result(plan, output_format, target)


def verify(experts: Mapping[str, Path], folder: Path, output_format: str = "megatron", **request: object) -> None:
    """Compare a written result with its sources, number by number; raises CheckpointError where it differs."""
    plan, output = planned(experts, folder, output_format, **request)
    check = check_against_sources(plan, output, folder)
    for task in output.tasks:
        check(task, lambda done_bytes: None)


def write_checkpoint(
    folder: Path, tensors: Mapping[str, tuple[torch.Tensor, int]], objects: Mapping[str, object]
) -> Path:
    """Write one iteration folder: for each key a tensor and how many of its leading axes are cut to one."""
    layout, slots = TorchDistLayout(), []
    for key, (tensor, leading) in tensors.items():
        for lead in itertools.product(*(range(n) for n in tensor.shape[:leading])):
            rest = tensor.shape[leading:]
            offsets, sizes = (*lead, *(0,) * len(rest)), (*(1,) * leading, *rest)
            slot = layout.add_block(key, tuple(tensor.shape), offsets, sizes, tensor.dtype)
            slots.append((slot, tensor[lead].contiguous()))
    for name, value in objects.items():
        layout.add_object(name, value)
    folder.mkdir(parents=True)
    for name, size in layout.files.items():
        with (folder / name).open("wb") as file:
            file.truncate(size)
    parts = [(f, at, content) for f, at, content in layout.objects]
    for slot, tensor in slots:
        parts.append(
            (slot.file, slot.position_bytes - len(slot.before), slot.before + bytes(bytes_of(tensor)) + slot.after)
        )
    for name, position, content in parts:
        with (folder / name).open("r+b") as file:
            file.seek(position)
            file.write(content)
    for name, content in layout.small_files().items():
        (folder / name).write_bytes(content)
    return folder


def rewrite(source: Path, target: Path, change: object = None, arguments: dict | None = None) -> Path:
    """Copy a checkpoint's model, with every tensor passed through ``change(key, tensor)`` and arguments replaced.

    ``change`` returns the new tensor, or None to leave the key out.
    """
    reader = TorchDistReader(resolve_iteration(source))
    tensors = {}
    for key, stored in reader.tensors.items():
        if key.startswith("optimizer."):
            continue
        tensor = reader.read(key, (0,) * len(stored.shape), stored.shape)
        tensor = tensor if change is None else change(key, tensor)
        if tensor is not None:
            tensors[key] = (tensor, 1 if key.startswith("decoder.layers.") else 0)
    common = reader.common_state()
    vars(common["args"]).update(arguments or {})
    for name in [n for n in vars(common["args"]) if type(getattr(common["args"], n)).__module__.startswith("megatron")]:
        delattr(common["args"], name)
    vars(common["args"]).pop("exit_signal", None)
    objects = {"common_state/shard_0_1": [{"args": common["args"], "iteration": 1, "checkpoint_version": 3.0}]}
    objects |= {name: reader.read_object(name) for name in reader._objects if "_extra_state" in name}
    write_checkpoint(target / "iter_0000001", tensors, objects)
    (target / "latest_checkpointed_iteration.txt").write_text("1")
    return target
