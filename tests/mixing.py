"""Helpers of the tests that mix: run the converter, and make experts that differ where a test wants them to."""

from __future__ import annotations

from pathlib import Path

from megatron_btx.checkpoint.torch_dist import TorchDistReader, TorchDistWriter, blocks_of, resolve_iteration
from megatron_btx.mix.cli import main


def mix(experts: dict[str, Path], output: Path, *more: str) -> Path:
    """Mix experts with the command line's own main."""
    words = [f"--expert={name}={path}" for name, path in experts.items()]
    assert main([*words, "--output", str(output), *more]) == 0
    return output


def rewrite(source: Path, target: Path, change: object = None, arguments: dict | None = None) -> Path:
    """Copy a checkpoint's model, with every tensor passed through ``change(key, tensor)`` and arguments replaced.

    ``change`` returns the new tensor, or None to leave the key out.
    """
    reader = TorchDistReader(resolve_iteration(source))
    writer = TorchDistWriter(target / "iter_0000001")
    for key, stored in reader.tensors.items():
        if key.startswith("optimizer."):
            continue
        tensor = reader.read(key, (0,) * len(stored.shape), stored.shape)
        tensor = tensor if change is None else change(key, tensor)
        if tensor is None:
            continue
        leading = 1 if key.startswith("decoder.layers.") else 0
        for offsets, sizes in blocks_of(tuple(tensor.shape), tensor.element_size(), leading):
            block = tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
            writer.write_block(key, tuple(tensor.shape), offsets, block.clone())
    common = reader.common_state()
    vars(common["args"]).update(arguments or {})
    for name in [n for n in vars(common["args"]) if type(getattr(common["args"], n)).__module__.startswith("megatron")]:
        delattr(common["args"], name)
    del common["args"].exit_signal
    writer.write_object("common_state/shard_0_1", [{"args": common["args"], "iteration": 1, "checkpoint_version": 3.0}])
    for name in reader.objects():
        if "_extra_state" in name:
            writer.write_object(name, reader.read_object(name))
    writer.close()
    (target / "latest_checkpointed_iteration.txt").write_text("1")
    return target
