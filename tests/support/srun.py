"""srun, imitated by the variables it sets: an entry of the zygote that runs another entry as a task of a step."""

from __future__ import annotations

import os

ENTRY = "BTX_TEST_ENTRY"
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def become_task() -> None:
    """Say in Slurm's words what the zygote said in torchrun's."""
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    for name in TORCHRUN:
        del os.environ[name]
    os.environ |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_ID": "0"}
    os.environ |= {"SLURM_NTASKS": world, "SLURM_STEP_NUM_TASKS": world, "SLURM_STEP_TASKS_PER_NODE": world}


def main() -> int:
    """The main of the entry that the environment names, as a task of srun."""
    become_task()
    return int(__import__(os.environ[ENTRY], fromlist=["main"]).main())
