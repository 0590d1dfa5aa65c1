"""examples/slurm: what the batch files start, with a srun that runs one task here, and when a job starts again."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[3]
FILES = sorted((HERE / "examples" / "slurm").glob("*.sbatch"))
SRUN = """#!/usr/bin/env bash
# One task of the step, here; the image's copy of the launchers is this checkout's.
printf '%s\\n' "$@" >srun.words
while [[ "$1" == --* ]]; do shift; done
export SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_NTASKS=8 SLURM_STEP_TASKS_PER_NODE=8
mkdir -p "$RUN"
[ -z "${REACHES:-}" ] || echo "$REACHES" >"$RUN/latest_checkpointed_iteration.txt"
"${@//\\/opt\\/megatron-btx/$CHECKOUT}" >program.words || exit
exit "${LEAVES:-0}"
"""
SQUEUE = """#!/usr/bin/env bash
# The controller is away at first. Job 17 is the last task of an array, and has the number of the whole.
env | grep -E "^(SQUEUE|SBATCH|SCONTROL|SRUN)_|^SLURM_(CLUSTERS|LABELIO|STDOUTMODE)" >leaked
echo x >>asked
[ "$(wc -l <asked)" -gt "${AWAY:-0}" ] || exit 1
printf '%s\n' "15 17_0 RUNNING" "16 17_1 RUNNING" "17 17_2 ${STATE:-RUNNING}"
"""
TELLER = f"""#!{sys.executable}
import sys
if sys.argv[1:2] == ["-m"]:
    print(*sys.argv[1:], sep="\\n")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as the files expect it, with Slurm's commands and an interpreter that only tell."""
    (tmp_path / "bin").mkdir()
    programs = {"srun": SRUN, "teller": TELLER, "scontrol": '#!/bin/sh\necho "$@" >scontrol.words\n'}
    programs["squeue"] = SQUEUE
    programs["sleep"] = "#!/bin/sh\n"
    for name, text in programs.items():
        program = tmp_path / "bin" / name
        program.write_text(text)
        program.chmod(0o755)
    for name in ("seed", "mix"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    return tmp_path


def submit(file: Path, folder: Path, **variables: str) -> int:
    """Run a batch file as Slurm would, and return its status."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    given = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(folder / "bin" / "teller"),
        "CHECKOUT": str(HERE),
        "BTX": str(HERE),
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(folder),
    }
    done = subprocess.run(
        ["bash", str(file)], cwd=folder, env=clean | given | variables, capture_output=True, text=True, check=False
    )
    assert "error" not in done.stderr, done.stderr
    return done.returncode


def value(folder: Path, flag: str) -> str:
    words = (folder / "program.words").read_text().splitlines()
    return words[words.index(flag) + 1]


def test_there_are_plain_files_and_files_for_containers() -> None:
    names = [file.name for file in FILES]
    assert names == ["experts-container.sbatch", "experts.sbatch", "mixture-container.sbatch", "mixture.sbatch"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_started(file: Path, folder: Path) -> None:
    exported = {"RUN": "mine", "DATA": "mine"} if file.name.startswith("experts") else {}
    assert submit(file, folder, SLURM_ARRAY_TASK_ID="1", **exported) == 0
    program = (folder / "program.words").read_text().splitlines()
    assert program[:2] == ["-m", "megatron_btx.pretrain"]
    assert program[-3:] == ["--exit-signal-handler", "--btx-keep-last", "3"]
    if file.name.startswith("experts"):
        assert (value(folder, "--train-iters"), value(folder, "--save")) == ("50000", "checkpoints/code")
        assert "data/code_text_document" in program
    else:
        assert (value(folder, "--train-iters"), value(folder, "--num-experts")) == ("19000", "4")
        assert value(folder, "--expert-model-parallel-size") == "4"
    started = (folder / "srun.words").read_text()
    assert ("--container-image=" in started) == ("container" in file.name)
    if "container" in file.name:
        assert f"--container-mounts={folder}:{folder}\n" in started


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
@pytest.mark.parametrize(
    ("reaches", "leaves", "state", "again"),
    [
        ("40", "0", "RUNNING", True),
        ("40", "137", "RUNNING", True),
        ("", "1", "RUNNING", False),
        ("100", "0", "RUNNING", False),
        ("40", "0", "COMPLETING", False),
    ],
    ids=["interrupted", "killed", "no-step", "finished", "cancelled"],
)
def test_a_job_that_got_further_starts_again(
    file: Path, reaches: str, leaves: str, state: str, again: bool, folder: Path
) -> None:
    """One that made no step would fail for ever, one that has all its steps is done, and a cancelled one stays so."""
    assert submit(file, folder, RUN="run", STEPS="100", REACHES=reaches, LEAVES=leaves, STATE=state) == int(leaves)
    asked = folder / "scontrol.words"
    assert asked.exists() == again
    if again:
        assert asked.read_text() == "requeue 17_2\n"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_slurm_is_asked_for_minutes_and_as_the_file_wants(file: Path, folder: Path) -> None:
    """Whatever a caller has exported for Slurm's commands."""
    exported = {"SQUEUE_STATES": "COMPLETED", "SBATCH_X": "1", "SRUN_EXPORT_ENV": "NONE", "SLURM_LABELIO": "1"}
    exported |= {"SCONTROL_ALL": "1", "SLURM_CLUSTERS": "other", "SLURM_STDOUTMODE": "/dev/null"}
    assert submit(file, folder, RUN="run", STEPS="100", REACHES="40", AWAY="3", **exported) == 0
    assert (folder / "scontrol.words").read_text() == "requeue 17_2\n"
    assert (folder / "leaked").read_text() == ""
    assert "--export=ALL" in (folder / "srun.words").read_text().splitlines()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_two_jobs_do_not_train_into_one_folder(file: Path, folder: Path) -> None:
    run = folder / "checkpoints" / ("math" if file.name.startswith("experts") else "btx")
    run.mkdir()
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(AssertionError, match="another job trains here"):
            submit(file, folder)
    assert not (folder / "srun.words").exists()
    assert submit(file, folder) == 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_that_is_no_job_starts_nothing(file: Path, folder: Path) -> None:
    assert submit(file, folder, SLURM_JOB_ID="") != 0
    assert not (folder / "srun.words").exists()


@pytest.mark.parametrize("file", [file for file in FILES if "container" in file.name], ids=lambda file: file.name)
def test_a_folder_that_a_list_of_mounts_could_not_hold_is_refused(file: Path, folder: Path) -> None:
    there = folder / "a,b"
    there.mkdir()
    (there / "bin").symlink_to(folder / "bin")
    with pytest.raises(AssertionError, match="error: .*a,b: expected a folder without : and ,"):
        submit(file, there)
    assert not (there / "srun.words").exists()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_slurm_is_asked_for_a_signal_and_a_task_per_gpu(file: Path) -> None:
    asked = [line.removeprefix("#SBATCH ") for line in file.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"--ntasks-per-node=8", "--gpus-per-node=8", "--signal=TERM@120", "--requeue"} <= set(asked)
