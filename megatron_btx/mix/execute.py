"""Carrying out a plan: block by block, beside the target, published by one rename."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.arguments import TOKENIZER_FILES, model_flags
from megatron_btx.checkpoint.torch_dist import (
    RELEASE,
    TRACKER,
    TorchDistReader,
    TorchDistWriter,
    blocks_of,
    write_flushed,
)
from megatron_btx.errors import CheckpointError, InputError
from megatron_btx.manifest import versions
from megatron_btx.mix.plan import ROUTER_STD, Plan, PlannedTensor, as_namespace

if TYPE_CHECKING:
    import torch

Progress = Callable[[int], None]
Offsets = tuple[int, ...]


def execute(
    plan: Plan,
    output: Path,
    overwrite: bool = False,
    verified: bool = False,
    progress: Progress = lambda done_bytes: None,
) -> None:
    """Write the result of a plan as a checkpoint root at ``output``.

    Written to a hidden folder beside the target, flushed, and renamed into place: a killed run leaves nothing that
    loads, and an old output is replaced only after the new one is complete and, if asked for, verified.

    Args:
        verified: read everything back and compare it with its sources before the result gets its name.

    Raises:
        CheckpointError: what was read back is not what was to be written.
        InputError: the output exists and ``overwrite`` is not given, or it is one of the sources; or the disk is full
            or not writable. The hidden folder is removed.
    """
    refuse_output(plan, output, overwrite)
    work = output.parent / f".{output.name}.incomplete"
    shutil.rmtree(work, ignore_errors=True)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        hashes = _write_iteration(plan, work / RELEASE, progress)
        _write_side_files(plan, work, hashes)
        write_flushed(work / TRACKER, RELEASE.encode())
        if verified:
            verify(plan, work, progress)
        _publish(work, output)
    except OSError as error:
        raise InputError(
            f"--output {output}: cannot be written ({error.strerror or error}); "
            f"{plan.output_bytes / 2**20:.1f} MiB are needed there, choose another folder or make room"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def refuse_output(plan: Plan, output: Path, overwrite: bool) -> None:
    """Refuse an output that exists (unless a checkpoint to be overwritten) or that is, or holds, a source.

    Raises:
        InputError: says which.
    """
    target = output.resolve()
    for expert in plan.experts:
        source = expert.folder.resolve()
        if target == source or target in source.parents:
            raise InputError(f"--output {output}: holds the expert {expert.name} ({source}); choose another folder")
    if output.exists() and not overwrite:
        raise InputError(f"--output {output}: exists already; choose another folder, or replace it with --overwrite")
    if output.exists() and not (output / TRACKER).is_file():
        raise InputError(f"--output {output}: is not a checkpoint (no {TRACKER}), so --overwrite will not remove it")


def _write_iteration(plan: Plan, folder: Path, progress: Progress) -> dict[str, str]:
    """Write all tensors and objects; returns the SHA-256 of each tensor's blocks in the order written."""
    writer = TorchDistWriter(folder)
    hashes = {}
    for tensor in plan.tensors:
        digest = hashlib.sha256()
        for offsets, block in computed_blocks(plan, tensor):
            writer.write_block(tensor.key, tensor.shape, offsets, block)
            digest.update(_bytes_of(block))
            progress(block.numel() * block.element_size())
        hashes[tensor.key] = digest.hexdigest()
    for name, value in _objects(plan):
        writer.write_object(name, value)
    writer.close()
    return hashes


def _bytes_of(block: torch.Tensor) -> memoryview:
    import torch

    return memoryview(block.contiguous().view(torch.uint8).numpy()).cast("B") if block.dim() else memoryview(b"")


def computed_blocks(plan: Plan, tensor: PlannedTensor) -> Iterator[tuple[Offsets, torch.Tensor]]:
    """The blocks of one tensor of the result, each with its offsets, computed from the experts by its rule."""
    import torch

    if tensor.rule.operation == "normal":
        yield from _router_blocks(plan, tensor)
        return
    for offsets, sizes in blocks_of(tensor.shape, tensor.dtype.itemsize, tensor.leading_axes):
        if tensor.rule.operation == "stack":
            layer, expert, *rest = offsets
            source = plan.experts[expert].reader
            block = source.read(tensor.source_key, (layer, *rest), (sizes[0], *sizes[2:]))
            yield offsets, block.unsqueeze(1)
        elif tensor.rule.operation == "zeros":
            yield offsets, torch.zeros(sizes, dtype=tensor.dtype)
        else:
            yield offsets, _average(plan, tensor, offsets, sizes)


def _average(plan: Plan, tensor: PlannedTensor, offsets: Offsets, sizes: Offsets) -> torch.Tensor:
    """The mean over the experts, rounded once to the stored dtype.

    Summed in fp64: in fp32 three equal experts would not average to themselves, and the experts' order would show.
    """
    import torch

    total = torch.zeros(sizes, dtype=torch.float64)
    for expert in plan.experts:
        total += expert.reader.read(tensor.source_key, offsets, sizes)
    return (total / len(plan.experts)).to(tensor.dtype)


def _router_blocks(plan: Plan, tensor: PlannedTensor) -> Iterator[tuple[Offsets, torch.Tensor]]:
    """New routers [L, E, H]: one generator draws all layers in order, in fp32, from the stated seed."""
    import torch

    layers, experts, hidden = tensor.shape
    generator = torch.Generator().manual_seed(plan.router_seed)
    for layer in range(layers):
        weight_EH = torch.empty(experts, hidden, dtype=torch.float32).normal_(0.0, ROUTER_STD, generator=generator)
        yield (layer, 0, 0), weight_EH.to(tensor.dtype).unsqueeze(0)


def _objects(plan: Plan) -> Iterator[tuple[str, Any]]:
    """The entries that are not tensors: the arguments, and the empty extra states that a loading model asks for.

    Megatron refuses to load where an extra state has no entry. Local and Transformer Engine layers ask for different
    ones; all are written, and entries that nobody asks for are ignored.
    """
    yield (
        "common_state/shard_0_1",
        [
            {
                "args": as_namespace(plan.arguments),
                "checkpoint_version": 3.0,
                "iteration": 0,
                "num_floating_point_operations_so_far": 0,
                "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
            }
        ],
    )
    layers = next(t.shape[0] for t in plan.tensors if t.key.startswith("decoder.layers."))
    per_layer = ["self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"]
    per_layer += ["pre_mlp_layernorm", "input_layernorm"]
    if plan.arguments.get("qk_layernorm"):
        per_layer += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    if plan.method != "btx":
        per_layer += ["mlp.linear_fc1", "mlp.linear_fc2"]
    for layer in range(layers):
        for name in per_layer:
            yield f"decoder.layers.{name}._extra_state/shard_{layer}_{layers}", [None]
    if plan.method == "btx":
        experts = len(plan.experts)
        for name in ("linear_fc1", "linear_fc2"):
            prefix = f"decoder.layers.mlp.experts.experts.{name}._extra_state"
            for layer in range(layers):
                for expert in range(experts):
                    yield f"{prefix}/shard_{layer}.{expert}_{layers}.{experts}", [None]
    yield "decoder.final_layernorm._extra_state/shard_0_1", [None]


def _write_side_files(plan: Plan, root: Path, hashes: dict[str, str]) -> None:
    write_flushed(root / "megatron_args.txt", megatron_args_text(plan).encode())
    write_flushed(root / "manifest.json", json.dumps(_manifest(plan, hashes), indent=1).encode())


def megatron_args_text(plan: Plan) -> str:
    """The flags with which stock Megatron continues from the result, one flag a line, ready for ``$(cat ...)``."""
    arguments = plan.arguments
    lines = model_flags(arguments)
    lines.append(["--seq-length", str(arguments.get("seq_length") or arguments.get("max_position_embeddings"))])
    for name in ("attention_dropout", "hidden_dropout", "init_method_std"):
        if arguments.get(name) is not None:
            lines.append([f"--{name.replace('_', '-')}", str(arguments[name])])
    for name in ("tokenizer_type", *TOKENIZER_FILES, "vocab_size"):
        if arguments.get(name) is not None:
            lines.append([f"--{name.replace('_', '-')}", str(arguments[name])])
    lines += [[f"--{name}"] for name in ("bf16", "fp16") if arguments.get(name)]
    if plan.method == "btx":
        lines.append(["--moe-token-dispatcher-type", "alltoall"])
        lines.append(["--moe-router-load-balancing-type", "aux_loss"])
        lines.append(["--moe-aux-loss-coeff", "0.01"])
    lines.append(["--ckpt-format", "torch_dist"])
    return "\n".join(shlex.join(words) for words in lines) + "\n"


def _manifest(plan: Plan, hashes: dict[str, str]) -> dict[str, Any]:
    return {
        "method": plan.method,
        "router_seed": plan.router_seed,
        "router_std": ROUTER_STD,
        "experts": [
            {"name": e.name, "path": str(e.folder.resolve()), "index_sha256": _file_hash(e.folder / ".metadata")}
            for e in plan.experts
        ],
        "versions": versions(),
        "tensors": {
            t.key: {
                "operation": t.rule.operation,
                "source": t.source_key or None,
                "shape": list(t.shape),
                "dtype": str(t.dtype).removeprefix("torch."),
                "sha256": hashes[t.key],
            }
            for t in plan.tensors
        },
    }


def _file_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _publish(work: Path, output: Path) -> None:
    """Put the finished folder in place; an old one is moved aside first and removed last."""
    old = output.parent / f".{output.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.rename(output, old)
    try:
        os.rename(work, output)
    except OSError:
        if old.exists():
            os.rename(old, output)
        raise
    directory = os.open(output.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    shutil.rmtree(old, ignore_errors=True)


def verify(plan: Plan, output: Path, progress: Progress = lambda read_bytes: None) -> None:
    """Read a written result back and compare every element with what its rule gives.

    Raises:
        CheckpointError: names the first tensor that differs.
    """
    import torch

    reader = TorchDistReader(output / RELEASE)
    planned = {tensor.key for tensor in plan.tensors}
    if planned != set(reader.tensors):
        odd = sorted(planned ^ set(reader.tensors))[0]
        raise CheckpointError(f"{output}: {odd}: planned and stored tensors differ; convert again")
    for tensor in plan.tensors:
        for offsets, block in computed_blocks(plan, tensor):
            found = reader.read(tensor.key, offsets, tuple(block.shape))
            if not torch.equal(found.view(torch.uint8), block.contiguous().view(torch.uint8)):
                raise CheckpointError(
                    f"{output}: {tensor.key} at {list(offsets)} differs from its sources; convert again"
                )
            progress(math.prod(block.shape) * block.element_size())
