"""The launchers: which process they start from where, and both at pico size through the real Megatron."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from megatron_btx.common.routing_methods import METHODS, Balancing
from megatron_btx.distributed.launcher import find_place
from tests.support import pico
from tests.support.mixing import mix
from tests.support.runner import REPOSITORY, Zygote, read_losses
from tests.support.zygote import free_port

EXPERT = str(REPOSITORY / "examples" / "train_expert.sh")
FINETUNE = str(REPOSITORY / "examples" / "btx_finetune.sh")

SCRIPTS = sorted(
    str(file.relative_to(REPOSITORY))
    for folder in ("benchmarks", "examples", "tests", "tools")
    for file in (REPOSITORY / folder).glob("*.sh")
)

PICO = {
    "LAYERS": str(pico.LAYERS),
    "HIDDEN": "32",
    "FFN": "48",
    "HEADS": "4",
    "KV_GROUPS": "2",
    "SEQ_LENGTH": "32",
    "PADDED_VOCAB": str(pico.PADDED_VOCABULARY),
    "VOCAB": str(pico.VOCABULARY),
    "TOKENIZER_TYPE": "NullTokenizer",
    "PRECISION": "fp32",
    "TP": "1",
    "GLOBAL_BATCH": "4",
    "STEPS": "4",
    "SAVE_INTERVAL": "4",
    "LOG_INTERVAL": "1",
    "WARMUP": "1",
    "LR": "1e-2",
    "NPROC": "1",
}
"""The launchers' variables for the pico model."""

OUTSIDE = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CUDA_VISIBLE_DEVICES", "PYTHON", "OMP_NUM_THREADS")


def environment(**variables: str | Path) -> dict[str, str]:
    """The variables of a launcher, on the CPU, without what the tests' own surroundings would say."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OUTSIDE)}
    return clean | {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"} | {n: str(v) for n, v in variables.items()}


# --- what is started, seen by an interpreter that only tells ----------------------------------------------------


@pytest.fixture
def teller(tmp_path: Path) -> Path:
    """An "interpreter" that prints its arguments and its place among the ranks."""
    script = tmp_path / "teller"
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
    tell = f"json.dumps([sys.argv[1:], {{n: os.environ[n] for n in {names} if n in os.environ}}])"
    script.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint({tell})\n")
    script.chmod(0o755)
    return script


def told(launcher: str, teller: Path, *arguments: str, **variables: str) -> tuple[list[str], dict[str, str]]:
    """The command a launcher ends in, and the rank it gives; by hand the same job is checked before."""
    given = {"PYTHON": teller, "DATA": "a", "START": teller, "RUN": "run", "TOKENIZER_MODEL": "t"} | variables
    done = subprocess.run(
        ["bash", launcher, *arguments], env=environment(**given), capture_output=True, text=True, check=True
    )
    *before, (command, rank) = map(json.loads, done.stdout.splitlines())
    if "torch.distributed.run" in command:
        start = command.index("megatron_btx.pretrain")
        processes = int(given.get("NNODES", "1")) * int(command[command.index("--nproc-per-node") + 1])
        [(checked, place)] = before
        assert checked == ["-m", "megatron_btx.pretrain", "--btx-check", *command[start + 1 :]]
        assert (place["WORLD_SIZE"], place["RANK"], place["LOCAL_RANK"]) == (str(processes), "0", "0")
    else:
        assert not before
    return command, rank


SRUN = {
    "SLURM_PROCID": "13",
    "SLURM_LOCALID": "5",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_JOB_ID": "30007",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-008]-ib,login",
}


def test_by_hand_it_starts_torchrun(teller):
    """One process per GPU on this machine, or a part of several machines."""
    command, rank = told(EXPERT, teller, "--lr", "3e-4", NPROC="8")
    assert command[:7] == "-m torch.distributed.run --nproc-per-node 8 --standalone -m megatron_btx.pretrain".split()
    assert command[-2:] == ["--lr", "3e-4"] and command.count("--lr") == 2 and not rank
    for devices, processes in (("2,3", "2"), ("2,3,", "2"), ("-1", "1"), ("", "1")):
        assert told(EXPERT, teller, CUDA_VISIBLE_DEVICES=devices)[0][3] == processes
    # The shell of a batch script has SLURM_PROCID, but belongs to no step.
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}
    command, _ = told(FINETUNE, teller, **variables)
    nodes = "--nproc-per-node 1 --nnodes 2 --node-rank 1 --master-addr first --master-port 29500"
    assert command[: len(nodes.split()) + 2] == ["-m", "torch.distributed.run", *nodes.split()]
    assert told(FINETUNE, teller, "--moe-router-topk", "3")[0][-2:] == ["--moe-router-topk", "3"]


@pytest.mark.parametrize("changed", [{}, {"CUDA_VISIBLE_DEVICES": "5"}, {"SLURM_JOB_ID": "", "SLURM_STEP_ID": ""}])
def test_under_srun_it_is_its_rank(changed, teller):
    """The program finds its place in Slurm's variables itself."""
    command, rank = told(FINETUNE, teller, **SRUN | changed)
    assert command[:2] == ["-m", "megatron_btx.pretrain"] and not rank
    place = find_place(SRUN | changed)
    assert (place.rank, place.world, place.local_world, place.address) == (13, 16, 8, "gpu007-ib")


@pytest.mark.parametrize("rank", ["2", "-1", "x", "09"])
def test_a_node_that_is_none_is_refused(rank, teller):
    """Before torchrun waits for it."""
    given = {"PYTHON": teller, "DATA": "a", "START": teller, "RUN": "run", "TOKENIZER_MODEL": "t"}
    given |= {"NNODES": "2", "MASTER_ADDR": "first", "NODE_RANK": rank}
    done = subprocess.run(["bash", EXPERT], env=environment(**given), capture_output=True, text=True)
    assert done.returncode == 2 and "torch.distributed.run" not in done.stdout
    assert done.stderr == f"error: NODE_RANK={rank}: expected a whole number below NNODES=2\n"


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_routing_methods(method, teller):
    """Each is that of the table; those without load balancing in the paper have none unless it is asked for."""
    words = []
    for flag, value in method.flags(experts=4).items():
        words += [f"--{flag}", str(value)] if value is not True else [f"--{flag}"]
    balanced = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --btx-load-balancing".split()
    balancing = {kind: [*balanced, kind] for kind in ("megatron", "paper")}
    balancing["none"] = ["--moe-router-load-balancing-type", "none"]
    default = "megatron" if method.is_balanced else "none"
    for given, kind in (({}, default), *(({"BALANCING": kind}, kind) for kind in get_args(Balancing))):
        command = told(FINETUNE, teller, ROUTING=method.name, **given)[0]
        start = command.index("--moe-router-topk")
        expected = [*words, *balancing[kind]]
        assert command[start : start + len(expected)] == expected


def test_words_of_routing_keep_what_was_given(teller):
    """A capacity as it was written; empty values count as not given."""
    command = " ".join(told(FINETUNE, teller, ROUTING="switch", CAPACITY="2", TOPK="", AUX_LOSS="0.10")[0])
    assert "--moe-expert-capacity-factor 2 " in command and "--moe-aux-loss-coeff 0.10 " in command
    assert "--moe-router-topk 3 " in " ".join(told(FINETUNE, teller, TOPK="3")[0])


def test_watching_and_freezing(teller):
    """Lists of words are passed on as such."""
    variables = {"FREEZE": "experts norms", "VALID_DOMAINS": "math=m code=c", "EXPERT_LOSSES": "experts.json"}
    command = " ".join(told(FINETUNE, teller, **variables)[0])
    for words in (
        "--btx-freeze experts norms",
        "--btx-valid-data math=m code=c",
        "--btx-first-loss-bound experts.json",
    ):
        assert words in command
    assert "--btx-freeze" not in " ".join(told(FINETUNE, teller)[0])


@pytest.mark.parametrize("launcher", [EXPERT, FINETUNE], ids=["expert", "finetune"])
def test_help_is_what_stands_at_the_top(launcher):
    """Of the launcher and of what both share; nothing needs to be given."""
    done = subprocess.run(["bash", launcher, "--help"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    for words in ("STEPS=", "bash examples/", "DISTRIBUTED_OPTIMIZER=1", "NODE_RANK=0", "--btx-check"):
        assert words in done.stdout
    assert "#" not in done.stdout and "set -euo" not in done.stdout


def test_lists_may_stand_on_several_lines(teller):
    """As a person writes a long blend, also in a file of another system; nothing of it is dropped."""
    lists = {"DATA": "0.5 a\n  0.5 b\n", "VALID_DATA": "0.9 c\r\n0.1 d\r\n"}
    lists |= {"FREEZE": "\nexperts\n\nnorms", "VALID_DOMAINS": "math=m\n\tcode=c"}
    command = " ".join(told(FINETUNE, teller, **lists)[0])
    for words in (
        "--train-data-path 0.5 a 0.5 b --pretrained",
        "--valid-data-path 0.9 c 0.1 d --eval-iters",
        "--btx-freeze experts norms --btx-valid-data math=m code=c --num-experts",
    ):
        assert words in command
    four = {f"{domain}_DATA": f"{domain.lower()}\n" for domain in ("MATH", "CODE", "WIKI", "GENERAL")}
    command = " ".join(told(FINETUNE, teller, DATA="", BLEND="1 2\n3\n4", **four)[0])
    assert "--train-data-path 1 math 2 code 3 wiki 4 general --pretrained" in command


@pytest.mark.parametrize(
    ("word", "on"),
    [*((w, True) for w in ("", "1", "true", "Yes", "ON")), *((w, False) for w in "0 no False OFF".split())],
)
def test_yes_and_no(word, on, teller):
    """In the words that people use for them."""
    assert ("--use-distributed-optimizer" in told(EXPERT, teller, DISTRIBUTED_OPTIMIZER=word)[0]) == on


def test_another_tree_on_cdpath_is_not_taken(teller, tmp_path):
    """With CDPATH, cd looks for a relative folder elsewhere first, and prints it."""
    for tree in ("mine", "other"):
        ours = ("btx", f"#!/bin/sh\necho {tree} $*"), ("python", "#!/bin/sh\n")
        for name, text in (("tools/environment.sh", "true"), *((f".venv/bin/{name}", text) for name, text in ours)):
            file = tmp_path / tree / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            file.chmod(0o755)
        shutil.copytree(REPOSITORY / "examples", tmp_path / tree / "examples")
    teller.write_text(f"#!{sys.executable}\nimport os\nprint(os.environ['PYTHONPATH'])\n")
    given = {"PYTHON": teller, "DATA": "a", "START": teller, "RUN": "run", "TOKENIZER_MODEL": "t"}
    variables = environment(**given, CDPATH=tmp_path / "other")
    for script, said in (
        ("train_expert", tmp_path / "mine"),
        ("quickstart", "mine run examples/recipes/quickstart.yaml"),
    ):
        command = ["bash", f"examples/{script}.sh"]
        done = subprocess.run(command, cwd=tmp_path / "mine", env=variables, capture_output=True, text=True, check=True)
        assert set(done.stdout.splitlines()) == {str(said)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_is_led_astray_by_cdpath(script):
    """Whoever changes the folder has taken CDPATH out before."""
    text = (REPOSITORY / script).read_text()
    before, changes, _ = text.partition("cd -- ")
    assert not changes or "\nunset CDPATH" in before
    assert 'cd "$(dirname' not in text


def test_an_interpreter_without_torch_is_refused(teller, tmp_path):
    """Many an environment has a PYTHON that means another one."""
    given = {"DATA": "a", "START": teller, "RUN": "run", "TOKENIZER_MODEL": "t"}
    for python in ("false", "/no/where"):
        done = subprocess.run(
            ["bash", EXPERT], env=environment(**given, PYTHON=python), capture_output=True, text=True, cwd=tmp_path
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: PYTHON={python} does not run or has no torch: unset PYTHON")
        assert done.stderr.count("\n") == 1


def test_defaults_are_the_papers_recipe(teller):
    """Batch of 4,194,304 tokens, peak 1e-4 to a tenth of it, 19,000 steps, the paper's mixture of domains."""
    four = {f"{domain}_DATA": domain.lower() for domain in ("MATH", "CODE", "WIKI", "GENERAL")}
    command, _ = told(FINETUNE, teller, DATA="", **four)

    def value(flag: str, words: int = 1) -> list[str]:
        position = command.index(flag) + 1
        return command[position : position + words]

    assert int(*value("--global-batch-size")) * int(*value("--seq-length")) == 4_194_304
    assert float(*value("--min-lr")) == pytest.approx(float(*value("--lr")) / 10) == 1e-5
    assert value("--train-iters") == ["19000"] and value("--moe-router-topk") == ["2"] and "--bf16" in command
    assert value("--train-data-path", 8) == "30.16 math 40.31 code 10.30 wiki 19.23 general".split()


@pytest.mark.parametrize("missing", ["DATA", "START", "RUN", "TOKENIZER_MODEL"])
@pytest.mark.parametrize("launcher", [EXPERT, FINETUNE], ids=["expert", "finetune"])
def test_missing_input_is_refused(launcher, missing, tmp_path):
    """One line that names the variable, exit code 2; of many ranks only the first says it."""
    given = {"DATA": "a", "START": str(tmp_path), "RUN": str(tmp_path / "run"), "TOKENIZER_MODEL": "t"}
    del given[missing]
    for rank, lines in ((0, 1), (1, 0)):
        variables = environment(**given, RANK=str(rank))
        done = subprocess.run(["bash", launcher], env=variables, capture_output=True, text=True)
        assert done.returncode == 2 and not done.stdout
        assert len(done.stderr.splitlines()) == lines
        assert not lines or missing in done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ROUTING": "sofd"}, "ROUTING=sofd: expected top-k, top-k-pre-softmax, switch, soft or sample-top1"),
        ({"BALANCING": "some"}, "BALANCING=some: expected megatron, paper or none"),
        ({"ROUTING": "soft", "TOPK": "2"}, "TOPK=2 with ROUTING=soft, which has its own k"),
        ({"ROUTING": "switch", "TOPK": "1"}, "TOPK=1 with ROUTING=switch"),
        ({"ROUTING": "sample-top1", "TOPK": "1"}, "TOPK=1 with ROUTING=sample-top1"),
        ({"CAPACITY": "1.5"}, "CAPACITY=1.5 with ROUTING=top-k, which drops no token"),
        ({"ROUTING": "sample-top1", "CAPACITY": "2"}, "CAPACITY=2 with ROUTING=sample-top1"),
        ({"BALANCING": "none", "AUX_LOSS": "0.1"}, "AUX_LOSS=0.1 with BALANCING=none"),
        ({"ROUTING": "soft", "AUX_LOSS": "0.1"}, "AUX_LOSS=0.1 with BALANCING=none (the default of ROUTING=soft"),
        *(({"BALANCING": "paper", "AUX_LOSS": loss}, f"AUX_LOSS={loss} with") for loss in ("0", "-1", "0.00", "nan")),
        ({"BLEND": "1 2 3 4"}, "BLEND=1 2 3 4 with DATA"),
        ({"WIKI_DATA": "w"}, "WIKI_DATA=w with DATA"),
        *(
            ({"DATA": "", "BLEND": blend}, f"BLEND={blend}: expected four numbers")
            for blend in ("1 2 3", "1 2 3 4 5", "1 2 3 -4", "1 2 3 nan", "1,2,3,4", "1 2 3 0", "1 2 3 1e")
        ),
        *(
            ({"DATA": "", "BLEND": blend}, f"BLEND={blend}: expected four numbers")
            for blend in ("1e999 1 1 1", "1 inf 1 1", f"{'9' * 400} 1 1 1", "1 1 1 0x10", "1 1 1 ١")
        ),
        ({"DATA": "", "MATH_DATA": "0.5 a 0.5 b"}, "MATH_DATA=0.5 a 0.5 b: expected one prefix; give several as DATA"),
        ({"DATA": " \n "}, "DATA holds no word"),
        ({"DATA": "a --mock-data"}, "DATA: found --mock-data, which is a flag"),
        ({"FREEZE": "--load x"}, "FREEZE: found --load, which is a flag"),
        ({"AUX_LOSS": "nan"}, "AUX_LOSS=nan: expected zero or a number"),
        ({"ROUTING": "switch", "CAPACITY": "nan"}, "CAPACITY=nan: expected a number above zero"),
        *(({"MIN_LR": rate}, f"MIN_LR={rate}: expected zero or a number") for rate in ("nan", "-1", "0x1")),
        ({"MASTER_PORT": "here"}, "MASTER_PORT=here: expected a whole number"),
        ({"LR": "1e-4\n"}, "LR=1e-4 : expected a number"),
        *(({"DISTRIBUTED_OPTIMIZER": word}, f"DISTRIBUTED_OPTIMIZER={word}: expected 1, yes") for word in ("2", "ja")),
        *(({"LR": rate}, f"LR={rate}: expected a number above zero") for rate in ("nan", "high", "0", "1e999")),
        *(
            ({name: size}, f"{name}={size}: expected a whole number above zero")
            for name, size in (
                *(("TP", "abc"), ("PP", "0"), ("EP", "-1"), ("ETP", "1.5"), ("EXPERTS", "four"), ("TOPK", "two")),
                *(("NPROC", "all"), ("NNODES", "0"), ("LAYERS", "08"), ("GLOBAL_BATCH", "1e3"), ("SEQ_LENGTH", "4k")),
            )
        ),
    ],
)
def test_contradictions_are_refused(variables, said, teller):
    """One line, exit code 2, and nothing is started."""
    four = {} if variables.get("DATA", "a") else {f"{name}_DATA": "d" for name in ("MATH", "CODE", "WIKI", "GENERAL")}
    given = {"PYTHON": teller, "DATA": "a", "START": teller, "RUN": "run", "TOKENIZER_MODEL": "t", **four, **variables}
    done = subprocess.run(["bash", FINETUNE], env=environment(**given), capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1


def test_blends_of_any_numbers(teller):
    """Whole, broken, with an exponent."""
    four = {f"{domain}_DATA": domain.lower() for domain in ("MATH", "CODE", "WIKI", "GENERAL")}
    command = " ".join(told(FINETUNE, teller, DATA="", BLEND="1 2.5 .5 1e-3", **four)[0])
    assert "--train-data-path 1 math 2.5 code .5 wiki 1e-3 general" in command


# --- checking without training ----------------------------------------------------------------------------------


def checking(zygote: Zygote, data: Path, log: Path, given: list[str], ranks: int = 1) -> list[str]:
    """The lines that --btx-check says for a pico mixture, all ranks together."""
    run = zygote.run(ranks, [*pico.train(data, 7, moe=True), "--btx-check", *given], log, expect=None)
    assert run.codes == [2 if "error:" in run.text() else 0] * ranks
    return run.text().splitlines()


def test_a_check_says_what_would_be_trained(zygote, corpus, tmp_path):
    """One line of one rank; nothing is written."""
    run = tmp_path / "run"
    words = f"--btx-metrics {run}/metrics --tensorboard-dir {run}/board --save {run} --save-interval 7"
    lines = checking(zygote, corpus, tmp_path / "log", [*words.split(), "--expert-model-parallel-size", "2"], ranks=2)
    (line,) = filter(None, lines)
    assert line == "checked: 2 processes, TP 1 x PP 1 x EP 2 x DP 2, 7 steps of 128 tokens"
    assert not run.exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--btx-freeze nonsense", "--btx-freeze nonsense: "),
        ("--moe-router-topk 9", "--moe-router-topk 9: "),
        ("--train-iters 0", "--train-iters 0: nothing to train"),
        ("--btx-valid-data math=/nowhere", "--btx-valid-data math= /nowhere: "),
        ("--btx-first-loss-bound /nowhere", "--btx-first-loss-bound /nowhere: no checkpoint is loaded"),
        ("--train-data-path /nowhere", "--train-data-path /nowhere: "),
        ("--pretrained-checkpoint /nowhere", "/nowhere"),
        ("--eval-iters 3", "--eval-iters 3: there is no validation data"),
        ("--lr high", "argument --lr: invalid float value: 'high'"),
        ("--moe-router-group-topk 3", "Megatron refuses these arguments: "),  # not by an assertion
    ],
)
def test_a_check_refuses_in_one_line(given, said, zygote, corpus, tmp_path):
    """Whatever the training program would refuse on every rank."""
    (line,) = checking(zygote, corpus, tmp_path / "log", given.split())
    assert line.startswith(f"error: {said}")


def test_the_launchers_check_before_torchrun(dense, corpus, tmp_path):
    """All that is shown is one line; asked for the check alone, they start nothing, however many machines it is for."""
    common = {**PICO, "START": dense, "DATA": corpus, "RUN": tmp_path / "run", "DATA_CACHE": tmp_path / "cache"}
    asked = {
        FINETUNE: {"NPROC": "3", "EXPERTS": "4", "EP": "3", "GLOBAL_BATCH": "3"},
        EXPERT: {"NPROC": "2", "NNODES": "2"},
    }
    started = [
        subprocess.Popen(
            ["bash", launcher, *(["--btx-check"] if launcher == EXPERT else [])],
            env=environment(**common | variables, PYTHONWARNINGS="default"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for launcher, variables in asked.items()
    ]
    refused, checked = ((*process.communicate(timeout=200), process.returncode) for process in started)
    expected = (
        "error: Megatron refuses these arguments: Number of experts should be a multiple of expert model parallel"
    )
    assert refused[0] == "" and refused[1].startswith(expected) and refused[1].count("\n") == 1 and refused[2] == 2
    assert checked == ("checked: 4 processes, TP 1 x PP 1 x EP 1 x DP 4, 4 steps of 128 tokens\n", "", 0)
    assert not (tmp_path / "run").exists()


# --- the real thing ---------------------------------------------------------------------------------------------


def start(command: list[str], log: Path, variables: dict[str, str]) -> subprocess.Popen:
    """Start a command with its output in a file, in a session of its own so that all of it can be ended."""
    with log.open("w") as output:
        return subprocess.Popen(command, env=variables, stdout=output, stderr=output, start_new_session=True)


def finish(processes: dict[Path, subprocess.Popen], timeout_seconds: float = 200) -> None:
    """Wait for all; show the end of the log of the first that failed, and leave nothing running."""
    try:
        for log, process in processes.items():
            code = process.wait(timeout=timeout_seconds)
            assert code == 0, f"exit code {code}\n{log.read_text()[-6000:]}"
    finally:
        for process in processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # torchrun passes it on to its workers
                process.wait(timeout=60)


def torchrun(python: Path, processes: int, launcher: str) -> list[str]:
    """A launcher under torchrun."""
    program = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*program, "--no-python", launcher]


def test_from_seed_to_finetuned_mixture(dense, corpus, warm_python, tmp_path):
    """An expert by hand, its mixture with another under srun, and that run resumed under torchrun."""
    common = {**PICO, "PYTHON": warm_python, "START": dense, "DATA": corpus, "DATA_CACHE": corpus.parent / "cache"}
    log = tmp_path / "hand.log"
    finish({log: start(["bash", EXPERT, "--seed", "1"], log, environment(**common, RUN=tmp_path / "hand"))})
    assert len(read_losses(tmp_path / "hand" / "metrics.jsonl")) == 4
    experts = {"hand": tmp_path / "hand", "older": dense / "iter_0000005"}

    run = tmp_path / "btx"
    common |= {"START": mix(experts, tmp_path / "mix"), "RUN": run, "EXPERTS": "2", "EP": "2"}
    port, started = str(free_port()), {}
    for rank in range(2):
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": 2, "SLURM_STEP_TASKS_PER_NODE": 2}
        place |= {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port}
        log = tmp_path / f"srun.{rank}.log"
        # A schedule for twice the steps, of which the second half follows after the restart.
        started[log] = start(
            ["bash", FINETUNE, "--exit-interval", "4"], log, environment(**common | place | {"STEPS": "8"})
        )
    finish(started)
    first = read_losses(run / "metrics.jsonl")
    assert sorted(first) == [1, 2, 3, 4]

    (run / "metrics.jsonl").rename(run / "first.jsonl")
    log = tmp_path / "resumed.log"
    finish({log: start(torchrun(warm_python, 2, FINETUNE), log, environment(**common | {"STEPS": "8"}))})
    second = read_losses(run / "metrics.jsonl")
    assert sorted(second) == [5, 6, 7, 8], "it must go on from its own checkpoint, not from the mixture"
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert second[8] < first[1], "a finetuned mixture that gets worse is not trained"
