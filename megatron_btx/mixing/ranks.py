"""Several processes that share one conversion: under torchrun or srun, each writes its share of the result."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any

from megatron_btx.common.errors import BTXError, KeptError, MachineError, as_ours
from megatron_btx.distributed.launcher import Place

_PATIENCE = datetime.timedelta(days=2)
"""How long a rank waits for the slowest; one that died is noticed at once, by its closed connection."""
_MEETING = datetime.timedelta(minutes=10)
"""How long it waits for all to have started."""


class RankLostError(KeptError, MachineError):
    """Another process of the run is gone: what all have written stays, for the same command to go on from."""


class Ranks:
    """This process among those of one run.

    Args:
        place: as a launcher gave it; None for a process that works alone.

    Raises:
        RankLostError: from the constructor: the others did not come.
    """

    def __init__(self, place: Place | None = None) -> None:
        self.rank = 0
        self.world = 1
        if place is None:
            return
        self.rank = place.rank
        self.world = place.world
        if self.world > 1:
            import torch.distributed

            os.environ |= place.variables()
            try:
                torch.distributed.init_process_group("gloo", rank=self.rank, world_size=self.world, timeout=_MEETING)
                self._group = torch.distributed.new_group(timeout=_PATIENCE)
            except RuntimeError as error:
                raise RankLostError(
                    f"the {self.world} processes did not meet at {place.address}:{place.port} (MASTER_ADDR, "
                    f"MASTER_PORT): {str(error).splitlines()[0]}; start them all again"
                ) from error

    def run_on_all[T](self, step: Callable[[], T]) -> list[T]:
        """Do a step on all ranks and wait for all: what it gave on each, or the first failure, which is everybody's.

        Raises:
            RankLostError: another rank is gone.
        """
        failure: BTXError | None = None
        value = None
        try:
            value = step()
        except BTXError as error:
            failure = error
        except OSError as error:
            failure = as_ours(error)
        answers: list[Any] = [(value, failure)]
        if self.world > 1:
            import torch.distributed

            answers *= self.world
            try:
                torch.distributed.all_gather_object(answers, (value, failure), group=self._group)  # type: ignore[arg-type]
            except RuntimeError as error:
                raise RankLostError(
                    f"another of the {self.world} processes ended early; start the same command again"
                ) from error
        for _, problem in answers:
            if problem is not None:
                raise problem
        return [value for value, _ in answers]

    def close(self) -> None:
        """Leave the group."""
        if self.world > 1:
            import torch.distributed

            torch.distributed.destroy_process_group()
