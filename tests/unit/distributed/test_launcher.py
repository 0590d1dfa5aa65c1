"""Which process of a run an environment says this is, and what is refused before it trains alone."""

from __future__ import annotations

import os

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.distributed import launcher as launch

SRUN = {
    "SLURM_PROCID": "13",
    "SLURM_LOCALID": "5",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "30007",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]-ib,login",
}
UNCOUNTED = {name: value for name, value in SRUN.items() if name != "SLURM_NTASKS"} | {"SLURM_PROCID": "0"}
MEETING = {"MASTER_ADDR": "first", "MASTER_PORT": "29500"}
PORT = 20_000 + (30007 * 64 + 2) % 12_000


def test_a_task_of_srun():
    """Rank, world and place on the node; the first of its nodes; a port of the job and the step."""
    assert launch.find_place(SRUN) == launch.Place(13, 16, 5, 8, "gpu007-ib", PORT)
    assert launch.find_place(SRUN | MEETING) == launch.Place(13, 16, 5, 8, "first", 29500)
    bound = launch.find_place(SRUN | {"CUDA_VISIBLE_DEVICES": "5"})
    assert bound is not None and bound.local_rank == 0
    uneven = launch.find_place(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "12,4"})
    assert uneven is not None and uneven.local_world == 4
    of_job = {name.replace("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"): value for name, value in SRUN.items()}
    assert launch.find_place(of_job) == launch.find_place(SRUN)
    step = ("SLURM_STEP_ID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST")
    older = {name: value for name, value in of_job.items() if name not in step}  # a rank above 0 is no batch script's
    of_older = launch.find_place(older)
    assert of_older is not None and (of_older.rank, of_older.address) == (13, "gpu007-ib")
    for mpi in ({"PMI_RANK": "13", "PMI_SIZE": "16"}, {"PMI_RANK": "13"}):
        assert launch.find_place(SRUN | mpi) == launch.find_place(SRUN)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-3,7],m2", "n1"),
        ("n[7,9-12]", "n7"),
        ("m2,n[1-3]", "m2"),
        ("gpu[003-006,9]-ib,login", "gpu003-ib"),
        ("rack[02-03]n[010-019]", "rack02n010"),
        ("cluster-a.example.org", "cluster-a.example.org"),
    ],
)
def test_the_first_host(nodes, first):
    """Slurm's short form, without scontrol."""
    assert launch.first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", "n[1-3", "n1]", ",n1", "[[1]]", "(null)", "None assigned", "n1 n2"])
def test_nodes_of_an_unknown_form(nodes):
    with pytest.raises(InputError, match="unknown form; export MASTER_ADDR"):
        launch.first_host(nodes)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        # The shell of salloc, that of a batch script, and the interactive step of newer versions.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "n[1-2]"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_PROCID": "0"},
        SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        SRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": "other", "MASTER_PORT": "29500"},
    ],
)
def test_one_process(variables, monkeypatch):
    """It is alone, and meets nobody but itself, whatever address was exported for another run."""
    assert launch.find_place(variables) is None
    monkeypatch.setattr(os, "environ", dict(variables))
    launch.join()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and 0 < int(os.environ["MASTER_PORT"]) != 29500
    assert not os.environ.get("RANK")


def test_torchrun_inside_srun_is_left_alone(monkeypatch):
    """What torchrun says stands, though Slurm's step has one task for each node."""
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEETING}
    variables = SRUN | torchrun | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    monkeypatch.setattr(os, "environ", dict(variables))
    launch.join()
    assert os.environ == variables


def test_ranks_that_a_launcher_within_srun_gives():
    """One task for each node, and torchrun, deepspeed or a script sets the ranks of what it starts."""
    elastic = {"TORCHELASTIC_RUN_ID": "x"}
    for given in (
        SRUN | MEETING | {"RANK": "13", "WORLD_SIZE": "16"},
        SRUN | MEETING | {"RANK": "100", "WORLD_SIZE": "128"},
        SRUN | MEETING | elastic | {"RANK": "0", "WORLD_SIZE": "1"},
        SRUN | MEETING | elastic | {"RANK": "3", "WORLD_SIZE": "16"},
    ):
        place = launch.find_place(given)
        assert place is not None and (place.rank, place.world) == (int(given["RANK"]), int(given["WORLD_SIZE"]))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({name: value for name, value in SRUN.items() if "NODELIST" not in name}, "16 tasks .* where they meet"),
        ({name: value for name, value in SRUN.items() if "PROCID" not in name}, "without SLURM_PROCID: 16 tasks"),
        (SRUN | {"SLURM_PROCID": "16"}, "SLURM_PROCID=16 with SLURM_NTASKS=16"),
        (SRUN | {"SLURM_PROCID": "x"}, "SLURM_PROCID=x: expected a number"),
        (SRUN | {"SLURM_STEP_NODELIST": "n[1"}, "unknown form"),
        (SRUN | {"MASTER_PORT": "auto"}, "MASTER_PORT=auto"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", **MEETING}, "2 tasks were started by MPI"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI_SIZE=2: 2 tasks were started by MPI"),
        # mpirun within an allocation starts its daemons by srun, whose rank is none of the task's.
        (SRUN | {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "64"}, "64 tasks were started by MPI"),
        ({"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "2"}, "2 tasks were started by MPI or the like"),
        ({"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "4"}, "4 tasks were started"),
        ({"PMI_RANK": "1"}, "2 tasks were started by MPI"),  # the size is missing, but there is another one
        # How many tasks there are is said in other places, too: rank 0 must not begin alone.
        (UNCOUNTED | {"SLURM_NPROCS": "16", "SLURM_STEP_NODELIST": ""}, "16 tasks .* where they meet"),
        (UNCOUNTED | {"SLURM_STEP_NODELIST": ""}, "16 tasks .* where they meet"),
        # Exported before srun, they are the same for every task.
        (SRUN | MEETING | {"RANK": "0", "WORLD_SIZE": "16"}, "RANK=0 and WORLD_SIZE=16 in task 13 of 16"),
        (SRUN | MEETING | {"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0 and WORLD_SIZE=1 in task 13 of 16"),
        (SRUN | MEETING | {"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "0"}, "in task 0 of 16"),
        (SRUN | {"MASTER_PORT": "0"}, "MASTER_PORT=0: expected a port"),
        (SRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536: expected a port"),
        ({"WORLD_SIZE": "2", **MEETING}, "WORLD_SIZE=2 without RANK"),
        ({"RANK": "1", **MEETING}, "RANK=1 without WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "2 tasks were started and nothing says where they meet"),
    ],
)
def test_several_tasks_that_would_work_alone(variables, said):
    """One line with what to do; none of them begins."""
    with pytest.raises(InputError, match=said) as refusal:
        launch.find_place(variables)
    assert "MASTER_ADDR" in str(refusal.value)


def test_a_check_is_for_any_number_of_processes(monkeypatch):
    """It meets nobody: WORLD_SIZE alone is enough."""
    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "64"})
    launch.join(checking=True)
    assert os.environ == {"WORLD_SIZE": "64"}


def test_an_environment_without_its_launcher():
    """For a process that works alone."""
    kept = {"PATH": "/bin", "MASTERY": "1"}
    assert launch.without_launcher(kept | SRUN | MEETING | {"PMI_SIZE": "2", "RANK": "0", "GROUP_RANK": "0"}) == kept
