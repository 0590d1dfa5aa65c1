"""Recipes on a real Slurm: one controller and two node daemons on this machine (cluster.py).

All runs stand in one queue side by side. A reference run by ``btx run`` gives the fault runs their first stages, and
every checkpoint that a job wrote is compared with its own, bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.runner.api import PlannedRun, plan_run
from megatron_btx.runner.processes import marked
from megatron_btx.runner.run_dir import lock_run, read_checkpointed_iteration, read_metrics, read_stage_manifest
from megatron_btx.runner.slurm_queue import Job, list_jobs
from megatron_btx.runner.tables import Reporter
from megatron_btx.slurm.script import script_path
from megatron_btx.slurm.submission import Submission, render_scripts, submit, write_scripts
from tests.slurm.cluster import Cluster, cluster, missing
from tests.slurm.inputs import write_inputs

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"no {', '.join(missing())} here: apt-get install slurm-wlm munge"),
    pytest.mark.timeout(900),
]
RECIPE = "recipe.yaml"
TRAINED = ("seed", "expert-math", "finetune")
REFERENCE_STAGES = ("data", "seed", "expert-math", "mix", "evaluate-experts", "finetune")
SECRET = "c0ffee-and-nobody-may-read-it"


def wait_until(holds: Callable[[], object], what: str, seconds: float = 300) -> None:
    """Wait for something that happens in the queue or in a run's folder."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


def btx(*words: str, **variables: str) -> subprocess.Popen[str]:
    """Start ``btx`` in the folder of the inputs."""
    command = [sys.executable, "-m", "megatron_btx.cli", *words]
    environment = {**os.environ, **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def answer(process: subprocess.Popen[str], code: int = 0) -> str:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == code, text
    return text


def submit_run(run: Path, *changes: str, only: tuple[str, ...] = ()) -> Submission:
    """``btx submit`` without Megatron's checks, which take ten seconds each."""
    return submit(plan_run(RECIPE, run, changes=changes, only=only))


def jobs_of(run: Path) -> dict[str, Job]:
    return {job.stage: job for job in list_jobs(run) if job.is_active}


def ping(world: World) -> str:
    with contextlib.suppress(RuntimeError):
        return world.slurm.run("scontrol", "ping")
    return ""


def wait_for_requeue(run: Path, stage: str) -> None:
    """Wait until a job that ran stands in the queue again."""

    def is_back() -> bool:
        job = jobs_of(run).get(stage)
        return job is not None and job.state == "PENDING"

    wait_until(is_back, "the job to be requeued")


def status_of(run: Path, stage: str) -> str | None:
    manifest = read_stage_manifest(run / stage)
    return manifest.status if manifest is not None else None


def started(run: Path, stage: str) -> dict[str, object]:
    manifest = read_stage_manifest(run / stage)
    assert manifest is not None
    return manifest.slurm.model_dump()


def tensors_of(folder: Path) -> dict[str, object]:
    """Every tensor of a checkpoint, weights and optimizer alike."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    root = folder / "checkpoint"
    iteration = root / f"iter_{read_checkpointed_iteration(folder):07d}"
    reader = dcp.FileSystemReader(iteration)
    state = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            state[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def check_equal(folder: Path, reference: Path) -> None:
    """Two checkpoints hold the same numbers, to the last bit."""
    import torch

    ours, theirs = tensors_of(folder), tensors_of(reference)
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


class World:
    """The cluster, the inputs, and the reference run."""

    def __init__(self, slurm: Cluster, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.reference = folder / "reference"
        self.early: PlannedRun | None = None
        """The run that is submitted twice as it was planned when nothing of it was finished."""

    def copy_first_stages(self, name: str) -> Path:
        """A run in which data and seed are finished: as the reference, wherever it lies."""
        wait_until(lambda: status_of(self.reference, "seed") == "finished", "the reference's seed")
        run = self.folder / name
        run.mkdir()
        for stage in ("data", "seed"):
            shutil.copytree(self.reference / stage, run / stage)
        shutil.copy(self.reference / "plan.json", run)
        return run

    def processes_of(self, *jobs: str) -> list[int]:
        """What runs for jobs of this cluster, or for any; another cluster may be at work on this machine."""
        found = []
        for process in marked("slurm-"):
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                is_ours = environment.get("SLURM_CONF") == str(self.slurm.configuration)
                if is_ours and (not jobs or environment.get("SLURM_JOB_ID") in jobs):
                    found.append(process.pid)
        return found


@pytest.fixture(scope="module")
def world(warm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("slurm")
    before = Path.cwd()
    write_inputs(folder)
    changed = {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1", "WANDB_API_KEY": SECRET}
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        try:
            slurm = stack.enter_context(cluster(folder / "cluster"))
        except RuntimeError as failure:
            pytest.skip(f"Slurm's daemons cannot work on this machine: {failure}")
        for name, value in {**slurm.environment(), **changed}.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(before), os.environ.get("PYTHONPATH")))))
        found = World(slurm, folder)
        words = ("run", RECIPE, "--cpu", "--output", str(found.reference), "--only", *REFERENCE_STAGES)
        reference = btx(*words, BTX_PYTHON=str(warm_python))
        try:
            yield found
        finally:
            reference.terminate()
            reference.communicate()


TWO_EXPERTS = "experts.general={blend: {general: 1}, tokens: 512, megatron: {lr: 1.0e-4}}"
WRONG_NETWORK = ("cluster.experts.environment={GLOO_SOCKET_IFNAME: nosuch0}", "cluster.experts.retries=1")
"""Every start ends with a traceback and status 1, in the expert of this name and in no other."""
LIMITED = (
    "experts.math.tokens=100_000_000",
    "training.save-interval=1_000_000",
    "cluster.experts={time: '2', signal-seconds: 60, retries: 20}",
)


EXPORTED = {
    "SQUEUE_STATES": "COMPLETED",
    "SRUN_EXPORT_ENV": "NONE",
    "SLURM_EXPORT_ENV": "NONE",
    "SLURM_STDOUTMODE": "/dev/null",
    "SLURM_LABELIO": "1",
}
"""What a caller may have for Slurm's commands: each would make a job lose its log, its variables or its requeue."""


@pytest.fixture(scope="module")
def runs(world: World, warm_python: Path) -> dict[str, Path]:
    """All runs, started side by side: one is submitted twice at once, one by hand.

    The programs of the first are started warm; those of the others, which are killed or stopped, are what users start.
    """
    words = ("submit", RECIPE, "--output", "twice")
    first = [btx(*words, BTX_PYTHON=str(warm_python)) for _ in range(2)]
    (world.folder / "submitted.txt").write_text("\n====\n".join([answer(process) for process in first]))
    found = {"twice": world.folder / "twice"}
    world.early = plan_run(RECIPE, found["twice"])
    for name in ("killed", "failing", "limited"):
        found[name] = world.copy_first_stages(name)
    submit_run(found["limited"], *LIMITED, only=("expert-math",))
    by_hand = plan_run(RECIPE, found["killed"])
    write_scripts(by_hand, render_scripts(by_hand))
    world.slurm.run("sbatch", str(script_path(found["killed"], "expert-math")), **EXPORTED)
    submit_run(found["failing"], *WRONG_NETWORK, only=("expert-math", "mix"))
    submit_run(found["failing"], TWO_EXPERTS, only=("expert-general",))
    return found


def test_an_expert_that_is_killed_starts_again(world: World, runs: dict[str, Path]) -> None:
    """Submitted by hand, killed after its first save, it goes on from there and ends as if nothing had been.

    Meanwhile another job of it, of another name, leaves, and the controller is away when the job asks to start again.
    """
    run = runs["killed"]
    job = str(jobs_of(run)["expert-math"].number)
    wait_until(lambda: read_checkpointed_iteration(run / "expert-math") >= 10, "the expert's first checkpoint")
    again = ("sbatch", "--job-name=again", "--output=again.txt", str(script_path(run, "expert-math")))
    world.slurm.run(*again)
    wait_until(lambda: (run / "again.txt").is_file() and (run / "again.txt").read_text(), "the second job", 60)
    assert (run / "again.txt").read_text() == (
        "error: stage expert-math: somebody else makes it; wait for it, or end it first\n"
    )
    with pytest.raises(InputError, match="btx run, a job or a command.sh is at work"), lock_run(run):
        pass
    assert started(run, "expert-math")["job"] == job
    world.slurm.stop_controller()
    for number in world.processes_of(job):
        if "megatron_btx.pretrain" in Path(f"/proc/{number}/cmdline").read_text():
            os.kill(number, signal.SIGKILL)
    wait_until(lambda: status_of(run, "expert-math") == "failed", "the job to see it")
    assert "SIGKILL" in str(started(run, "expert-math")["problem"])
    time.sleep(2)
    world.slurm.start_controller()
    wait_until(lambda: "UP" in ping(world), "the controller")
    wait_for_requeue(run, "expert-math")
    assert world.processes_of(job) == []
    result = submit_run(run, only=("expert-math", "mix"))
    assert result.kept == {"expert-math": int(job)} and list(result.submitted) == ["mix"]
    wait_until(lambda: status_of(run, "expert-math") == "finished", "the expert to finish")
    manifest = read_stage_manifest(run / "expert-math")
    assert manifest is not None and manifest.starts == 2 and started(run, "expert-math")["job"] == job
    check_equal(run / "expert-math", world.reference / "expert-math")


def test_a_job_that_meets_its_time_limit_saves_and_goes_on(world: World, runs: dict[str, Path]) -> None:
    """And what is cancelled leaves nothing behind, in its own run alone."""
    run = runs["limited"]
    log = run / "slurm" / "expert-math.log"

    def saved_step() -> int:
        said = log.read_text() if log.is_file() else ""
        return max(map(int, re.findall(r"ended at iteration (\d+) of 781250", said)), default=0)

    # On a busy machine the first minute can end before the first step; then it starts again.
    wait_until(lambda: saved_step() > 0, "a step that was saved at the signal before the time limit", 450)
    job = next(job for job in list_jobs(run) if job.stage == "expert-math")
    # Enough for a start on a busy machine; it goes on under its number either way.
    world.slurm.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    step = saved_step()
    metrics = run / "expert-math" / "metrics.jsonl"
    wait_until(lambda: max(line.iteration for line in read_metrics(metrics)) > step + 10, "steps after it")
    lines = [line.iteration for line in read_metrics(metrics)]
    assert lines == list(range(1, lines[-1] + 1)), "a step is missing or stands twice"
    assert submit_run(run, *LIMITED, only=("expert-math",)).kept == {"expert-math": job.number}
    named = f"expert-math \\(job {job.number}\\)|a job or a command.sh is at work here"  # it may start again just now
    with pytest.raises(InputError, match=named):
        plan_run(RECIPE, run, changes=LIMITED).execute(Reporter())
    others = {name: jobs_of(runs[name]) for name in ("twice", "killed")}
    assert f"expert-math: job {job.number} cancelled" in answer(btx("cancel", str(run)))
    wait_until(lambda: not list_jobs(run), "the cancelled job to be gone")
    assert world.processes_of(str(job.number)) == []
    for name, before in others.items():
        cancelled = [stage for stage in before if stage not in jobs_of(runs[name])]
        assert all(status_of(runs[name], stage) == "finished" for stage in cancelled), f"{name}: {cancelled}"


def test_what_slurm_refuses_is_named(world: World, runs: dict[str, Path]) -> None:
    """And so is what stands in the queue already, and a stage that there is none of."""
    run = world.copy_first_stages("refused")
    shutil.rmtree(run / "seed")
    with pytest.raises(InputError, match=r"stage expert-math: sbatch: .*; btx submit goes on, btx cancel"):
        changes = ("cluster.seed.partition=closed", "cluster.experts.partition=nosuch")
        submit_run(run, *changes, only=("seed", "expert-math"))
    assert list(jobs_of(run)) == ["seed"]
    assert "--only sed: no such stage; expected some of: data, seed" in answer(
        btx("cancel", str(run), "--only", "sed"), code=2
    )
    assert "seed: job" in answer(btx("cancel", str(run), "--only", "seed"))


def test_an_expert_that_always_fails_costs_nobody_else_anything(world: World, runs: dict[str, Path]) -> None:
    """It starts as often as it may without a step, the mix waits with a word of why, and the other expert finishes."""
    run = runs["failing"]
    waiting = jobs_of(run)["mix"]
    log = run / "slurm" / "expert-math.log"
    wait_until(lambda: "not started again" in log.read_text(), "the job to give up")
    manifest = read_stage_manifest(run / "expert-math")
    assert manifest is not None and (manifest.status, manifest.starts) == ("failed", 2)
    assert "2 starts in a row saved no further step" in log.read_text()
    wait_until(lambda: status_of(run, "expert-general") == "finished", "the other expert")
    wait_until(lambda: jobs_of(run)["mix"].never_starts, "Slurm to see that the mix cannot start")
    shown = answer(btx("status", str(run)))
    assert "cannot start without expert-math; btx submit goes on" in shown
    assert jobs_of(run)["mix"].number == waiting.number
    result = submit_run(run, TWO_EXPERTS, only=("expert-math", "expert-general", "mix"))
    assert result.kept == {} and list(result.submitted) == ["expert-math", "mix"]
    assert jobs_of(run)["mix"].number > waiting.number, "the job that could not start is still there"
    wait_until(lambda: status_of(run, "mix") == "finished", "the mix")
    check_equal(run / "expert-math", world.reference / "expert-math")


def test_a_run_submitted_twice_at_once(world: World, runs: dict[str, Path]) -> None:
    """One job for each stage, to the report, over a restart of the controller; finetuning on both nodes."""
    run = runs["twice"]
    first, second = (world.folder / "submitted.txt").read_text().split("====")
    for line in first.strip().splitlines():
        if ": " not in line or "btx status" in line or line.startswith("#") or line.endswith(": finished"):
            continue  # the later one may find a stage that has ended meanwhile
        stage, number = line.split(": ")[0], line.split("job ")[1]
        assert any(other.startswith(f"{stage}: ") and other.endswith(f"job {number}") for other in second.splitlines())
    world.slurm.stop_controller()
    assert "Slurm's queue is not shown" in answer(btx("status", str(run)))
    world.slurm.start_controller()
    world.slurm.wait_for_nodes()
    wait_until(lambda: status_of(run, "report") == "finished", "the report", 300)
    wait_until(lambda: not list_jobs(run), "the queue to be empty")
    for stage in REFERENCE_STAGES:
        manifest = read_stage_manifest(run / stage)
        assert manifest is not None and (manifest.status, manifest.starts) == ("finished", 1)
    assert started(run, "finetune")["nodes"] == "127.0.0.[1-2]"
    for stage in TRAINED:
        wait_until(lambda stage=stage: status_of(world.reference, stage) == "finished", f"the reference's {stage}")
        check_equal(run / stage, world.reference / stage)
    assert "finished" in answer(btx("status", str(run)))
    assert world.early is not None
    for planned in (world.early, plan_run(RECIPE, run)):
        assert submit(planned).submitted == {}, "what ended between the plan and the submission was submitted again"


def test_a_job_that_is_preempted_saves_and_goes_on(world: World, runs: dict[str, Path]) -> None:
    """A job of a partition that goes first takes its node: it has its grace time, and the step it saved is the next."""
    run = runs["limited"]
    number = submit_run(run, *LIMITED, only=("expert-math",)).submitted["expert-math"]
    world.slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=30")
    metrics = run / "expert-math" / "metrics.jsonl"
    before = max(line.iteration for line in read_metrics(metrics))
    wait_until(lambda: max(line.iteration for line in read_metrics(metrics)) > before, "steps of the new start")
    log = run / "slurm" / "expert-math.log"
    ended = log.read_text().count("ended at iteration")
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    asked = world.slurm.run("sbatch", "--parsable", *urgent).strip()
    wait_until(lambda: log.read_text().count("ended at iteration") > ended, "the preemption", 60)
    saved = read_checkpointed_iteration(run / "expert-math")
    assert saved > before
    wait_until(
        lambda: "RUNNING" in world.slurm.run("squeue", f"--job={asked}", "--format=%T"), "the job that goes first", 30
    )
    assert world.processes_of(str(number)) == [] and jobs_of(run)["expert-math"].state == "PENDING"
    wait_until(lambda: max(line.iteration for line in read_metrics(metrics)) > saved, "steps after it")
    lines = [line.iteration for line in read_metrics(metrics)]
    assert lines == list(range(1, lines[-1] + 1)), "a step is missing or stands twice"
    answer(btx("cancel", str(run)))
    wait_until(lambda: not list_jobs(run), "the cancelled job to be gone")


def test_every_task_of_an_array_starts_again(world: World) -> None:
    """The last one has the number of the whole array, for which Slurm answers with all of them."""
    launcher = world.folder / "array" / "examples" / "train_expert.sh"
    launcher.parent.mkdir(parents=True)
    (world.folder / "array" / "checkpoints" / "seed").mkdir(parents=True)
    tracker = "$RUN/latest_checkpointed_iteration.txt"
    launcher.write_text(f'mkdir -p "$RUN"\n[ ! -e "{tracker}" ] || more=50\necho $((50 + ${{more:-0}})) >"{tracker}"\n')
    batch = Path(__file__).parents[2] / "examples" / "slurm" / "experts.sbatch"
    shared = world.folder / "array" / "experts.sbatch"
    shared.write_text(batch.read_text().replace("#SBATCH --exclusive\n", ""))
    small = ("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=5")
    world.slurm.run("sbatch", *small, f"--chdir={shared.parent}", str(shared), STEPS="100", BTX=str(shared.parent))

    def steps() -> list[str]:
        return [path.read_text() for path in (world.folder / "array" / "checkpoints").glob("*/latest*")]

    wait_until(lambda: steps() == ["100\n"] * 3, "all three tasks to go on")


def test_two_tasks_of_one_stage_make_it_once(world: World) -> None:
    run = world.folder / "array-of-one"
    planned = plan_run(RECIPE, run, only=("data",))
    write_scripts(planned, render_scripts(planned))
    world.slurm.run("sbatch", "--array=0-1", "--output=slurm/%a.txt", str(script_path(run, "data")))
    logs = [run / "slurm" / f"{task}.txt" for task in (0, 1)]

    def said() -> str:
        return "".join(log.read_text() for log in logs if log.is_file())

    leaves = "stage data: somebody else makes it|data: finished\n.*data: finished\n"
    wait_until(lambda: "data: finished\n" in said() and re.search(leaves, said(), re.DOTALL), "both to end")
    manifest = read_stage_manifest(run / "data")
    assert manifest is not None and (manifest.status, manifest.starts) == ("finished", 1)


def test_a_secret_of_the_environment_stands_in_no_file(world: World, runs: dict[str, Path]) -> None:
    for run in runs.values():
        for path in run.rglob("*"):
            if path.is_file():
                assert SECRET.encode() not in path.read_bytes(), path


def test_nothing_is_left_when_a_run_has_ended(world: World, runs: dict[str, Path]) -> None:
    """No process, no lock, no unfinished file."""
    for run in runs.values():
        assert [
            path for path in run.rglob(".*") if path.suffix != ".lock" and path.name not in (".lock", ".metadata")
        ] == []
    stranger = {"BTX_STAGE": "slurm-1:", "SLURM_CONF": "/another/slurm.conf"}
    with subprocess.Popen(["sleep", "60"], env={**os.environ, **stranger}) as other:
        assert world.processes_of() == []
        other.kill()
