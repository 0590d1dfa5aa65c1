"""One rank that looks at the GPU as the training program does, and prints what it saw as one line of JSON."""

from __future__ import annotations

import json
import os

import torch

from megatron_btx.engine.cpu import has_gpu, install_cpu_stand_ins


def main() -> int:
    """Try the stand-ins, then sum over all ranks with NCCL."""
    factory, mover = torch.zeros, torch.Tensor.to
    installed = install_cpu_stand_ins()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl")
    total = torch.full((3,), rank + 1.0, device="cuda")
    torch.distributed.all_reduce(total)
    seen = {
        "has_gpu": has_gpu(),
        "stand_ins": installed,
        "torch_untouched": torch.zeros is factory and torch.Tensor.to is mover and torch.cuda.is_available(),
        "device": total.device.type,
        "world_size": world_size,
        "sum": total.tolist(),
    }
    torch.distributed.destroy_process_group()
    print("\n" + json.dumps(seen))
    return 0
