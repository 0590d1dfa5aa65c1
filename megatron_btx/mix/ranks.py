"""Several processes that share one conversion: under torchrun or srun, each writes its share of the result."""

from __future__ import annotations

import datetime
import os
import subprocess
from typing import Any

from megatron_btx.errors import InputError

_PATIENCE = datetime.timedelta(days=2)
"""How long a rank waits for the slowest; one that died is noticed at once, by its closed connection."""


class Ranks:
    """This process among those of one run; alone where nothing launched several."""

    def __init__(self) -> None:
        self.rank, self.world = _rank_and_world()
        if self.world > 1:
            import torch.distributed

            os.environ.setdefault("MASTER_ADDR", _first_host())
            os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
            torch.distributed.init_process_group("gloo", rank=self.rank, world_size=self.world, timeout=_PATIENCE)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank; also a barrier.

        Raises:
            InputError: another rank is gone.
        """
        if self.world == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.world
        try:
            torch.distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise InputError(
                f"another of the {self.world} processes ended early; start the same command again"
            ) from error
        return values

    def close(self) -> None:
        """Leave the group."""
        if self.world > 1:
            import torch.distributed

            torch.distributed.destroy_process_group()


def _rank_and_world() -> tuple[int, int]:
    """From torchrun's variables, else from those of a Slurm step (a batch script alone has one process)."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def _first_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if nodes is None:
        return "127.0.0.1"
    answer = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return answer.stdout.split()[0]
