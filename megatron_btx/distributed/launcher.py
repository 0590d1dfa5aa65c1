"""Which process of a run this is: told by torchrun, by srun, or alone. No task of several ever works as if alone.

Two tasks that each believe to be the only one train twice and save over each other, without a word. So what started
this process is read from its environment in this one place, for the training programs and the converters alike.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from megatron_btx.common.errors import InputError

_REMEDY = "start it with torchrun, or with srun, or export RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
)
"""Rank and size as Open MPI, MPICH and Intel MPI, MVAPICH, jsrun and Flux give them."""
_SIZES = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
"""Where Slurm says how many tasks there are, the first that is there; the last is its older name."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Torchrun's, which PyTorch and Megatron read."""
_FIRST_PORT, _PORTS = 20_000, 12_000
"""Below the range from which Linux serves outgoing connections, which could take a port before the first rank does."""


class Place(NamedTuple):
    """This process among those of one run, in the order of torchrun's variables."""

    rank: int
    world: int
    local_rank: int
    """Among those on this machine."""
    local_world: int
    """How many of them are on this machine."""
    address: str
    """The host of rank 0."""
    port: int

    def variables(self) -> dict[str, str]:
        return dict(zip(_VARIABLES, map(str, self), strict=True))


def join(checking: bool = False) -> None:
    """Tell PyTorch and Megatron, by torchrun's variables, which process of which run this is.

    Args:
        checking: nobody will be met; ``WORLD_SIZE`` alone then says for how many processes a run is checked.

    Raises:
        InputError: see :func:`find_place`.
    """
    if checking and (os.environ.get("RANK") or os.environ.get("WORLD_SIZE")):
        return
    place = find_place(os.environ)
    if place is None:
        # Alone it meets nobody but itself, whatever address was exported for another run.
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    else:
        os.environ |= place.variables()


def find_place(environment: Mapping[str, str]) -> Place | None:
    """The place that an environment gives; None for a process that was started alone.

    - ``RANK`` and ``WORLD_SIZE``: torchrun, or a launcher that speaks as torchrun does. Taken as they are.
    - a step of Slurm: rank, world and place on the node from its variables, the meeting place from its list of nodes.
    - ranks of MPI alone: refused, because they do not say where to meet.
    - nothing of that: one process. The shell of an allocation (``salloc``, ``sbatch``) belongs to no step.

    Raises:
        InputError: several tasks were started, and their rank or meeting place cannot be known.
    """
    given = {name: value for name, value in environment.items() if value}
    if "RANK" in given or "WORLD_SIZE" in given:
        return _of_torchrun(given)
    step = _step(given)
    _refuse_mpi_alone(given, step)
    if step is None:
        return None
    rank, world = step
    local, node = _number(given, "SLURM_LOCALID", rank), _number(given, "SLURM_NODEID", 0)
    counts = _tasks_per_node(given)
    local_world = counts[node] if node < len(counts) else local + 1  # at least so many
    if re.fullmatch("[^,]+", given.get("CUDA_VISIBLE_DEVICES", "")):
        local = 0  # bound to one GPU each, every task sees its own as the first
    return Place(rank, world, local, local_world, _address(given, world), _port(given, world))


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process of its own: nothing in it says that it is one of several."""
    own = (*_VARIABLES, "GROUP_RANK")
    foreign = ("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_", "MV2_", "JSM_", "FLUX_TASK_", "FLUX_JOB_")
    return {name: value for name, value in environment.items() if name not in own and not name.startswith(foreign)}


def _of_torchrun(given: Mapping[str, str]) -> Place:
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name not in given:
            raise InputError(f"{other}={given[other]} without {name}: this process cannot know its place; {_REMEDY}")
    rank, world = _read_rank(given, "RANK", "WORLD_SIZE", _number(given, "WORLD_SIZE"))
    # srun hands a rank that a batch script exported to every task, and each would be that one. A launcher that srun
    # starts once for each node, torchrun for one, gives its own processes ranks of their own.
    step = None
    if not any(name.startswith("TORCHELASTIC_") for name in given):
        step = _step(given)
    if step is not None and world in (1, step[1]) and (rank, world) != step:
        raise InputError(
            f"RANK={rank} and WORLD_SIZE={world} in task {step[0]} of {step[1]} that srun started: exported before "
            "srun, they are the same for every task; leave RANK and WORLD_SIZE out, which srun itself tells, or set "
            "both within each task; MASTER_ADDR and MASTER_PORT may stay"
        )
    local = _number(given, "LOCAL_RANK", _number(given, "SLURM_LOCALID", 0))
    local_world = _number(given, "LOCAL_WORLD_SIZE", 1)
    return Place(rank, world, local, local_world, _address(given, world), _port(given, world))


def _step(given: Mapping[str, str]) -> tuple[int, int] | None:
    """Rank and world of a Slurm step of several tasks; None outside of one."""
    in_step = bool({"SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS"} & given.keys())
    if "SLURM_JOB_ID" not in given:
        in_step = in_step or "SLURM_PROCID" in given
    if given.get("SLURM_PROCID", "0") != "0":
        in_step = True  # the shell of a batch script has a rank too, and it is 0
    if not in_step:
        return None
    size = next((name for name in _SIZES if name in given), _SIZES[1])
    world = _number(given, size, max(1, sum(_tasks_per_node(given))))
    if world == 1 and given.get("SLURM_PROCID", "0") == "0":
        return None
    if "SLURM_PROCID" not in given:
        raise InputError(f"{size}={world} without SLURM_PROCID: {world} tasks would each work alone; {_REMEDY}")
    return _read_rank(given, "SLURM_PROCID", size, world)


def _refuse_mpi_alone(given: Mapping[str, str], step: tuple[int, int] | None) -> None:
    """Refuse the tasks of an MPI launcher, unless it is srun itself that speaks to MPI."""
    for rank, size in _MPI:
        # Without a size a rank above 0 is still one of several.
        world = _number(given, size, 1 if step else _number(given, rank, 0) + 1)
        if world > 1 and (_number(given, rank, 0), world) != step:
            raise InputError(
                f"{size}={world}: {world} tasks were started by MPI or the like, which does not say where they meet, "
                f"and would each work alone; {_REMEDY}"
            )


def _number(given: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = given.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise InputError(f"{name}={text}: expected a number of 0 or more; {_REMEDY}")
    return int(text)


def _read_rank(given: Mapping[str, str], name: str, world_name: str, world: int) -> tuple[int, int]:
    rank = _number(given, name)
    if rank >= world:
        raise InputError(f"{name}={rank} with {world_name}={world}: expected a rank below that; {_REMEDY}")
    return rank, world


def _tasks_per_node(given: Mapping[str, str]) -> list[int]:
    """How many tasks of the step are on each node: Slurm says ``8``, ``8(x2)`` or ``8(x2),4``."""
    counts: list[int] = []
    per_node = given.get("SLURM_STEP_TASKS_PER_NODE") or given.get("SLURM_TASKS_PER_NODE") or ""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
        counts += [int(count)] * int(times or 1)
    return counts


def _address(given: Mapping[str, str], world: int) -> str:
    """The host of rank 0: as given, else the first node of the step."""
    if world == 1:
        return given.get("MASTER_ADDR", "127.0.0.1")
    nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST") or given.get("SLURM_NODELIST")
    address = given.get("MASTER_ADDR") or (first_host(nodes) if nodes else None)
    if address is None:
        raise InputError(
            f"{world} tasks were started and nothing says where they meet; export MASTER_ADDR, the host of the first, "
            "and MASTER_PORT, or use torchrun"
        )
    return address


def first_host(nodes: str) -> str:
    """The first host of Slurm's short form: ``gpu[003-006,9]-ib,login`` gives ``gpu003-ib``.

    Slurm's own ``scontrol show hostnames`` is often missing on compute nodes and in containers.

    Raises:
        InputError: a list of another form.
    """
    first = re.match(r"(?:[\w.-]|\[[^\[\]]*\])+", nodes)
    if first is None or (nodes[first.end() :] and not nodes[first.end() :].startswith(",")):
        raise InputError(f"Slurm's list of nodes {nodes} is of an unknown form; export MASTER_ADDR, the first host")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _port(given: Mapping[str, str], world: int) -> int:
    """As given, else one that steps of a job, and neighbouring jobs, do not share."""
    if "MASTER_PORT" in given:
        port = _number(given, "MASTER_PORT")
        if not 0 < port < 1 << 16:
            raise InputError(f"MASTER_PORT={port}: expected a port from 1 to 65535; {_REMEDY}")
        return port
    if world == 1:
        return _free_port()
    step = given.get("SLURM_STEP_ID", "0")
    job = _number(given, "SLURM_JOB_ID", 0)
    return _FIRST_PORT + (job * 64 + (int(step) if step.isdecimal() else 0)) % _PORTS


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
