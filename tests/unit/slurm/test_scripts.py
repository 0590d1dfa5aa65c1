"""The batch scripts of a recipe's stages: golden files, hostile values, and what a job writes without any Slurm."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from megatron_btx.common.errors import InputError
from megatron_btx.plan.fingerprint import Identity, identities
from megatron_btx.plan.planner import plan_stages
from megatron_btx.plan.stage import Program, Stage
from megatron_btx.recipe.cluster import ClusterSection, seconds_of
from megatron_btx.recipe.load import load_recipe
from megatron_btx.report.status import print_status
from megatron_btx.runner import slurm_queue as queue
from megatron_btx.runner.schemas import StageRecord
from megatron_btx.runner.slurm_queue import Job, list_jobs
from megatron_btx.runner.stage_run import read_record, write_record
from megatron_btx.runner.tables import read_shown_manifest
from megatron_btx.slurm import job, submission
from megatron_btx.slurm.resources import find_resources
from megatron_btx.slurm.script import DONE_BEFORE, GIVEN_UP, INTERRUPTED, render_script
from megatron_btx.slurm.status import view_jobs

GOLDEN = Path(__file__).with_name("golden")
RECIPE = Path(__file__).parents[2] / "slurm" / "recipe.yaml"
EXAMPLES = Path(__file__).parents[3] / "examples" / "recipes"
RUN = Path("/runs/example")
FINGERPRINT = "0123456789abcdef" * 4
STEP_ENDS = "slurmstepd: error: *** STEP 1.0 ON n1 CANCELLED AT 2026-11-26T10:00:00"
CLUSTER = """{
    account: science, partition: gpu, qos: long, constraint: a100&nvlink, time: '1-12:00:00',
    tasks-per-node: 2, python: /opt/btx/bin/python, environment: {NCCL_DEBUG: WARN, NOTE: "it's $(here)"},
    cpu: {partition: cpu, time: '2:00:00'},
    experts: {partition: spare, signal-seconds: 120, retries: 5},
    finetune: {nodes: 2, exclusive: true, container-image: "docker://nvcr.io#btx/btx:1",
               container-mounts: ["/data:/data:ro"], data-cache: /fast/cache}}"""


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds what the recipe names."""
    for name in ("general.jsonl", "math.jsonl", "tokenizer.model"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scripts(*changes: str) -> dict[str, str]:
    """Stage -> its script, of the recipe with changes."""
    recipe = load_recipe(RECIPE, list(changes))
    found = {}
    for stage in plan_stages(recipe):
        resources = find_resources(recipe.cluster, stage, recipe.data.workers)
        found[stage.name] = render_script(stage, resources, RUN, FINGERPRINT)
    return found


@pytest.mark.parametrize("stage", ["data", "expert-math", "mix", "finetune", "report"])
def test_scripts_are_those_of_the_golden_files(stage: str, inputs: Path) -> None:
    """To renew them after a wanted change: BTX_WRITE_GOLDEN=1, and read the difference."""
    script = scripts(f"cluster={CLUSTER}")[stage].replace(str(inputs), "/inputs")
    golden = GOLDEN / f"{stage}.sh"
    if os.environ.get("BTX_WRITE_GOLDEN"):
        golden.write_text(script)
    assert script == golden.read_text()


def test_the_example_for_a_cluster_is_one() -> None:
    """Its models are nowhere, so the section alone is read."""
    tree = yaml.safe_load((EXAMPLES / "four-models-slurm.yaml").read_text())
    section = ClusterSection.model_validate(tree["cluster"])
    processes = tree["finetune"]["layout"]["processes"]
    program = Program("megatron_btx.pretrain")
    stage = Stage("finetune", program, processes=processes, on_gpu=True, resumable=True, cluster="finetune")
    found = find_resources(section, stage)
    assert (found.nodes, found.tasks_per_node, found.gpus_per_node, found.asked.signal_seconds) == (4, 8, 8, 300)


def test_scripts_are_sound_shell(inputs: Path) -> None:
    for name, script in scripts(f"cluster={CLUSTER}").items():
        (inputs / f"{name}.sh").write_text(script)
        subprocess.run(["bash", "-n", inputs / f"{name}.sh"], check=True)


def test_a_stage_that_makes_data_is_one_task_with_a_core_for_each_worker(inputs: Path) -> None:
    """It starts its workers itself: several tasks would each write every dataset."""
    lines = scripts("data.workers=4")["data"].splitlines()
    assert "#SBATCH --ntasks-per-node=1" in lines and "#SBATCH --cpus-per-task=4" in lines
    assert any(" --ntasks=1 --ntasks-per-node=1 --cpus-per-task=4 " in line for line in lines)


def test_every_kind_of_stage_has_a_section(inputs: Path) -> None:
    changes = ["export=true", "baselines={average: true, dense: {}}"]
    kinds = {stage.name: stage.cluster or stage.kind for stage in plan_stages(load_recipe(RECIPE, changes))}
    assert kinds == {
        "data": "data",
        "seed": "seed",
        "expert-math": "experts",
        "average": "mix",
        "mix": "mix",
        "evaluate-experts": "evaluate",
        "finetune": "finetune",
        "export": "export",
        "dense-domains": "dense",
        "dense": "dense",
        "evaluate-dense": "evaluate",
        "evaluate-moe": "evaluate",
        "report": "report",
    }


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ("cluster.acct=x", "cluster.acct: unknown key; did you mean account"),
        ("cluster.experts.partitions=x", "cluster.experts.partitions: unknown key; did you mean partition"),
        ('cluster.account="a\\n#SBATCH --uid=0"', "cluster.account: found"),
        ("cluster.account='$(id)'", "cluster.account: found"),
        ("cluster.account=-Aother", "cluster.account: found"),
        ("cluster.partition='a b'", "cluster.partition: found"),
        ('cluster.constraint="a\\nb"', "cluster.constraint: found"),
        ("cluster.constraint='`id`'", "cluster.constraint: found"),
        ("cluster.time='1 hour'", "cluster.time: found"),
        ("cluster.time=10", "cluster.time: found 10, expected a text: put it in quotes"),
        ("cluster.time='1:30'", "cluster.time: found '1:30', expected minutes, HH:MM:SS"),  # to Slurm 90 seconds
        ("cluster.time='0'", "above 0"),  # to Slurm no limit
        ("cluster.time='0:00:00'", "above 0"),
        ("cluster.time='0-0'", "above 0"),
        ("cluster.time='٣٠'", "cluster.time: found"),
        ("cluster.time='1-٣:00:00'", "cluster.time: found"),
        ("cluster.time='99999999999'", "cluster.time: found"),  # to Slurm a limit that is INVALID
        ("cluster.memory='64G #'", "cluster.memory: found"),
        ("cluster.memory='64'", "with its unit, as 64G"),  # to Slurm 64 megabytes
        ("cluster.memory='６４G'", "cluster.memory: found"),
        ("cluster.memory='99999999999999999999G'", "cluster.memory: found"),
        ("cluster.nodes=0", "cluster.nodes: found 0"),
        ("cluster.signal-seconds=1", "cluster.signal-seconds: found 1"),
        ('cluster.container-image="a\\nb"', "cluster.container-image: found"),
        ("cluster.container-image=--privileged", "cluster.container-image: found"),
        ('cluster.container-mounts=["/a:/a", "-x"]', "cluster.container-mounts"),
        ('cluster.environment={A: "b\\nc"}', "cluster.environment.A: found"),
        ("cluster.environment={'A;id': b}", "cluster.environment.A;id: not the name"),
        ("cluster.environment={NCCL_IB_DISABLE: 1}", "found 1, expected a text: put it in quotes"),
        ("cluster.container-image='docker://me:word@host#btx'", "holds no password"),
        ("cluster.container-mounts=['https://me:word@host/a:/a']", "holds no password"),
        ("cluster.environment={WANDB_API_KEY: x}", "cluster.environment.WANDB_API_KEY: may be a secret"),
        ("cluster.experts.environment={HF_TOKEN: x}", "cluster.experts.environment.HF_TOKEN: may be a secret"),
    ],
)
def test_what_could_be_another_option_is_refused(change: str, refused: str, inputs: Path) -> None:
    with pytest.raises(InputError, match=re.escape(refused)):
        load_recipe(RECIPE, [change])


def refused_variables(names: str, value: str = "x") -> dict[str, str]:
    """Variable -> why a recipe may not give it."""
    found = {}
    for name in names.split():
        try:
            ClusterSection.model_validate({"environment": {name: value}})
        except ValidationError as error:
            found[name] = str(error)
    return found


def test_a_home_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands between quotes in a script, where a shell leaves it."""
    monkeypatch.setenv("HOME", "/home/me")
    section = ClusterSection.model_validate(
        {"python": "~/v/python", "data-cache": "~/c", "container-mounts": ["~/d:/d"]}
    )
    assert (section.python, section.data_cache) == ("/home/me/v/python", "/home/me/c")
    assert section.container_mounts == ["/home/me/d:/d"]
    with pytest.raises(ValidationError, match="~ of nobody"):
        ClusterSection.model_validate({"python": "~no-such-user/python"})


def test_variables_by_which_a_job_is_known_are_refused() -> None:
    """With another job's number a step would run in that job's nodes, and requeue it."""
    names = """SLURM_JOB_ID SLURM_JOBID SLURM_STEP_ID SLURM_CONF SLURM_CLUSTERS SLURM_NTASKS SLURMD_NODENAME
        SLURM_EXPORT_ENV SBATCH_PARTITION SQUEUE_STATES SCANCEL_STATE SCONTROL_ALL SALLOC_QOS SRUN_CPUS_PER_TASK
        python IFS BTX_STAGE BTX_PYTHON BTX_ANYTHING"""
    found = refused_variables(names)
    assert sorted(found) == sorted(names.split())
    assert all("a variable of Slurm or of the scripts" in why for why in found.values())
    assert refused_variables("NCCL_DEBUG GLOO_SOCKET_IFNAME PATH LD_PRELOAD MY_SLURM_NOTE ENROOT_CACHE_PATH") == {}


def test_variables_that_may_be_secrets_are_refused() -> None:
    names = """SSHPASS DB_PWD PGPASS PGPASSWORD HF_AUTH OPENAI_PAT GH_PAT HF_TOKEN HF_TOKEN2 AWS_SECRET_ACCESS_KEY
        WANDB_API_KEY APIKEY MYSQL_PWD REDIS_PASS SMTP_PASS1 GPG_PASSPHRASE AZURE_SAS SESSION_COOKIE SLACK_JWT GCP_CREDS
        GOOGLE_APPLICATION_CREDENTIALS hf_auth db_pwd CURL_USERPWD CARD_PIN AUTHORIZATION
        HTTP_AUTHORIZATION DB_PW SESSION SESSION_ID PHPSESSID GH_TOK COOKIES MY_BEARER"""
    found = refused_variables(names)
    assert sorted(found) == sorted(names.split())
    assert all("may be a secret" in why for why in found.values())
    assert sorted(refused_variables("HTTPS_PROXY A", "http://me:word@host:3128")) == ["A", "HTTPS_PROXY"]
    assert refused_variables("HTTPS_PROXY", "http://host:3128") == refused_variables("A", "s3://me@host/a:b") == {}
    harmless = """TOKENIZERS_PARALLELISM NCCL_IB_PKEY PATH XAUTHORITY AUTHOR_NAME PASSES COMPATIBLE PATTERN
        OMPI_MCA_pin NCCL_PATH SASHA CREDITS COMPRESSION PWM STOKES"""
    assert sorted(refused_variables(harmless)) == ["OMPI_MCA_pin"]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("30", 1800),
        ("1:30:00", 5400),
        ("24:00:00", 86_400),
        ("0:00:30", 30),
        ("2-00", 172_800),
        ("2-01:30", 178_200),
        ("1-12:00:01", 129_601),
    ],
)
def test_a_time_limit_is_what_slurm_makes_of_it(time: str, seconds: int) -> None:
    assert ClusterSection.model_validate({"time": time}).time == time and seconds_of(time) == seconds


def test_a_job_that_would_be_told_to_save_when_it_starts_is_refused(inputs: Path) -> None:
    """Where both numbers are known; what cannot save is told nothing."""
    for change in ("cluster.time='2'", "cluster={time: '3', finetune: {signal-seconds: 121}}"):
        with pytest.raises(InputError, match=r"cluster: stage (seed|finetune) would be told to save \d+ s, or"):
            scripts(change)
    assert len(scripts("cluster={time: '1', gpu: {time: '3'}}")) == len(scripts("cluster={signal-seconds: 3600}"))


HOSTILE = "a\n#SBATCH --uid=0\n$(touch ran)`touch ran`'\"; touch ran; \\ -x"


def test_nothing_of_a_recipe_runs_in_a_script(tmp_path: Path) -> None:
    """The program gets every word as it is written, and nothing else starts; sbatch reads no line of theirs."""
    run = tmp_path / "run"
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "srun").write_text('#!/bin/bash\nprintf "%s\\0" "$@" >words\nenv -0 >env\n')
    (bin_folder / "python").write_text("#!/bin/bash\nexit 0\n")
    for name in ("srun", "python"):
        (bin_folder / name).chmod(0o755)
    program = Program("megatron_btx.pretrain", ("--lr", HOSTILE, "--name", "-x"))
    stage = Stage("expert-math", program, resumable=True, cluster="experts")
    tree_cluster = {"environment": {"A": "$(touch ran) '\"`touch ran`"}, "data-cache": "/a b/$(touch ran)'"}
    resources = find_resources(ClusterSection.model_validate(tree_cluster), stage)
    script = render_script(stage, resources, run, FINGERPRINT)
    (run / "expert-math").mkdir(parents=True)
    (run / "script.sh").write_text(script)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "BTX_PYTHON": str(bin_folder / "python")}
    environment["SLURM_JOB_ID"] = "1"
    subprocess.run(["bash", run / "script.sh"], check=True, env=environment, cwd=tmp_path)
    words = (run / "words").read_text().split("\0")[:-1]
    begin = words.index("megatron_btx.pretrain")
    assert words[begin + 1 :] == [
        *("--lr", HOSTILE, "--name", "-x"),
        *("--exit-signal-handler", "--data-cache-path", "/a b/$(touch ran)'"),
    ]
    assert f"A={tree_cluster['environment']['A']}" in (run / "env").read_text().split("\0")
    assert list(tmp_path.rglob("ran")) == []
    read_by_slurm = script.split("set -uo pipefail")[0]
    assert "uid" not in read_by_slurm and all(line.startswith("#") for line in read_by_slurm.splitlines())


@pytest.mark.parametrize("path", ["/a b", "/a\n#SBATCH -x", "/a'b", "/$(id)", "/a%j", '/a"', "/a#b", "/a\\b"])
def test_a_run_whose_path_slurm_could_not_hold_is_refused(path: str) -> None:
    stage = Stage("seed", Program("megatron_btx.pretrain"), cluster="seed")
    with pytest.raises(InputError, match="btx submit needs a path"):
        render_script(stage, find_resources(ClusterSection(), stage), Path(path), FINGERPRINT)


@pytest.mark.parametrize(
    ("cluster", "processes", "spread"),
    [
        ({}, 1, (1, 1)),
        ({}, 16, (2, 8)),
        ({"tasks-per-node": 4}, 16, (4, 4)),
        ({"nodes": 2}, 16, (2, 8)),
        ({"nodes": 2, "finetune": {"nodes": 4}}, 16, (4, 4)),
        ({}, 12, (2, 6)),
        ({"nodes": 3}, 16, None),
        ({"nodes": 1, "tasks-per-node": 8}, 16, None),
    ],
)
def test_processes_spread_evenly_over_nodes(cluster: Any, processes: int, spread: tuple[int, int] | None) -> None:
    stage = Stage("finetune", Program("megatron_btx.pretrain"), processes=processes, on_gpu=True, cluster="finetune")
    section = ClusterSection.model_validate(cluster)
    if spread is None:
        with pytest.raises(InputError, match="do not spread evenly"):
            find_resources(section, stage)
        return
    found = find_resources(section, stage)
    assert (found.nodes, found.tasks_per_node, found.gpus_per_node) == (*spread, spread[1])


class JobWorld:
    """A stage ``train`` of 10 steps in a run, as its job sees it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.folder = run / "train"
        stage = Stage("train", Program("module"), product="checkpoint/latest_checkpointed_iteration.txt", iterations=10)
        self.stage = Stage(**{**vars(stage), "resumable": True, "parents": ("data",)})
        data = Stage("data", ("true",))
        known = identities([data, self.stage])
        self.fingerprint, self.data_fingerprint = known["train"].fingerprint, known["data"].fingerprint
        (run / "slurm").mkdir()
        write_record(run, StageRecord(self.stage, known["train"], {"data": self.data_fingerprint}, None, False))

    def finish_data(self) -> None:
        (self.run / "data").mkdir()
        content = {"stage": "data", "status": "finished", "fingerprint": self.data_fingerprint}
        (self.run / "data" / "manifest.json").write_text(json.dumps(content))

    def call(self, moment: str, status: int = 0, said: str = "") -> int:
        if said:
            with (self.folder / "log.txt").open("a") as log:
                log.write(said)
        words = [moment, "train", "--fingerprint", self.fingerprint, "--retries", "1", "--status", str(status)]
        return job.main(words)

    def save(self, step: int) -> None:
        (self.folder / "checkpoint").mkdir(exist_ok=True)
        (self.folder / "checkpoint" / "latest_checkpointed_iteration.txt").write_text(str(step))

    def manifest(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "manifest.json").read_text()))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobWorld:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return JobWorld(tmp_path)


def test_a_record_is_the_stage(world: JobWorld) -> None:
    record = read_record(world.run, "train")
    assert record.stage == Stage(**{**vars(world.stage), "settings": None})
    assert record.identity.fingerprint == world.fingerprint


def test_every_field_of_a_stage_travels(tmp_path: Path) -> None:
    """One that is new, too: none of them may be its default in a job."""
    stage = Stage(
        name="mix",
        program=Program("module", ("--a", "b"), is_distributed=True),
        parents=("seed",),
        after=("data",),
        inputs=(Path("/in"),),
        settings={"a": 1},
        product="out",
        processes=2,
        threads=3,
        on_gpu=True,
        resumable=True,
        kind="mix",
        cluster="dense",
        model="btx",
        only_shows=True,
        iterations=4,
        tokens=5,
        flops=6.0,
        config={"domains": {"a": [1, "b"]}},
    )
    (tmp_path / "slurm").mkdir()
    for field in fields(Stage):
        assert field.default is MISSING or getattr(stage, field.name) != field.default, field.name
    write_record(tmp_path, StageRecord(stage, Identity({"a": 1}, {}, "f"), {"seed": "f", "data": "g"}, None, True))
    read = read_record(tmp_path, "mix")
    assert read.stage == replace(stage, settings=None) and read.parents == {"seed": "f", "data": "g"}


def test_a_job_needs_what_its_stage_is_made_from(world: JobWorld, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.call("begin") == 2
    assert "it needs data, which is not there; btx submit runs what is missing" in capsys.readouterr().err
    assert not world.folder.exists()


def test_what_a_job_runs_is_said_and_command_sh_is_for_a_call_by_hand(world: JobWorld) -> None:
    world.finish_data()
    assert world.call("begin") == 0
    assert (world.folder / "log.txt").read_text().endswith(" run: slurm/train.sh, job 7 of Slurm\n")
    by_hand = (world.folder / "command.sh").read_text()
    assert by_hand.endswith('exec "$python" -m module\n') and "a job of Slurm one of ../slurm;" in by_hand


def test_a_finished_stage_is_not_begun_again(world: JobWorld) -> None:
    world.finish_data()
    assert world.call("begin") == 0 and world.manifest()["status"] == "running"
    world.save(10)
    assert world.call("end") == 0 and world.manifest()["status"] == "finished"
    assert world.call("begin") == DONE_BEFORE and world.manifest()["starts"] == 1


def test_a_job_that_saved_a_step_starts_again_and_one_that_did_not_gives_up(world: JobWorld) -> None:
    """Status 0 with steps missing is an interruption, as after the signal before a time limit."""
    world.finish_data()
    for step in (3, 5, 6):
        assert world.call("begin") == 0
        world.save(step)
        assert world.call("end") == INTERRUPTED
        assert world.manifest()["status"] == "stopped"
        assert world.manifest()["slurm"]["problem"] == f"ended at iteration {step} of 10"
    assert world.call("begin") == 0 and world.call("end", 1) == INTERRUPTED
    assert world.call("begin") == 0 and world.call("end", 137) == GIVEN_UP
    assert world.manifest()["status"] == "failed" and "SIGKILL" in world.manifest()["slurm"]["problem"]
    assert world.manifest()["starts"] == 5


def test_a_node_that_disappears_again_and_again_is_counted(world: JobWorld, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody writes the end of such a start."""
    world.finish_data()
    assert [world.call("begin") for _ in range(3)] == [0, 0, 2]
    assert "2 starts in a row saved no further step" in capsys.readouterr().err
    assert world.manifest()["status"] == "failed"


def test_bad_input_is_not_tried_again(world: JobWorld) -> None:
    """Whichever status srun gives when it ends the other tasks."""
    world.finish_data()
    assert world.call("begin") == 0
    said = "rank 1: error: --lr: no\nsrun: error: n1: task 1: Exited with exit code 2\n"
    assert world.call("end", 143, said) == 2
    assert world.manifest()["slurm"]["problem"] == "failed: --lr: no"


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (f"{STEP_ENDS} ***\n", "stopped: cancelled"),
        (f"{STEP_ENDS} DUE TO PREEMPTION ***\n", "stopped: preemption"),
        (f"{STEP_ENDS} DUE TO TIME LIMIT ***\n", "stopped: out of time, which btx submit begins anew"),
        ("srun: error: n1: task 0: Terminated\n", "stopped: cancelled, preempted or out of time"),
        ("srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n2: task 1: Terminated\n", "failed: "),
        ("srun: error: n1: task 0: Exited with exit code 16\n", "failed: "),
    ],
)
def test_what_slurm_stops_has_not_failed(said: str, problem: str, world: JobWorld) -> None:
    """A stage that cannot save ends by SIGTERM when it is cancelled, and so do the neighbours of a failed rank."""
    world.finish_data()
    assert world.call("begin") == 0
    assert world.call("end", 143, said) == INTERRUPTED
    assert world.manifest()["status"] == problem.split(":")[0]
    assert world.manifest()["slurm"]["problem"].startswith(problem)


@pytest.mark.parametrize("status", [1, 16, 17])
def test_what_a_machine_may_have_done_is_tried_again(status: int, world: JobWorld) -> None:
    """A rank that hung, and a step that Megatron wants taken again elsewhere; as often as retries say."""
    world.finish_data()
    assert world.call("begin") == 0 and world.call("end", status, "error: the run has stood still\n") == INTERRUPTED
    assert world.call("begin") == 0 and world.call("end", status) == GIVEN_UP


def test_a_job_of_other_settings_does_not_begin(world: JobWorld, capsys: pytest.CaptureFixture[str]) -> None:
    world.finish_data()
    assert job.main(["begin", "train", "--fingerprint", "other", "--retries", "1"]) == 2
    assert "submitted again with other settings" in capsys.readouterr().err


def test_a_queue_is_read_by_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all jobs of this user those of the run, whatever the others are called."""
    mine, other = queue.job_name(tmp_path, "mix"), queue.job_name(tmp_path / "b", "mix")
    lines = (
        f"12|PENDING|1:00:00|N/A|Dependency|abc|{mine}",
        f"11|RUNNING|59:00|2026-11-26T10:00:00|None|abc|{mine}",
        f"9|RUNNING|59:00|N/A|None|abc|{other}",
        "8|RUNNING|59:00|N/A|None|x|y|odd|name",
        "broken",
    )
    monkeypatch.setattr(queue, "_call", lambda *words: "\n".join(lines) + "\n")
    found = list_jobs(tmp_path)
    assert [(found_job.number, found_job.stage, found_job.is_running) for found_job in found] == [
        (11, "mix", True),
        (12, "mix", False),
    ]


@pytest.mark.parametrize("then", ["PENDING", "", "COMPLETING"])
def test_a_job_that_is_ending_is_waited_for(
    then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may start again: it is COMPLETING while its nodes clear up, and PENDING afterwards."""
    (tmp_path / "slurm").mkdir()
    clock = [0.0]
    monkeypatch.setattr(queue.shutil, "which", lambda name: name)
    monkeypatch.setattr(queue.time, "sleep", lambda seconds: clock.append(clock[-1] + seconds))

    def answer(*words: str) -> str:
        state = "COMPLETING" if clock[-1] < 20 else then
        return f"7|{state}|1:00|N/A|None|abc|{queue.job_name(tmp_path, 'seed')}\n" if state else ""

    monkeypatch.setattr(queue, "_call", answer)
    if then:
        said = {"PENDING": r"at work here: seed \(job 7\)", "COMPLETING": r"clears up after seed \(job 7\)"}
        with pytest.raises(InputError, match=said[then]):
            queue.check_no_jobs(tmp_path)
    else:
        queue.check_no_jobs(tmp_path)
    assert clock[-1] >= 20 and capsys.readouterr().err.count("waiting until Slurm has cleared up") == 1


def test_a_cancel_takes_back_what_is_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan.json").write_text("[]")
    asked = []
    monkeypatch.setattr(submission, "list_jobs", lambda run: [Job(7, "seed", "COMPLETING", "", "N/A", "None", "abc")])
    monkeypatch.setattr(submission, "cancel_jobs", lambda jobs: asked.extend(job.number for job in jobs))
    assert submission.main([str(tmp_path)]) == 0 and asked == [7]


def test_a_job_that_is_submitted_from_within_a_job_is_none_of_its_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\nenv >{tmp_path}/env\necho '7;cluster'\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CONF", "RANK", "MINE", "BTX_PYTHON", "BTX_STAGE"):
        monkeypatch.setenv(name, "9")
    assert queue.submit_script(tmp_path / "a.sh", [3, 1]) == 7
    lines = (tmp_path / "env").read_text().splitlines()
    assert "MINE=9" in lines and "BTX_PYTHON=9" in lines and "BTX_STAGE=9" not in lines and "SLURM_CONF=9" in lines
    assert "RANK=9" not in lines and "SLURM_CPUS_PER_TASK=9" not in lines


@pytest.mark.parametrize(
    ("state", "reason", "begins", "shown"),
    [
        ("PENDING", "Resources", "N/A", ("queued", "Resources")),
        ("PENDING", "BeginTime", "2026-11-26T10:00:00", ("queued", "starts again at 2026-11-26 10:00:00")),
        ("PENDING", "ReqNodeNotAvail, UnavailableNodes:n1", "N/A", ("queued", "ReqNodeNotAvail, UnavailableNodes:n1")),
        ("PENDING", "Dependency", "N/A", ("queued", "cannot start without data; btx submit goes on")),
        ("RUNNING", "None", "N/A", ("running", "may run 1:00 more")),
        ("COMPLETING", "None", "N/A", ("ending", "")),
    ],
)
def test_a_status_says_why_a_job_waits(
    world: JobWorld, monkeypatch: pytest.MonkeyPatch, state: str, reason: str, begins: str, shown: tuple[str, str]
) -> None:
    if reason != "Dependency":
        world.finish_data()
    found = [Job(7, "train", state, "1:00", begins, reason, "abc")]
    monkeypatch.setattr("megatron_btx.slurm.status.list_jobs", lambda run: found)
    manifests = {name: read_shown_manifest(world.run / name) for name in ("data", "train")}
    views, silence = view_jobs(world.run, manifests)
    assert (views["train"].state, views["train"].why) == shown and silence == ""


def test_a_status_counts_the_time_of_a_running_job(
    world: JobWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest has that of earlier starts alone."""
    world.finish_data()
    (world.run / "plan.json").write_text(json.dumps([{"stage": "train", "steps": 10}]))
    assert world.call("begin") == 0
    content = world.manifest()
    content["started"] -= 3600
    (world.folder / "manifest.json").write_text(json.dumps(content | {"seconds": 7200}))
    found = [Job(7, "train", "RUNNING", "1:00", "N/A", "None", "abc")]
    monkeypatch.setattr("megatron_btx.slurm.status.list_jobs", lambda run: found)
    print_status(world.run)
    assert " 3:00:" in capsys.readouterr().out


def test_a_status_reads_no_more_than_it_can(
    world: JobWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run may come from anybody."""
    (world.run / "plan.json").write_text(json.dumps([{"stage": "train", "steps": 10}]))
    os.mkfifo(world.run / "slurm" / "train.log")
    (world.run / "slurm" / "train.job").write_bytes(b"\xff\xfe\x1b[2J")
    monkeypatch.setattr("megatron_btx.slurm.status.list_jobs", lambda run: [])
    print_status(world.run)
    assert "train: nothing said; its log: " in capsys.readouterr().out


def test_a_machine_without_slurm_says_so(tmp_path: Path) -> None:
    """btx run does not begin where jobs may be at work, and btx status shows what the manifests say."""
    (tmp_path / "slurm").mkdir()
    program = (
        "import sys; from pathlib import Path; from megatron_btx.runner import slurm_queue as queue\n"
        "try: queue.check_no_jobs(Path(sys.argv[1]))\n"
        "except Exception as error: print(error)\n"
    )
    environment = {**os.environ, "PATH": "/nonexistent"}
    answer = subprocess.run(
        [sys.executable, "-c", program, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    assert "cannot be asked here (no squeue)" in answer.stdout


TRACEBACK = "Traceback (most recent call last):\n  File x\n"
TORCHRUN = "E1126 10:00:00.000000 1 torch/distributed/elastic/multiprocessing/api.py:1] failed (exitcode: 1)\n"


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (f"{TRACEBACK}RuntimeError: no room\n", "RuntimeError: no room"),
        (f"== a: run\nValueError: old\n== b: run\n{TRACEBACK}KeyError: 'new'\n", "KeyError: 'new'"),
        (f"{TRACEBACK}[rank1]: torch.OutOfMemoryError: x\nwarning\n{TORCHRUN}", "[rank1]: torch.OutOfMemoryError: x"),
        ("rank 1: error: --lr: no\n" + "srun: error: n1: task 0: Exited\n" * 30, "rank 1: error: --lr: no"),
        (f"{TRACEBACK}AssertionError\n", "AssertionError"),
        ("a\nb\x1b[2J\n", r"b\x1b[2J"),
        ("", "nothing said"),
        ("x" * 5_000_000 + "\nOSError: late\n", "OSError: late"),
        ("x" * 5_000_000, "x" * 400),
        ("\udcff\n", "\ufffd"),
    ],
)
def test_a_status_says_why_a_stage_failed(
    log: str, said: str, world: JobWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line of its last start that says most, and where it stands; with btx run as with jobs."""
    (world.run / "plan.json").write_text(json.dumps([{"stage": "train", "steps": 10}]))
    world.folder.mkdir()
    (world.folder / "manifest.json").write_text('{"status": "failed", "exit": 1}')
    (world.folder / "log.txt").write_bytes(log.encode("utf-8", "surrogateescape"))
    shutil.rmtree(world.run / "slurm")
    print_status(world.run)
    assert capsys.readouterr().out.endswith(f"train: {said}; its log: {world.folder}/log.txt\n")
