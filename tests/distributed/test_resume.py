"""A run killed with SIGKILL and started again goes on exactly as if nothing had happened."""

from __future__ import annotations

import shutil

import pytest

from tests.support import pico
from tests.support.mixing import mix
from tests.support.runner import read_losses

STEPS, SAVED, KILLED = 12, 4, 7


def flags(corpus, folder, moe, more):
    """A run that resumes by itself from its own checkpoint."""
    arguments = pico.train(corpus, STEPS, folder / "metrics.jsonl", moe=moe)
    arguments += ["--save", str(folder / "checkpoint"), "--load", str(folder / "checkpoint")]
    # A schedule, so that a forgotten scheduler state would show.
    arguments += ["--lr-decay-style", "cosine", "--lr-warmup-iters", "2", "--min-lr", "1e-3"]
    return [*arguments, "--save-interval", str(SAVED), *more]


@pytest.fixture(scope="module")
def mixture(dense, tmp_path_factory):
    """A mixture to start from."""
    return mix({"a": dense, "b": dense / "iter_0000005", "c": dense, "d": dense}, tmp_path_factory.mktemp("m") / "mix")


TP = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "1"]
RESHARDABLE = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
# The noise and its temperature follow from the step; a forgotten state of the balancing loss would show, too.
SAMPLED = (
    "--moe-router-topk 1 --moe-router-pre-softmax --btx-sample-top1 --btx-sample-decay 0.1 --btx-load-balancing paper "
    "--moe-router-load-balancing-type global_aux_loss".split()
)
EP2 = ["--expert-model-parallel-size", "2"]
FROZEN = ["--btx-freeze", "experts"]
DROPOUT = ["--attention-dropout", "0.1", "--hidden-dropout", "0.1"]
KILLED_CASES = {
    "dense": (1, False, pico.READERS),
    "dropout": (1, False, DROPOUT),
    "dense-distributed": (2, False, ["--use-distributed-optimizer"]),
    "moe-ep2": (2, True, [*EP2, *pico.READERS]),
    "moe-ep2-distributed": (2, True, [*EP2, "--use-distributed-optimizer"]),
    "moe-ep2-reshardable": (2, True, [*EP2, *RESHARDABLE]),
    "sampled-ep2-reshardable": (2, True, [*EP2, *RESHARDABLE, *SAMPLED]),
}
CASES = {**KILLED_CASES, "moe-tp2": (2, True, TP), "moe-frozen": (1, True, FROZEN)}


@pytest.fixture(scope="module")
def uninterrupted(zygote, corpus, mixture, tmp_path_factory):
    """Folders of the runs that nobody killed, made when first asked for."""
    known = {}

    def run(case):
        if case not in known:
            world_size, moe, more = CASES[case]
            folder = tmp_path_factory.mktemp(case)
            start = ["--pretrained-checkpoint", str(mixture)] if moe else []
            zygote.run(world_size, flags(corpus, folder, moe, [*more, *start]), folder / "log")
            known[case] = folder
        return known[case]

    return run


@pytest.mark.parametrize("case", KILLED_CASES)
def test_killed_and_started_again(case, uninterrupted, zygote, corpus, mixture, tmp_path):
    """SIGKILL after step 7, restart from the checkpoint of step 4: steps 5 to 12 equal to the last bit."""
    reference = read_losses(uninterrupted(case) / "metrics.jsonl")
    world_size, moe, more = CASES[case]
    arguments = flags(corpus, tmp_path, moe, [*more, *(["--pretrained-checkpoint", str(mixture)] if moe else [])])
    # Room to be killed in: the same steps of a run that would go on.
    first = zygote.start(world_size, arguments, tmp_path / "first")
    zygote.kill_when(first, tmp_path / "metrics.jsonl", KILLED)
    assert (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").read_text() in ("4", "8")
    (tmp_path / "metrics.jsonl").rename(tmp_path / "killed.jsonl")
    zygote.run(world_size, arguments, tmp_path / "second")
    resumed = read_losses(tmp_path / "metrics.jsonl")
    assert min(resumed) > 1, "it must have resumed, not started over"
    assert resumed == {step: reference[step] for step in resumed}
    assert max(resumed) == STEPS


def resume_copy(source, target):
    """A copy of a run as it was right after its first checkpoint."""
    shutil.copytree(source / "checkpoint" / f"iter_{SAVED:07d}", target / "checkpoint" / f"iter_{SAVED:07d}")
    (target / "checkpoint" / "latest_checkpointed_iteration.txt").write_text(str(SAVED))


@pytest.mark.parametrize(
    ("case", "world_size", "layout"),
    [
        ("dense", 2, []),
        ("dense", 2, ["--pipeline-model-parallel-size", "2"]),
        ("dense", 2, ["--tensor-model-parallel-size", "2"]),
        ("dense-distributed", 1, ["--use-distributed-optimizer"]),
        ("moe-ep2", 4, ["--expert-model-parallel-size", "4"]),
        ("moe-ep2", 4, ["--expert-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
        ("moe-ep2-reshardable", 2, [*RESHARDABLE, *TP, *EP2]),
        ("sampled-ep2-reshardable", 4, [*RESHARDABLE, *SAMPLED, *EP2, "--pipeline-model-parallel-size", "2"]),
        # Experts spread otherwise than the rest have their own optimizer in both; frozen ones have none in either.
        ("moe-tp2", 2, EP2),
        ("moe-frozen", 2, [*FROZEN, *EP2]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_resumed_under_another_layout(case, world_size, layout, uninterrupted, zygote, corpus, tmp_path):
    """The optimizer's state is resharded: the rest of the curve is the same to 1e-5."""
    source = uninterrupted(case)
    resume_copy(source, tmp_path)
    zygote.run(world_size, flags(corpus, tmp_path, CASES[case][1], layout), tmp_path / "log")
    resumed, reference = read_losses(tmp_path / "metrics.jsonl"), read_losses(source / "metrics.jsonl")
    assert sorted(resumed) == list(range(SAVED + 1, STEPS + 1))
    assert resumed == pytest.approx({step: reference[step] for step in resumed}, abs=1e-5)


def test_a_budget_in_samples_goes_on_by_its_own_command(zygote, corpus, tmp_path):
    """Stopped on the way and finished: Megatron works out steps that the command does not have."""
    root = str(tmp_path / "checkpoint")
    arguments = pico.train(corpus, 4, tmp_path / "metrics.jsonl")
    at = arguments.index("--train-iters")
    arguments[at : at + 2] = ["--train-samples", "16"]
    arguments += ["--save", root, "--load", root, "--save-interval", "2", "--exit-interval", "2"]
    for start in range(2):
        zygote.run(1, arguments, tmp_path / f"log-{start}")
        assert max(read_losses(tmp_path / "metrics.jsonl")) == 2 + 2 * start
    run = zygote.run(1, arguments, tmp_path / "log-finished")
    assert "step 4 of 4: nothing left to train" in run.text()


def test_a_finished_run_goes_on_from_an_earlier_checkpoint(uninterrupted, zygote, corpus, tmp_path):
    """--ckpt-step is what is advised where the last checkpoint is damaged."""
    source = uninterrupted("dense")
    shutil.copytree(source / "checkpoint", tmp_path / "checkpoint")
    zygote.run(1, flags(corpus, tmp_path, False, ["--ckpt-step", "8"]), tmp_path / "log")
    reference = read_losses(source / "metrics.jsonl")
    assert read_losses(tmp_path / "metrics.jsonl") == {step: reference[step] for step in range(9, STEPS + 1)}


def test_a_finished_run_started_again_does_nothing(uninterrupted, zygote, corpus, tmp_path):
    """Killed between its last checkpoint and its end, a run has nothing left to do: that is a success."""
    folder = uninterrupted("dense")
    before = (folder / "metrics.jsonl").read_text()
    run = zygote.run(1, flags(corpus, folder, False, []), tmp_path / "log")
    assert f"step {STEPS} of {STEPS}: nothing left to train" in run.text()
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("case", "world_size", "layout", "named"),
    [
        ("moe-ep2", 1, [], "--expert-model-parallel-size"),
        ("moe-tp2", 1, [], "--expert-tensor-parallel-size"),
        ("moe-frozen", 1, ["--btx-freeze", "router"], "--btx-freeze"),
        ("dense", 1, ["--lr", "2e-2"], "--lr"),
        ("dense-distributed", 2, [], "--use-distributed-optimizer"),
        (
            "dense-distributed",
            2,
            ["--use-distributed-optimizer", "--tensor-model-parallel-size", "2"],
            "--tensor-model-parallel-size",
        ),
        ("dense", 1, ["--train-iters", "20"], "--override-opt-param-scheduler"),
    ],
)
def test_what_cannot_be_resharded_is_refused_by_name(
    case, world_size, layout, named, uninterrupted, zygote, corpus, tmp_path
):
    """One line that names the flag, and exit code 2; nothing is trained."""
    resume_copy(uninterrupted(case), tmp_path)
    arguments = flags(corpus, tmp_path, CASES[case][1], layout)
    run = zygote.run(world_size, arguments, tmp_path / "log", expect=2)
    errors = [line for line in run.text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and named in errors[0]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stands(zygote, corpus, tmp_path):
    """The second checkpoint does not fit: one line with the remedy, exit 2, and the tracker still names the first."""
    root = tmp_path / "checkpoint"
    saves = ["--save", str(root), "--load", str(root), "--save-interval", "2"]
    zygote.run(1, pico.train(corpus, 2) + saves, tmp_path / "first")
    # Files cannot grow beyond this: larger than the log, smaller than a checkpoint's data.
    limit = min(file.stat().st_size for file in root.glob("iter_*/*.distcp")) // 2
    saves.append("--override-opt-param-scheduler")
    run = zygote.start(1, pico.train(corpus, 4) + saves, tmp_path / "second", file_size_limit_bytes=limit)
    zygote.wait(run, expect=2)
    errors = [line for line in run.text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and f"{root}: a checkpoint could not be written" in errors[0] and "Make room" in errors[0]
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "2"
    zygote.run(1, pico.train(corpus, 4, tmp_path / "metrics.jsonl") + saves, tmp_path / "third")
    assert sorted(read_losses(tmp_path / "metrics.jsonl")) == [3, 4]
