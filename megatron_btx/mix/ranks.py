"""Several processes that share one conversion: under torchrun or srun, each writes its share of the result."""

from __future__ import annotations

import datetime
import os
import subprocess
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_btx.errors import BTXError, InputError, KeptError

T = TypeVar("T")

_PATIENCE = datetime.timedelta(days=2)
"""How long a rank waits for the slowest; one that died is noticed at once, by its closed connection."""
_MEETING = datetime.timedelta(minutes=10)
"""How long it waits for all to have started."""


class RankLostError(KeptError):
    """Another process of the run is gone: what all have written stays, for the same command to go on from."""


class Ranks:
    """This process among those of one run; alone where nothing launched several."""

    def __init__(self) -> None:
        self.rank, self.world = _rank_and_world()
        if self.world > 1:
            import torch.distributed

            if "MASTER_ADDR" not in os.environ:
                os.environ["MASTER_ADDR"] = _first_host()
            os.environ.setdefault("MASTER_PORT", str(_port_of_step()))
            try:
                torch.distributed.init_process_group("gloo", rank=self.rank, world_size=self.world, timeout=_MEETING)
                self._group = torch.distributed.new_group(timeout=_PATIENCE)
            except RuntimeError as error:
                meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                raise RankLostError(
                    f"the {self.world} processes did not meet at {meeting} (MASTER_ADDR, MASTER_PORT): "
                    f"{str(error).splitlines()[0]}; start them all again"
                ) from error

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank; also a barrier.

        Raises:
            RankLostError: another rank is gone.
        """
        if self.world == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.world
        try:
            torch.distributed.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise RankLostError(
                f"another of the {self.world} processes ended early; start the same command again"
            ) from error
        return values

    def together(self, step: Callable[[], T]) -> list[T]:
        """Do a step on all ranks and wait for all; the first failure is everybody's, as one line."""
        failure: BTXError | None = None
        value = None
        try:
            value = step()
        except BTXError as error:
            failure = error
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            failure = InputError(f"{where}{error.strerror or error}")
        answers = self.gather((value, failure))
        for _, problem in answers:
            if problem is not None:
                raise problem
        return [value for value, _ in answers]

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


def _port_of_step() -> int:
    """A port that steps of one job, and neighbouring jobs, do not share."""
    job, step = (int(os.environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 20000 + (job * 64 + step) % 20000


def _first_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if nodes is None:
        return "127.0.0.1"
    answer = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if answer.returncode != 0 or not answer.stdout.split():
        raise InputError(
            f"scontrol show hostnames {nodes}: {answer.stderr.strip() or 'no answer'}; "
            "set MASTER_ADDR to the first host"
        )
    return answer.stdout.split()[0]
