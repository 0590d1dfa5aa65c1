"""What torch and the libraries built against it say of themselves: one JSON object on stdout, for ``btx doctor``.

    python -m megatron_btx.engine.cuda_check

A process of its own, because what it asks can end a process: a library built for another torch, a driver that is too
old, or Transformer Engine where no GPU is visible.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import warnings
from typing import Any

OPTIONAL = ("transformer_engine.pytorch", "amp_C", "flash_attn")
"""Modules of kernels for GPUs: Transformer Engine, apex (whose package of the same name on PyPI is another) and
FlashAttention."""


def ask_torch() -> dict[str, Any]:
    """Version, CUDA, NCCL and the GPUs that torch sees."""
    import torch

    nccl = None
    if torch.distributed.is_available() and torch.distributed.is_nccl_available() and torch.version.cuda:
        nccl = ".".join(str(number) for number in torch.cuda.nccl.version())
    gpus = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        gpus.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return {"version": torch.__version__, "cuda": torch.version.cuda, "nccl": nccl, "gpus": gpus}


def try_import(name: str) -> str | None:
    """None if the module can be imported, else "absent", or why it cannot."""
    try:
        if importlib.util.find_spec(name) is None:
            return "absent"
    except ModuleNotFoundError:
        return "absent"
    except Exception as error:  # its parent is imported to look for it, and may fail as it likes
        return first_line(error)
    try:
        importlib.import_module(name)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return first_line(error)
    return None


def first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def main() -> int:
    """Print what was found, behind whatever an imported library prints."""
    warnings.simplefilter("ignore")
    answer: dict[str, Any] = {"torch": None, "torch_error": None, "modules": {}}
    try:
        answer["torch"] = ask_torch()
    except Exception as error:
        answer["torch_error"] = first_line(error)
    for name in OPTIONAL:
        if answer["torch"] is None:
            break
        answer["modules"][name] = try_import(name)
    print(f"\n{json.dumps(answer)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
