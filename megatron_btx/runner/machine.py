"""The GPUs and cores of this machine, and what each stage takes of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence

from megatron_btx.common.errors import InputError
from megatron_btx.plan.stage import Stage


class Machine:
    """The GPUs, or where there are none the cores, that stages take while they run."""

    def __init__(self, gpus: Sequence[str], cores: int) -> None:
        self.gpus = tuple(gpus)
        self.free = list(gpus) or [str(core) for core in range(cores)]
        self.size = len(self.free)

    @staticmethod
    def found(use_gpus: bool = True) -> Machine:
        """This machine: what CUDA_VISIBLE_DEVICES or else nvidia-smi lists, and the cores this process may use."""
        gpus: list[str] = []
        if use_gpus:
            gpus = _find_gpus()
        return Machine(gpus, len(os.sched_getaffinity(0)))

    def needs(self, stage: Stage) -> int:
        """Slots that ``stage`` takes. Where there are GPUs, a stage that uses none takes none."""
        if not self.gpus:
            return min(stage.processes * stage.threads, self.size)
        if stage.on_gpu:
            return stage.processes
        return 0

    def check(self, stages: Sequence[Stage]) -> None:
        """Refuse stages that have more processes than this machine has GPUs."""
        for stage in stages:
            if self.needs(stage) > self.size:
                raise InputError(
                    f"stage {stage.name}: {stage.processes} processes need as many GPUs, found {self.size}; "
                    "change its layout in the recipe, or run on the CPU with --cpu"
                )

    def take(self, stage: Stage) -> list[str]:
        """The slots of ``stage``, which are no longer free."""
        count = self.needs(stage)
        taken = self.free[:count]
        del self.free[:count]
        return taken

    def give_back(self, taken: Sequence[str]) -> None:
        """The slots of a stage that has ended."""
        self.free[:0] = taken

    def environment(self, taken: Sequence[str]) -> dict[str, str]:
        """What tells a stage's processes their GPUs."""
        visible = ""
        if self.gpus:
            visible = ",".join(taken)
        return {"CUDA_VISIBLE_DEVICES": visible}


def _find_gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    count = len(re.findall(r"^GPU \d+", listed.stdout, re.MULTILINE))
    return [str(number) for number in range(count)]
