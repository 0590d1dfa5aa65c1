"""One conversion by several processes and threads: the same bytes as by one, and one line where one of them fails.

Run as an entry of the zygote, this module is the converter with one thing wrong on one rank; see :func:`main`.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mixing import mix, rewrite
from tests.support.runner import REPOSITORY
from tests.support.srun import become_task
from tests.unit.mixing.checkpoints import expert_words
from tests.unit.mixing.folders import llama_folder

CLI = "megatron_btx.mixing.cli"
WRONG = "tests.distributed.test_convert_ranks"
LAST = "BTX_TEST_WRONG"


def main() -> int:
    """The converter's main, with what the environment asks for: on the last rank alone, or srun's variables on all."""
    from megatron_btx.mixing.cli import main as honest
    from megatron_btx.mixing.staging import Workplace

    wrong, is_last = os.environ.get(LAST), int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    if "SLURM_JOB_ID" in os.environ:
        become_task()
    write, left = Workplace.write, [10]

    def failing(self: Workplace, file: str, position: int, content: bytes) -> None:
        left[0] -= 1
        if left[0] == 0 and wrong == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if left[0] == 0 and wrong == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, file, position, content)

    words = sys.argv[1:]
    if is_last and wrong == "missing":
        words = ["--expert=gone=/no/where", *words]
    if is_last and wrong in ("killed", "full"):
        Workplace.write = failing  # type: ignore[method-assign]
    return honest(words)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a result, the manifest with all its hashes among them."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def models(dense, tmp_path_factory) -> dict[str, dict[str, Path]]:
    """Experts of both kinds."""
    folder = tmp_path_factory.mktemp("models")
    other = rewrite(dense, folder / "other", lambda key, tensor: tensor * 1.25)
    return {
        "megatron": {"math": dense / "iter_0000005", "code": dense, "wiki": other},
        "hf": {name: llama_folder(folder / name, seed) for seed, name in enumerate("abc")},
    }


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What one process with one thread writes."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        kind: contents(mix(experts, folder / kind, "--workers", "1", "--output-format", kind))
        for kind, experts in models.items()
    }


@pytest.mark.parametrize("kind", ["megatron", "hf"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_processes(kind, world, models, alone, zygote, tmp_path):
    words = [*expert_words(models[kind]), "--output-format", kind, "--verify", "--output", str(tmp_path / "out")]
    run = zygote.run(world, words, tmp_path / "logs" / "log", entry=CLI)
    assert contents(tmp_path / "out") == alone[kind]
    assert sorted(os.listdir(tmp_path)) == ["logs", "out"]
    assert run.text().count("wrote ") == 1 and run.text().count("verified: all") == 1


@pytest.mark.parametrize("kind", ["megatron", "hf"])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_threads(kind, workers, models, alone, tmp_path):
    out = mix(models[kind], tmp_path / "out", "--workers", str(workers), "--output-format", kind)
    assert contents(out) == alone[kind]


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_that_is_killed(world, models, alone, zygote, tmp_path):
    """The others end with one line; what they wrote stays, and the same command, on fewer processes, goes on."""
    words = [*expert_words(models["megatron"]), "--output", str(tmp_path / "out")]
    run = zygote.start(world, words, tmp_path / "logs" / "log", entry=WRONG, environment={LAST: "killed"})
    zygote.wait(run, expect=None)
    assert run.codes == [1] * (world - 1) + [-signal.SIGKILL]
    lines = [line for line in run.text().splitlines() if "error: " in line]
    assert len(lines) == world - 1 and all(f"another of the {world} processes ended early" in line for line in lines)
    assert "Traceback" not in run.text()
    assert not (tmp_path / "out").exists()
    journal = (tmp_path / ".out.incomplete" / "journal" / "0").read_text().split("\n")
    assert len(journal) > 5, "the first rank's share is noted"
    zygote.run(world - 1, words, tmp_path / "logs" / "again", entry=CLI)
    assert contents(tmp_path / "out") == alone["megatron"]
    assert sorted(os.listdir(tmp_path)) == ["logs", "out"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("full", ["No space left on device", "MiB are needed"]), ("missing", ["/no/where", "no such folder"])],
)
def test_what_one_rank_alone_meets(wrong, said, models, zygote, tmp_path):
    """A full disk or a missing folder on one node: every rank says so in one line, at once, and nothing is left."""
    words = [*expert_words(models["megatron"]), "--output", str(tmp_path / "out")]
    run = zygote.start(3, words, tmp_path / "logs" / "log", entry=WRONG, environment={LAST: wrong})
    zygote.wait(run, expect=None)
    assert run.codes == [2, 2, 2]
    for rank in range(3):
        text = Path(f"{run.log}.{rank}").read_text()
        (line,) = [line for line in text.splitlines() if "error: " in line]
        assert line.startswith("error: " if rank == 0 else f"rank {rank}: error: ")
        assert all(part in line for part in said) and "Traceback" not in text
    assert sorted(os.listdir(tmp_path)) == ["logs"]


def test_a_file_that_cannot_grow(models, zygote, tmp_path):
    """What stops the first rank, which makes the files, stops all."""
    words = [*expert_words(models["megatron"]), "--output", str(tmp_path / "out")]
    run = zygote.start(2, words, tmp_path / "logs" / "log", entry=CLI, file_size_limit_bytes=50_000)
    zygote.wait(run, expect=None)
    assert run.codes == [2, 2] and run.text().count("File too large") == 2
    assert sorted(os.listdir(tmp_path)) == ["logs"]


# --- Slurm, imitated by its variables ------------------------------------------------------------------------------


def slurm(nodes: str) -> dict[str, str]:
    """The variables of a Slurm step but for rank and size; its processes meet at a port that is free."""
    job = 50_000 + os.getpid() % 10_000
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20_000 + job * 64 % 12_000)) != 0:
                return {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": nodes}
        job += 1


@pytest.mark.parametrize("world", [1, 2])
def test_under_srun(world, models, alone, zygote, tmp_path):
    """srun is imitated by the variables it sets: rank, size, job and nodes, the first of which is the meeting place."""
    words = [*expert_words(models["megatron"]), "--output", str(tmp_path / "out")]
    environment = slurm("localhost,node008")
    zygote.run(world, words, tmp_path / "logs" / "log", entry=WRONG, environment=environment)
    assert contents(tmp_path / "out") == alone["megatron"]


def test_under_srun_with_nodes_of_an_unknown_form(models, zygote, tmp_path):
    """One line with the way out; where MASTER_ADDR is given, the nodes are not asked."""
    words = [*expert_words(models["megatron"]), "--output", str(tmp_path / "out")]
    run = zygote.start(2, words, tmp_path / "logs" / "log", entry=WRONG, environment=slurm("node[7"))
    zygote.wait(run, expect=None)
    assert run.codes == [2, 2] and "Slurm's list of nodes node[7" in run.text() and "MASTER_ADDR" in run.text()
    assert "Traceback" not in run.text()
    zygote.run(2, words, tmp_path / "logs" / "given", entry=CLI, environment={"SLURM_STEP_NODELIST": "node[7"})
    assert (tmp_path / "out").is_dir()


def test_torchrun_itself(models, alone, tmp_path):
    """The script under tools/, started by torchrun in two processes of their own."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(REPOSITORY / "tools" / "convert_experts.py"), *expert_words(models["megatron"])]
    run = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr
    assert contents(tmp_path / "out") == alone["megatron"]
    shutil.rmtree(tmp_path / "out")
    run = subprocess.run(
        [*command, "--weight=nobody=1", "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode != 0 and "error: --weight names the expert 'nobody'" in run.stderr
    assert sorted(os.listdir(tmp_path)) == []
