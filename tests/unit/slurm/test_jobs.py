"""What the script of a job does beside its program, run by bash with Slurm's commands imitated: who else is at work,
what Slurm answers and when, what its caller exported, and what somebody put into the run's folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_btx import doctor
from megatron_btx.common.errors import InputError
from megatron_btx.evaluation import api
from megatron_btx.plan import checks as program_checks
from megatron_btx.plan.fingerprint import identities
from megatron_btx.plan.stage import Program, Stage
from megatron_btx.recipe import from_checkpoint as given
from megatron_btx.recipe.cluster import ClusterSection
from megatron_btx.runner.run_dir import is_locked, lock_run, read_end
from megatron_btx.runner.schemas import StageRecord
from megatron_btx.runner.scripts import command_script
from megatron_btx.runner.slurm_queue import Job
from megatron_btx.runner.stage_run import write_record
from megatron_btx.slurm import job
from megatron_btx.slurm.resources import find_resources
from megatron_btx.slurm.script import DONE_BEFORE, GIVEN_UP, INTERRUPTED, render_script
from megatron_btx.slurm.submission import _check_alone
from tests.unit.slurm.test_scripts import FINGERPRINT

SQUEUE = """#!/bin/bash
# Answers are the files 1, 2, 3 ... of the folder "answers", the last one for ever; a program that is run, or a text.
cd "$(dirname "$0")/../answers" || exit
env | grep -E "^(SQUEUE|SBATCH|SCONTROL|SRUN|SLURM_CLUSTERS)" >>../leaked
count=$(($(cat count 2>/dev/null || echo 0) + 1))
echo "$count" >count
while [ ! -e "$count" ]; do count=$((count - 1)); done
bash "./$count" "$@"
"""
SCONTROL = '#!/bin/bash\necho "$@" >>"$(dirname "$0")/../requeued"\n'
TIMEOUT = '#!/bin/bash\nshift\nexec /usr/bin/timeout 1 "$@"\n'
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
PYTHON = """#!/bin/bash
# "stage begin" is counted and does BEGINS, "stage end" does ENDS, and a program waits for "hold" to go.
case " $* " in
    *" begin "*) echo "$(basename "$PWD")" >>begun; eval "${BEGINS:-}" ;;
    *" end "*) eval "${ENDS:-}" ;;
    *) while [ -e hold ]; do /bin/sleep .05; done ;;
esac
"""


class Desk:
    """A run whose scripts are started here, as Slurm would start them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        for name in ("bin", "answers", "run/slurm", "run/seed", "run/mix"):
            (folder / name).mkdir(parents=True)
        programs = {"squeue": SQUEUE, "scontrol": SCONTROL, "timeout": TIMEOUT, "srun": SRUN, "python": PYTHON}
        for name, text in (programs | {"sleep": "#!/bin/sh\n"}).items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def answers(self, *programs: str) -> None:
        for number, text in enumerate(programs, 1):
            (self.folder / "answers" / str(number)).write_text(text + "\n")

    def start(self, stage: str = "seed", python: str = "", **variables: str) -> subprocess.Popen[str]:
        made = Stage(stage, Program("megatron_btx.pretrain"), resumable=True, cluster="seed")
        section = ClusterSection(python=python or str(self.folder / "bin" / "python"))
        script = self.run / "slurm" / f"{stage}.sh"
        script.write_text(render_script(made, find_resources(section, made), self.run, FINGERPRINT))
        clean = {name: value for name, value in os.environ.items() if name != "BTX_PYTHON"}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        environment = {**clean, "PATH": path, "SLURM_JOB_ID": "7", **variables}
        return subprocess.Popen(
            ["bash", script],
            cwd=self.folder,
            env=environment,
            text=True,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def ended(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        said = process.communicate(timeout=60)[1]
        return process.returncode, said

    def requeued(self) -> list[str]:
        asked = self.folder / "requeued"
        return asked.read_text().splitlines() if asked.exists() else []

    def begin_and_hold(self, stage: str = "seed", **variables: str) -> subprocess.Popen[str]:
        """A job at work until the file ``hold`` is removed."""
        (self.run / "hold").touch()
        before = self.count_begun()
        process = self.start(stage, **variables)
        deadline = time.monotonic() + 30
        while self.count_begun() == before:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        return process

    def count_begun(self) -> int:
        begun = self.run / "begun"
        return len(begun.read_text().splitlines()) if begun.exists() else 0


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


ALL_RUN = "echo '6 5_0 RUNNING'; echo '8 5_1 RUNNING'"
AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"


@pytest.mark.parametrize(
    ("answers", "requeued"),
    [
        (["echo '7 7 RUNNING'"], ["requeue 7"]),
        ([AWAY, AWAY, AWAY, "echo '7 7 RUNNING'"], ["requeue 7"]),
        (["exec /bin/sleep 100", "echo '7 7 RUNNING'"], ["requeue 7"]),
        (["true", "echo Welcome", "echo '7 7 SIGNALING'", "echo '7 7 RUNNING'"], ["requeue 7"]),
        (["echo Welcome; echo '7 7 RUNNING'"], ["requeue 7"]),
        ([f"{ALL_RUN}; echo '7 5_2 RUNNING'"], ["requeue 5_2"]),
        ([f"{ALL_RUN}; echo '7 5_2 COMPLETING'"], []),
        (["echo '7 7 CANCELLED'"], []),
    ],
    ids=["at-once", "away", "hangs", "empty", "greets", "last-of-an-array", "a-cancelled-task", "cancelled"],
)
def test_a_job_starts_again_whatever_slurm_says_first(answers: list[str], requeued: list[str], desk: Desk) -> None:
    desk.answers(*answers)
    status, said = desk.ended(desk.start(ENDS=f"exit {INTERRUPTED}"))
    assert (status, desk.requeued()) == (INTERRUPTED, requeued), said


def test_what_slurm_refuses_for_a_moment_is_asked_again(desk: Desk) -> None:
    refuses = desk.folder / "bin" / "scontrol"
    refuses.write_text(f'{SCONTROL}[ "$(wc -l <"$(dirname "$0")/../requeued")" -eq 3 ]\n')
    desk.answers("echo '7 7 RUNNING'")
    assert desk.ended(desk.start(ENDS=f"exit {INTERRUPTED}"))[0] == INTERRUPTED
    assert desk.requeued() == ["requeue 7"] * 3


@pytest.mark.parametrize(
    ("variables", "status", "is_requeued"),
    [
        ({"BEGINS": "kill -9 $$"}, INTERRUPTED, True),
        ({"BEGINS": "exit 143"}, INTERRUPTED, True),
        ({"BEGINS": "exit 1", "SLURM_RESTART_COUNT": "2"}, INTERRUPTED, True),
        ({"BEGINS": "exit 1", "SLURM_RESTART_COUNT": "3"}, INTERRUPTED, False),
        ({"BEGINS": "exit 2"}, 2, False),
        ({"BEGINS": f"exit {DONE_BEFORE}", "SLURM_RESTART_COUNT": "9"}, 0, False),
        ({"ENDS": "kill -9 $$"}, INTERRUPTED, True),
        ({"ENDS": "exit 1", "SLURM_RESTART_COUNT": "9"}, INTERRUPTED, True),
        ({"ENDS": "exit 2"}, 2, False),
        ({"ENDS": f"exit {GIVEN_UP}"}, 1, False),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else "",
)
def test_a_begin_or_an_end_that_a_machine_failed_starts_again(
    variables: dict[str, str], status: int, is_requeued: bool, desk: Desk
) -> None:
    """Or those that wait for the job would wait for ever; a begin so often that it does not go on for ever."""
    desk.answers("echo '7 7 RUNNING'")
    ended, said = desk.ended(desk.start(**variables))
    assert (ended, desk.requeued()) == (status, ["requeue 7"] * is_requeued), said
    assert ("not started again after 3 starts" in said) == (variables.get("SLURM_RESTART_COUNT") == "3")


@pytest.mark.parametrize("name", ["squeue", "scontrol"])
def test_a_node_without_slurms_commands_is_given_back_at_once(name: str, desk: Desk) -> None:
    (desk.folder / "bin" / name).unlink()
    for tool in ("bash", "flock", "grep", "env", "cat", "basename", "dirname"):
        (desk.folder / "bin" / tool).symlink_to(str(shutil.which(tool)))
    desk.answers("echo '7 7 RUNNING'")
    ended, said = desk.ended(desk.start(ENDS=f"exit {INTERRUPTED}", PATH=str(desk.folder / "bin")))
    assert ended == INTERRUPTED and said.count("\n") == 1, said
    assert said.startswith("Slurm starts it not again (squeue or scontrol does not answer, or is missing)")


def test_a_job_that_was_submitted_not_to_be_requeued_ends_at_once(desk: Desk) -> None:
    refusal = "Requested operation is presently disabled for job 7"
    (desk.folder / "bin" / "scontrol").write_text(f"{SCONTROL}echo '{refusal}' >&2; exit 1\n")
    desk.answers("echo '7 7 RUNNING'")
    ended, said = desk.ended(desk.start(ENDS=f"exit {INTERRUPTED}"))
    assert ended == INTERRUPTED and len(desk.requeued()) == 1
    assert said == f"Slurm starts it not again ({refusal}); btx submit goes on from its last step\n"


def test_what_a_caller_exported_for_slurm_is_not_in_a_job(desk: Desk) -> None:
    exported = {"SQUEUE_STATES": "COMPLETED", "SQUEUE_FORMAT2": "JobID", "SCONTROL_ALL": "1", "SBATCH_ARRAY_INX": "0-1"}
    desk.answers("echo '7 7 RUNNING'")
    desk.ended(desk.start(ENDS=f"exit {INTERRUPTED}", SRUN_EXPORT_ENV="NONE", SLURM_CLUSTERS="other", **exported))
    assert desk.requeued() == ["requeue 7"] and (desk.folder / "leaked").read_text() == ""


def test_a_script_that_is_no_job_says_so_and_writes_nothing(desk: Desk) -> None:
    status, said = desk.ended(desk.start(SLURM_JOB_ID=""))
    assert status == 2 and said.startswith("error: this is no job of Slurm;") and said.count("\n") == 1
    assert desk.count_begun() == 0


def test_a_job_whose_run_is_gone_does_nothing_elsewhere(desk: Desk) -> None:
    """Slurm then starts it in /tmp, where anybody may have put a record and modules."""
    process = desk.begin_and_hold()
    script = (desk.run / "slurm" / "seed.sh").read_text()
    (desk.run / "hold").unlink()
    assert desk.ended(process)[0] == 0
    desk.run.rename(desk.folder / "moved")
    (desk.folder / "tmp" / "slurm").mkdir(parents=True)
    environment = {**os.environ, "PATH": f"{desk.folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    answer = subprocess.run(["bash", "-c", script], cwd=desk.folder / "tmp", env=environment, check=False)
    assert answer.returncode == 2 and not (desk.folder / "tmp" / "begun").exists()


def test_one_is_at_work_on_a_stage(desk: Desk) -> None:
    """A second job of any name, or a task of an array, leaves; one of another stage works; btx run waits for all."""
    first = desk.begin_and_hold()
    status, said = desk.ended(desk.start(SLURM_JOB_ID="8"))
    assert (status, said) == (2, "error: stage seed: somebody else makes it; wait for it, or end it first\n")
    other = desk.begin_and_hold("mix")
    with pytest.raises(InputError, match="another btx run, a job or a command.sh is at work here"), lock_run(desk.run):
        pass
    assert not is_locked(desk.run), "btx submit may go on while jobs work"
    command = desk.run / "seed" / "command.sh"
    command.write_text(command_script(Stage("seed", ("touch", "seed/done"))))
    by_hand = {name: value for name, value in os.environ.items() if name != "BTX_STAGE"}
    answer = subprocess.run(["bash", command], env=by_hand, stderr=subprocess.PIPE, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (2, said)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    again = desk.begin_and_hold()
    (desk.run / "hold").unlink()
    assert [desk.ended(process)[0] for process in (other, again)] == [0, 0]
    assert desk.count_begun() == 3
    with lock_run(desk.run):
        status, said = desk.ended(desk.start())
    assert status == 2 and said.startswith("error: stage seed: a btx run is at work in ") and said.count("\n") == 1
    assert desk.count_begun() == 3


def test_a_disk_without_locks_stops_nobody(desk: Desk) -> None:
    broken = desk.folder / "bin" / "flock"
    broken.write_text("#!/bin/sh\necho 'flock: 8: Function not implemented' >&2; exit 71\n")
    broken.chmod(0o755)
    assert desk.ended(desk.start())[0] == 0


def make_record(run: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stage ``seed`` of a run as its job sees it; the words of its begin."""
    stage = Stage("seed", Program("module"), product="out", iterations=10, resumable=True)
    known = identities([stage])["seed"]
    write_record(run, StageRecord(stage, known, {}, None, False))
    monkeypatch.chdir(run)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return ["begin", "seed", "--fingerprint", known.fingerprint, "--retries", "1"]


@pytest.mark.parametrize(
    ("number", "state", "refused"),
    [(8, "RUNNING", True), (8, "PENDING", False), (8, "COMPLETING", False), (9, "RUNNING", False)],
)
def test_without_locks_the_queue_says_who_makes_a_stage(
    number: int,
    state: str,
    refused: bool,
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The job of the manifest is asked for, which a killed one left as running."""
    words = make_record(desk.run, monkeypatch)
    before = {"stage": "seed", "status": "running", "fingerprint": words[3], "slurm": {"job": "8"}}
    (desk.run / "seed" / "manifest.json").write_text(json.dumps(before))
    monkeypatch.setattr(job, "list_jobs", lambda run: [Job(number, "seed", state, "1:00", "N/A", "None", "abc")])
    assert job.main(words) == (2 if refused else 0)
    assert ("a btx run or another job makes it" in capsys.readouterr().err) == refused
    assert (json.loads((desk.run / "seed" / "manifest.json").read_text()) == before) == refused


@pytest.mark.parametrize("is_alive", [True, False])
def test_without_locks_a_runner_is_known_by_what_it_writes(
    is_alive: bool, desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = make_record(desk.run, monkeypatch)
    manifest = desk.run / "seed" / "manifest.json"
    content = {"stage": "seed", "status": "running", "fingerprint": words[3], "seconds": 1.0}
    manifest.write_text(json.dumps(content))

    def sleep(seconds: float) -> None:
        if is_alive:
            manifest.write_text(json.dumps(content | {"seconds": 16.0}))
        clock.append(clock[-1] + seconds)

    clock = [0.0]
    monkeypatch.setattr(job.time, "sleep", sleep)
    monkeypatch.setattr(job.time, "monotonic", lambda: clock[-1])
    assert job.main(words) == (2 if is_alive else 0)
    assert ("a btx run or another job makes it" in capsys.readouterr().err) == is_alive


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_planted_log_is_not_written_to(
    kind: str, desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = make_record(desk.run, monkeypatch)
    log, victim = desk.run / "seed" / "log.txt", desk.folder / "victim"
    victim.touch()
    earlier = {"stage": "seed", "status": "failed", "fingerprint": words[3]}
    (desk.run / "seed" / "manifest.json").write_text(json.dumps(earlier))
    if kind == "pipe":
        os.mkfifo(log)
    else:
        log.symlink_to(victim)
    assert job.main(words) == 2 and victim.read_bytes() == b""
    assert f"{log}: is a link, or no regular file, and is not written to" in capsys.readouterr().err


def test_a_stage_that_is_made_by_hand_gets_no_job(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job would fail at once, and what depends on it never start."""
    due = [Stage("seed", Program("module"))]
    running = [Job(7, "seed", "RUNNING", "1:00", "N/A", "None", "abc")]
    _check_alone(desk.run, due, [])
    process = desk.begin_and_hold()
    with pytest.raises(InputError, match="stage seed is at work, by hand or as another's job; wait"):
        _check_alone(desk.run, due, [])
    _check_alone(desk.run, due, running)  # it is its job
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *_: os.stat("/no/locks/here"))
        _check_alone(desk.run, due, [])
    (desk.run / "hold").unlink()
    assert desk.ended(process)[0] == 0
    (desk.run / "slurm" / "seed.log").symlink_to(desk.folder / "victim")
    with pytest.raises(InputError, match=r"seed\.log: is a link"):
        _check_alone(desk.run, due, [])


def plant(folder: Path) -> None:
    """Modules and programs that say so when they run: of names that every Python, and every script, looks for."""
    code = f"open({str(folder / 'ran')!r}, 'a').write(__name__)\nraise SystemExit(0)\n"
    for name in ("json", "argparse", "sitecustomize"):
        (folder / f"{name}.py").write_text(code)
    for name in ("megatron_btx", "encodings"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "__init__.py").write_text(code)
    for name in ("srun", "squeue", "flock", "bash"):
        (folder / name).write_text(f"#!/bin/sh\necho {name} >>{shlex.quote(str(folder / 'ran'))}\n")
        (folder / name).chmod(0o755)


SEARCHED: Mapping[str, Mapping[str, str]] = {
    "nothing": {},
    "an-open-end": {"PYTHONPATH": "/nonexistent:", "PATH": f"{os.environ['PATH']}:"},
    "an-open-begin": {"PYTHONPATH": ":/nonexistent", "PATH": f":{os.environ['PATH']}"},
    "here": {"PYTHONPATH": ".:./:/nonexistent", "PATH": f".:{os.environ['PATH']}"},
}


@pytest.mark.parametrize("searched", SEARCHED, ids=list(SEARCHED))
def test_no_module_of_a_runs_folder_runs(searched: str, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a job, nor in command.sh, nor in what a program of theirs starts."""
    words = make_record(desk.run, monkeypatch)
    plant(desk.run)
    variables = dict(SEARCHED[searched])
    if "PATH" in variables:
        variables["PATH"] = f"{variables['PATH']}:{desk.folder / 'bin'}"
    status, said = desk.ended(desk.start(python=sys.executable, **variables))
    assert status == 2 and "another form" not in said and "submitted again with other settings" in said, said
    nested = "import json, subprocess, sys; subprocess.run([sys.executable, '-m', 'json.tool', '--help'], check=True)"
    (desk.run / "seed" / "command.sh").write_text(command_script(Stage("seed", ("python", "-c", nested))))
    environment = {**os.environ, **SEARCHED[searched]}
    subprocess.run(["/bin/bash", "seed/command.sh"], cwd="/", env=environment, check=False)
    subprocess.run(["/bin/bash", str(desk.run / "seed" / "command.sh")], cwd="/", env=environment, check=True)
    assert words and not (desk.run / "ran").exists(), (desk.run / "ran").read_text()


def test_what_the_package_starts_searches_no_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan, a check and an evaluation may be asked for in anybody's folder."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\necho "${{PYTHONSAFEPATH:-$1}}" >>{tmp_path}/safe\nexit 1\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    for call in (
        lambda: given.read_models({}),
        lambda: program_checks.check_with_megatron("r.yaml", {}),
        lambda: api._run(1, [], use_gpus=True),
    ):
        with pytest.raises(InputError):
            call()
    doctor.ask_torch()
    assert (tmp_path / "safe").read_text().split() == ["-P", "-P", "1", "-P"]


@pytest.mark.parametrize("place", ["$(touch ran)", "`touch ran`", "a b", "it's", 'a"b', "a}b", "*", "\\"])
@pytest.mark.parametrize("variable", [False, True], ids=["recipe", "BTX_PYTHON"])
def test_an_interpreter_is_a_path_and_no_shell(place: str, variable: bool, desk: Desk) -> None:
    interpreter = desk.folder / place / "python"
    interpreter.parent.mkdir()
    (desk.folder / "bin" / "python").rename(interpreter)
    if variable:
        process = desk.start(python="/nonexistent", BTX_PYTHON=str(interpreter))
    else:
        process = desk.start(python=str(interpreter))
    assert desk.ended(process) == (0, "")
    assert desk.count_begun() == 1 and list(desk.folder.rglob("ran")) == []


def test_a_run_whose_path_a_list_of_mounts_could_not_hold_is_refused() -> None:
    stage = Stage("seed", Program("megatron_btx.pretrain"), cluster="seed")
    resources = find_resources(ClusterSection.model_validate({"container-image": "image"}), stage)
    for path in ("/a,/etc:/b", "/a:b", "/a,b"):
        with pytest.raises(InputError, match="mounts are told apart by : and ,"):
            render_script(stage, resources, Path(path), FINGERPRINT)


def test_a_log_that_is_gone_or_cut_is_an_empty_one(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert read_end(log, 5) == ""
    os.mkfifo(tmp_path / "pipe")
    assert read_end(tmp_path / "pipe") == ""
    log.write_text("before|after")
    assert (read_end(log, 7), read_end(log, 100)) == ("after", "")
    with log.open("a") as stream:
        stream.write("x" * (5 << 20) + "end")
    assert len(read_end(log, 7)) == 4 << 20 and read_end(log, 7).endswith("end")
