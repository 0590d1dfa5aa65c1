"""What torch and the libraries built against it say of themselves: one JSON object on stdout, for ``btx doctor``.

    python -m megatron_btx.engine.cuda_check

A process of its own, because what it asks can end a process: a library built for another torch, a driver that is too
old, or Transformer Engine where no GPU is visible.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from typing import Any

KERNELS = {"transformer_engine.pytorch": "transformer-engine", "amp_C": "apex", "flash_attn": "flash-attn"}
"""Modules of kernels for GPUs, and their packages; apex is known by this module, because PyPI has another apex."""


def ask_torch() -> dict[str, Any]:
    """Version, CUDA, NCCL and the GPUs that torch sees."""
    import torch

    nccl = None
    if torch.version.cuda and torch.distributed.is_available() and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    gpus = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        gpus.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return {"version": torch.__version__, "cuda": torch.version.cuda, "nccl": nccl, "gpus": gpus}


def try_import(name: str) -> str | None:
    """Empty if the module can be imported, else why not; None where it is absent."""
    try:
        importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # it may fail as it likes
        if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
            return None
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return ""


def main() -> int:
    """Print what was found, behind whatever an imported library prints."""
    warnings.simplefilter("ignore")
    facts = ask_torch()
    facts["modules"] = {name: try_import(name) for name in KERNELS}
    print(f"\n{json.dumps(facts)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
