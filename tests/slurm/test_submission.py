"""What submits and shows, on a real Slurm: beside others who work at the same moment, and whatever the user exports.

Nothing here trains. Jobs wait in a partition that is closed, or end before their stage begins.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_btx import cli
from megatron_btx.common.errors import BTXError, InputError
from megatron_btx.plan.fingerprint import identities
from megatron_btx.plan.stage import Stage
from megatron_btx.report.status import print_status
from megatron_btx.runner.api import PlannedRun, plan_run
from megatron_btx.runner.decisions import decide
from megatron_btx.runner.local import Machine, execute_stages
from megatron_btx.runner.run_dir import take_turn
from megatron_btx.runner.slurm_queue import (
    COMMENT_LETTERS,
    cancel_jobs,
    check_no_jobs,
    job_name,
    list_jobs,
    submit_script,
)
from megatron_btx.runner.tables import Reporter
from megatron_btx.slurm.submission import Submission, submit, submit_run
from megatron_btx.slurm.submission import main as cancel
from tests.slurm.cluster import Cluster, cluster, missing
from tests.slurm.inputs import write_inputs
from tests.slurm.test_slurm import RECIPE, TWO_EXPERTS, wait_until

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"no {', '.join(missing())} here: apt-get install slurm-wlm munge"),
    pytest.mark.timeout(300),
]
PACKAGE = Path(__file__).resolve().parents[2]
CLOSED = "cluster={partition: closed, time: '10', gpu: {gpus-per-task: 0}}"
NO_PYTHON = "cluster={partition: all, time: '10', python: /no/such/python, gpu: {gpus-per-task: 0}}"
OPTIONS_OF_A_USER = {
    "SQUEUE_STATES": "RUNNING",
    "SQUEUE_FORMAT": "%i",
    "SQUEUE_USERS": "nobody",
    "SQUEUE_PARTITION": "urgent",
    "SCANCEL_STATE": "RUNNING",
    "SCANCEL_PARTITION": "urgent",
    "SCONTROL_ALL": "1",
    "SBATCH_PARTITION": "urgent",
    "SBATCH_TIMELIMIT": "1",
    "SBATCH_NO_REQUEUE": "1",
    "SBATCH_ARRAY_INX": "0-1",
    "SBATCH_OUTPUT": "elsewhere.log",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_SIGNAL": "KILL@10",
    "SBATCH_HINT": "nomultithread",
    "SRUN_CPUS_PER_TASK": "3",
    "SLURM_TIME_FORMAT": "relative",
    "BTX_STAGE": "of another run",
}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("submission")
    write_inputs(folder)
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        try:
            started = stack.enter_context(cluster(folder / "cluster"))
        except RuntimeError as failure:
            pytest.skip(f"Slurm's daemons cannot work on this machine: {failure}")
        for name, value in {**started.environment(), "CUDA_VISIBLE_DEVICES": "", "MINE": "kept"}.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(before), os.environ.get("PYTHONPATH")))))
        yield started


def plan_closed(run: Path, *changes: str, only: tuple[str, ...] = ()) -> PlannedRun:
    return plan_run(RECIPE, run, changes=[CLOSED, *changes], only=only)


def submit_closed(run: Path, *changes: str, only: tuple[str, ...] = ()) -> Submission:
    return submit(plan_closed(run, *changes, only=only))


def stages_of(run: Path) -> dict[str, int]:
    """Stage -> number of its job; each has one."""
    jobs = [job for job in list_jobs(run) if job.is_active]
    found = {job.stage: job.number for job in jobs}
    assert len(found) == len(jobs), f"two jobs of one stage: {jobs}"
    return found


def content_of(folder: Path) -> dict[Path, tuple[float, bytes]]:
    """Every file of a folder: when it was written, and what it holds; folders, too."""
    found = {}
    for path in folder.rglob("*"):
        found[path] = (path.stat().st_mtime, path.read_bytes() if path.is_file() else b"")
    return found


def at_once(*works: Callable[[], object]) -> list[str]:
    """Do several things in the same moment, each in a process of its own; "" or what each was refused with."""
    readers, children = [], []
    for work in works:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            said = b"died"
            try:
                work()
                said = b""
            except BTXError as error:
                said = str(error).encode()
            finally:
                os.write(writer, said)
                os._exit(0)
        os.close(writer)
        readers.append(reader)
        children.append(child)
    answers = []
    for reader, child in zip(readers, children, strict=True):
        with open(reader, "rb") as stream:
            answers.append(stream.read().decode())
        os.waitpid(child, 0)
    return answers


def shown(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``btx status`` prints."""
    capsys.readouterr()
    print_status(run)
    return capsys.readouterr().out


def test_a_dry_run_writes_nothing(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither beside jobs of other settings, which read the records there, nor where no run is yet."""
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    submit_closed(run)
    monkeypatch.setattr("megatron_btx.runner.api.check_with_megatron", lambda *_: None)  # ten seconds each
    before = content_of(tmp_path), content_of(Path.cwd())
    for command, folder in (("submit", run), ("submit", fresh), ("run", run), ("run", fresh), ("plan", fresh)):
        words = [command, RECIPE, "--output", str(folder), "--set", CLOSED, "seed.tokens=1024"]
        if command != "plan":
            words.insert(1, "--dry-run")
        capsys.readouterr()
        assert cli.main(words) == 0
        said = capsys.readouterr().out
        assert ("#SBATCH --partition=closed" in said, "mkdir -p" in said) == (command == "submit", command == "run")
        sizes = [line for line in said.splitlines() if " stages to run, " in line]
        assert len(sizes) == 1 + (command != "plan") and said.endswith(f"{sizes[0]}\n"), (
            "the table is not first and last"
        )
    now = content_of(tmp_path), content_of(Path.cwd())
    for old, new in zip(before, now, strict=True):
        changed = [path for path in old.keys() | new.keys() if old.get(path) != new.get(path)]
        assert [path for path in changed if "cluster" not in path.parts] == []


def test_options_of_a_user_are_none_of_a_recipe(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither of its jobs, nor of the questions about them; whatever else is exported is there in a job."""
    for name, value in OPTIONS_OF_A_USER.items():
        monkeypatch.setenv(name, value)
    changes = [CLOSED.replace("closed", "all"), "cluster.python=/usr/bin/env"]
    submit_run(plan_run(RECIPE, tmp_path, changes=changes, only=["data"]))
    assert "# note: SBATCH_PARTITION, SBATCH_TIMELIMIT, SBATCH_NO_REQUEUE" in capsys.readouterr().out
    log = tmp_path / "slurm" / "data.log"
    wait_until(lambda: log.is_file() and not list_jobs(tmp_path), "the job to end")
    submit_closed(tmp_path)
    first = stages_of(tmp_path)
    assert len(first) > 5 and submit_closed(tmp_path).submitted == {}
    for name in OPTIONS_OF_A_USER:
        monkeypatch.delenv(name)
    assert stages_of(tmp_path) == first
    asked = slurm.run("scontrol", "show", "job", str(first["seed"]))
    for expected in ("Partition=closed", "TimeLimit=00:10:00", "Requeue=1", f"StdOut={tmp_path}/slurm/seed.log"):
        assert expected in asked
    for name, value in OPTIONS_OF_A_USER.items():
        monkeypatch.setenv(name, value)
    assert f"│ {first['seed']} │" in shown(tmp_path, capsys)
    assert cancel([str(tmp_path)]) == 0
    for name in OPTIONS_OF_A_USER:
        monkeypatch.delenv(name)
    assert stages_of(tmp_path) == {}


def test_a_job_has_what_a_user_exports(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of the options of Slurm's commands, by which its script would see another queue."""
    for name, value in OPTIONS_OF_A_USER.items():
        monkeypatch.setenv(name, value)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\nenv >{tmp_path}/env\nexit 2\n")
    python.chmod(0o755)
    submit(plan_run(RECIPE, tmp_path / "run", changes=[NO_PYTHON, f"cluster.python={python}"], only=["data"]))
    wait_until((tmp_path / "env").is_file, "the job to begin")
    wait_until(lambda: not list_jobs(tmp_path / "run"), "the job to end")
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert {"MINE", "SLURM_CONF", "SLURM_JOB_ID"} <= names
    assert sorted(name for name in OPTIONS_OF_A_USER if name in names) == []


def test_a_run_and_a_submission_in_the_same_moment(slurm: Cluster, tmp_path: Path) -> None:
    """One of them works, and the other says so."""
    for number in range(6):
        planned = plan_closed(tmp_path / str(number), only=("data",))
        stages = [Stage("data", ("sleep", "0.5"), product=".")]
        run = replace(planned, stages=stages, actions=decide(stages, planned.directory), use_gpus=False)
        said = at_once(lambda run=run: run.execute(Reporter()), lambda planned=planned: submit(planned))
        assert said.count("") == 1 and "at work here" in "".join(said), said
        assert bool(stages_of(planned.directory)) == (said[1] == "")


def test_two_submissions_with_other_settings_in_the_same_moment(slurm: Cluster, tmp_path: Path) -> None:
    """They take turns: every stage has one job, all of one recipe, and each waits for one that is there."""
    other = "experts.math.tokens=1024"
    recipes = []
    for changes in ((), (other,)):
        known = identities(plan_run(RECIPE, tmp_path, changes=[CLOSED, *changes]).stages)
        recipes.append({name: identity.fingerprint[:COMMENT_LETTERS] for name, identity in known.items()})
    for number in range(4):
        run = tmp_path / str(number)
        first, second = plan_closed(run), plan_closed(run, other)
        said = at_once(lambda first=first: submit(first), lambda second=second: submit(second))
        assert said == ["", ""]
        queue = {job.stage: job.fingerprint for job in list_jobs(run) if job.is_active}
        assert queue in recipes, "jobs of both recipes were left"
        numbers = set(stages_of(run).values())
        for job in numbers:
            waits = re.findall(r"afterok:(\d+)", slurm.run("scontrol", "show", "job", str(job)))
            assert {int(parent) for parent in waits} <= numbers


def test_a_run_is_cancelled_while_it_is_submitted(slurm: Cluster, tmp_path: Path) -> None:
    """Either all of it is in the queue afterwards or nothing: what is submitted goes on being submitted first."""
    for number in range(3):
        planned = plan_closed(tmp_path / str(number))
        submit_closed(planned.directory, only=("data",))
        assert at_once(lambda planned=planned: submit(planned), lambda planned=planned: cancel_quietly(planned)) == [
            "",
            "",
        ]
        assert list(stages_of(planned.directory)) in ([], [stage.name for stage in planned.stages])


def test_who_waits_for_a_submission_says_so(tmp_path: Path) -> None:
    """It may be one that somebody has stopped."""
    program = "import pathlib; from megatron_btx.runner.run_dir import take_turn\nwith take_turn(pathlib.Path()): pass"
    command, environment = [sys.executable, "-c", program], {**os.environ, "PYTHONPATH": str(PACKAGE)}
    with take_turn(tmp_path):
        waiting = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        assert waiting.stderr is not None
        assert "is at work in" in waiting.stderr.readline() and waiting.poll() is None
    assert waiting.wait(timeout=60) == 0
    waiting.stderr.close()


def cancel_quietly(planned: PlannedRun) -> None:
    with contextlib.redirect_stdout(None):
        assert cancel([str(planned.directory)]) == 0


def test_a_job_that_ends_before_its_stage_begins_is_named(
    slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its number, that it ended, why, and where that stands; also after a job that wrote something."""
    number = submit(plan_run(RECIPE, tmp_path, changes=[NO_PYTHON], only=["data"])).submitted["data"]
    wait_until(lambda: not list_jobs(tmp_path), "the job to end")
    log = tmp_path / "slurm" / "data.log"
    text = shown(tmp_path, capsys)
    assert re.search(rf"\ndata +│ ended .*│ +{number} │ failed, or cancelled, before its stage began; btx submit", text)
    assert f"/no/such/python: No such file or directory; its log: {log}" in text
    assert re.search(r"\nseed +│ waiting .*not submitted", text)
    log.unlink()  # as on a full disk
    assert f"data: nothing said; its log: {log}" in shown(tmp_path, capsys)
    second = submit_closed(tmp_path, only=("data",)).submitted["data"]
    assert re.search(rf"\ndata +│ queued .*│ +{second} │ PartitionDown", shown(tmp_path, capsys))
    slurm.run("scancel", str(second))
    wait_until(lambda: not list_jobs(tmp_path), "the job to be gone")
    assert re.search(rf"\ndata +│ ended .*│ +{second} │", shown(tmp_path, capsys))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"status": "failed", "exit": 1}')
    (tmp_path / "data" / "log.txt").write_text(
        "== 1: run\nValueError: old\n== 2: run\nTraceback:\nOSError: no room\nsrun: x\n"
    )
    text = shown(tmp_path, capsys)
    assert re.search(r"\ndata +│ failed ", text), "what btx run did afterwards is not shown"
    assert f"data: OSError: no room; its log: {tmp_path}/data/log.txt" in text


def test_a_job_that_is_ending_may_start_again(
    slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While its nodes clear up nobody begins beside it, and a cancel is the end of it."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "plan.json").write_text("[]")
    script = tmp_path / "slurm" / "seed.sh"
    script.write_text(f"#!/bin/bash\n#SBATCH --job-name={job_name(tmp_path, 'seed')}\nsleep 60\n")

    def states() -> list[str]:
        return [job.state for job in list_jobs(tmp_path)]

    slow = slurm.folder / "slow"
    slow.touch()
    try:
        number = submit_script(script, [])
        wait_until(lambda: states() == ["RUNNING"], "the job to run")
        slurm.run("scontrol", "requeue", str(number))
        wait_until(lambda: states() == ["COMPLETING"], "its nodes to clear up")
        with pytest.raises(InputError, match=rf"jobs of Slurm are at work here: seed \(job {number}\)"):
            check_no_jobs(tmp_path)
        assert f"cleared up after seed (job {number})" in capsys.readouterr().err
        wait_until(lambda: states() == ["RUNNING"], "the job to run again")
        slurm.run("scontrol", "requeue", str(number))
        wait_until(lambda: states() == ["COMPLETING"], "its nodes to clear up")
        assert cancel([str(tmp_path)]) == 0 and f"seed: job {number} cancelled" in capsys.readouterr().out
        assert cancel([str(tmp_path)]) == 0, "one that really ends is cancelled without harm"
        check_no_jobs(tmp_path)
        assert states() == []
    finally:
        slow.unlink()
    fixed = slurm.run("sbatch", "--parsable", "--no-requeue", str(script)).strip()
    wait_until(lambda: states() == ["RUNNING"], "the job to run")
    with pytest.raises(RuntimeError, match="disabled"):  # so RUN/slurm/STAGE.sh knows that it need not ask again
        slurm.run("scontrol", "requeue", fixed)
    cancel_jobs(list_jobs(tmp_path))


def test_jobs_of_stages_that_the_recipe_no_longer_has_are_said(
    slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And which jobs were replaced."""
    submit_closed(tmp_path, TWO_EXPERTS)
    first = stages_of(tmp_path)
    capsys.readouterr()
    submit_run(plan_run(RECIPE, tmp_path, changes=[CLOSED, "experts.math.tokens=1024"]))
    said = capsys.readouterr().out
    line = (
        f"expert-general: job {first['expert-general']} is in the queue, and the recipe has no such stage; btx cancel"
    )
    assert line in said and line in shown(tmp_path, capsys)
    now = stages_of(tmp_path)
    assert f"expert-math: submitted, job {now['expert-math']}, in place of job {first['expert-math']}\n" in said
    assert f"seed: in the queue already, job {first['seed']}\n" in said
    assert cancel([str(tmp_path), "--only", "expert-general"]) == 0
    assert "no such stage" not in shown(tmp_path, capsys)


def test_what_slurms_commands_answer_has_many_forms(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site's sbatch greets; one speaks of its own; Slurm is there for sbatch and gone for the next question."""
    bin_folder, run = tmp_path / "bin", tmp_path / "run"
    bin_folder.mkdir()
    real = slurm.run("which", "sbatch").strip()
    wrapper = bin_folder / "sbatch"
    wrapper.touch(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    wrapper.write_text(f'#!/bin/bash\nprintf "Welcome\\nHours left: 12\\n3000 x\\n"; {real} "$@"; echo "Good luck"\n')
    assert len(submit_closed(run).submitted) == len(stages_of(run)) > 5
    wrapper.write_text(f'#!/bin/bash\n{real} "${{@:2}}"; printf "on a good day\\n"\n')  # without --parsable
    assert cancel([str(run)]) == 0
    assert submit_closed(run).submitted == stages_of(run)
    assert cancel([str(run)]) == 0
    wrapper.write_text(f'#!/bin/bash\n{real} "$@" >/dev/null; echo "done"\n')
    with pytest.raises(InputError, match=r"stage data: sbatch .*: answered 'done.*; btx submit finds the job"):
        submit_closed(run)
    wrapper.unlink()
    assert list(submit_closed(run).kept) == ["data"]
    assert cancel([str(run)]) == 0
    questions = bin_folder / "squeue"
    questions.touch(0o755)
    questions.write_text(f'#!/bin/bash\n[ ! -e {tmp_path}/gone ] || exit 1\nexec {os.path.dirname(real)}/squeue "$@"\n')
    wrapper.touch(0o755)
    wrapper.write_text(f'#!/bin/bash\ntouch {tmp_path}/gone\nexec {real} "$@"\n')
    assert len(submit_closed(run).submitted) > 5, "the controller was away for a question after a submission"
    questions.unlink()
    wrapper.unlink()
    with pytest.raises(InputError, match=r"^stage data: sbatch: invalid partition specified: nosuch; Batch job subm"):
        submit(plan_run(RECIPE, tmp_path / "other", changes=[CLOSED.replace("closed", "nosuch")]))


def test_a_submission_that_slurm_does_not_hear_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: Cluster
) -> None:
    """A run of which no job can be in a queue stays one that btx run may take."""
    with monkeypatch.context() as patch, pytest.raises(InputError, match="squeue: not found"):
        patch.setenv("PATH", os.path.dirname(sys.executable))
        submit_closed(tmp_path / "run")
    assert not (tmp_path / "run" / "slurm").exists()
    stages = [Stage("data", ("true",), product=".")]
    execute_stages(stages, tmp_path / "run", Machine([], 1), Reporter())
