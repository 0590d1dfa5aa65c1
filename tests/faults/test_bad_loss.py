"""A loss that is no number, infinite or a spike: stopped at by Megatron, or skipped, with step and samples named."""

from __future__ import annotations

import shutil

import pytest
import torch

from megatron_btx.checkpoint.iterations import TRACKER, read_tracker
from tests.faults.test_async_save import BY_PARAMETER, tensors
from tests.faults.test_kills import PROGRAM, fault
from tests.support import pico
from tests.support.runner import read_losses, read_metrics

SKIP = ["--btx-skip-bad-steps"]


def flags(corpus, folder, more=(), steps=6, every=2, moe=False):
    """A run that resumes by itself, with a schedule."""
    root = str(folder / "checkpoint")
    arguments = pico.train(corpus, steps, folder / "metrics.jsonl", moe=moe)
    arguments += ["--save", root, "--load", root, "--save-interval", str(every)]
    return [*arguments, "--lr-decay-style", "cosine", "--lr-warmup-iters", "2", "--min-lr", "1e-3", *more]


def errors_of(run):
    """The lines of all ranks that say why."""
    return [line for line in run.text().splitlines() if "error: " in line]


@pytest.mark.parametrize(("value", "word"), [("nan", "is no number (NaN)"), ("inf", "is infinite")])
def test_stops_at_a_bad_loss(value, word, zygote, corpus, tmp_path):
    """Taken again, saved one step before, status 16; so again from there, until somebody decides to skip it."""
    environment = fault("bad_loss", 5, "1", value)
    run = zygote.start(2, flags(corpus, tmp_path), tmp_path / "first", PROGRAM, environment)
    zygote.wait(run, expect=None)
    assert run.codes == [16, 16], run.text()[-3000:]
    # Step 5 reads samples 16 to 19, and the second rank's micro-batches are the odd ones.
    assert len(errors_of(run)) == 1 and f"step 5: the loss of samples 17 to 17 {word}" in errors_of(run)[0]
    assert read_tracker(tmp_path / "checkpoint") == 4
    run = zygote.start(2, flags(corpus, tmp_path), tmp_path / "again", PROGRAM, environment)
    zygote.wait(run, expect=None)
    assert run.codes == [16, 16] and "step 5" in errors_of(run)[0]
    zygote.run(2, flags(corpus, tmp_path, SKIP), tmp_path / "over", entry=PROGRAM, environment=environment)
    assert read_tracker(tmp_path / "checkpoint") == 6


def test_stops_where_nothing_is_saved(zygote, corpus, tmp_path):
    """Without --save there is nothing to go on from, and Megatron's own saving would end in a traceback."""
    arguments = pico.train(corpus, 4)
    run = zygote.start(1, arguments, tmp_path / "log", PROGRAM, fault("bad_loss", 3, "0", "nan"))
    zygote.wait(run, expect=16)
    assert "step 3: the loss of samples 8 to 8" in errors_of(run)[0] and "Traceback" not in run.text()


DISTRIBUTED = ["--use-distributed-optimizer"]
LAYOUTS = {
    "one rank": (1, "0", pico.READERS),
    "dp2": (2, "1", [*DISTRIBUTED, *BY_PARAMETER]),
    "dp2-overlap": (2, "0", [*DISTRIBUTED, *BY_PARAMETER, "--overlap-grad-reduce", "--overlap-param-gather"]),
    "pp2": (2, "1", ["--pipeline-model-parallel-size", "2"]),
    "tp2": (2, "0,1", ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "ep2": (2, "0", ["--expert-model-parallel-size", "2"]),
}
BIASED = ["--moe-router-enable-expert-bias", "--moe-router-score-function", "sigmoid"]


FIRST_STEPS = {
    # name: ranks, point, ranks that it hits, step that the start begins with, more flags, what is said
    "a loss": (1, "bad_loss", "0", 5, pico.READERS, "the loss of samples 16 to 16 is no number (NaN)"),
    "a gradient of the other rank": (2, "bad_gradient", "1", 5, ["--use-distributed-optimizer"], "found NaN in local"),
    "a pipeline, its first stage": (2, "bad_gradient", "0", 5, LAYOUTS["pp2"][2], "found NaN in local grad norm"),
    "experts, bf16": (2, "bad_loss", "1", 5, [*LAYOUTS["ep2"][2], "--bf16"], "the loss of samples 17 to 17"),
    "a new run": (1, "bad_loss", "0", 1, [], "the loss of samples 0 to 0 is no number (NaN)"),
}


@pytest.mark.parametrize("case", FIRST_STEPS)
def test_the_first_step_of_a_start_is_judged(case, zygote, corpus, tmp_path):
    """It is not taken: the checkpoint before stands, and without the fault the run ends as if nothing had been."""
    ranks, at, hit, first, more, said = FIRST_STEPS[case]
    moe = "experts" in case
    arguments = flags(corpus, tmp_path, more, every=4, moe=moe)
    if first > 1:
        zygote.run(ranks, [*arguments, "--exit-interval", str(first - 1)], tmp_path / "before")
        stored = {file: file.read_bytes() for file in tmp_path.glob("checkpoint/iter_*/*")}
    keep = [*arguments, "--btx-keep-last", "1"]
    run = zygote.start(ranks, keep, tmp_path / "bad", PROGRAM, fault(at, first, hit, "nan"))
    zygote.wait(run, expect=None)
    assert run.codes == [16] * ranks, run.text()[-3000:]
    assert all(f"error: step {first}: " in line and "samples" in line for line in errors_of(run)), errors_of(run)
    assert any(said in line for line in errors_of(run)), errors_of(run)
    if first > 1:
        assert {file: file.read_bytes() for file in tmp_path.glob("checkpoint/iter_*/*")} == stored
    assert [path.name for path in tmp_path.glob("checkpoint/iter_*")] == ["iter_0000004"] * (first > 1)
    zygote.run(ranks, arguments, tmp_path / "again")
    zygote.run(ranks, flags(corpus, tmp_path / "straight", more, every=4, moe=moe), tmp_path / "straight/log")
    assert read_losses(tmp_path / "metrics.jsonl") == read_losses(tmp_path / "straight/metrics.jsonl")


STATES = {
    # name: ranks, more flags, mixture; the first steps are bad
    "experts, bf16": (2, [*LAYOUTS["ep2"][2], "--bf16"], True),
    "distributed": (2, DISTRIBUTED, False),
    "distributed, fully reshardable": (2, [*DISTRIBUTED, *BY_PARAMETER], False),
    "fp16": (1, ["--fp16", "--initial-loss-scale", "4194304"], False),
}


@pytest.mark.parametrize("case", STATES)
def test_a_checkpoint_from_before_the_first_step_that_was_taken(case, zygote, corpus, tmp_path):
    """It has an optimizer's state, of zeros: the run that is resumed from it ends as the one that was not stopped."""
    ranks, more, moe = STATES[case]
    environment = fault("bad_loss", 1, "0,1", "nan")
    if case == "fp16":
        environment = fault("nothing", 0, "", "")  # its scaler skips steps by itself
    else:
        more = [*more, *SKIP]
    arguments = flags(corpus, tmp_path, more, steps=8, every=1, moe=moe)
    zygote.run(ranks, arguments, tmp_path / "log", entry=PROGRAM, environment=environment)
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "checkpoint/iter_0000001", resumed / "checkpoint/iter_0000001")
    (resumed / "checkpoint" / TRACKER).write_text("1")
    zygote.run(ranks, flags(corpus, resumed, more, steps=8, every=8, moe=moe), resumed / "log")
    left, expected = (tensors(root / "checkpoint/iter_0000008") for root in (resumed, tmp_path))
    names = [name for name in expected if not name.startswith("optimizer.distributed.dp_group_idx")]  # see BY_PARAMETER
    assert all(torch.equal(left[name], expected[name]) for name in names)
    assert not torch.equal(*(tensors(tmp_path / f"checkpoint/iter_000000{step}")[names[0]] for step in (1, 8)))


def test_a_run_that_ends_skipping_is_not_finished(zygote, corpus, tmp_path):
    """Status 2, also of the next start, which has nothing left to train. One bad batch at the end is none of it."""
    arguments = flags(corpus, tmp_path, SKIP)
    for log in ("first", "again"):
        run = zygote.start(1, arguments, tmp_path / log, PROGRAM, fault("bad_loss", -5, "0", "nan"))
        zygote.wait(run, expect=2)
        assert ["the last 2 steps of the run were all skipped" in line for line in errors_of(run)] == [True]
    assert read_tracker(tmp_path / "checkpoint") == 6
    arguments = flags(corpus, tmp_path / "last", SKIP)
    zygote.run(1, arguments, tmp_path / "last/log", entry=PROGRAM, environment=fault("bad_loss", 6, "0", "nan"))


def test_what_routers_counted_is_put_back(zygote, corpus, tmp_path):
    """Megatron saves the step before once more, after two passes of the bad one: the experts' biases are of before."""
    biases = []
    for folder, steps, at, status in ((tmp_path / "good", 4, "nothing", 0), (tmp_path / "bad", 6, "bad_loss", 16)):
        run = zygote.start(
            1, flags(corpus, folder, BIASED, steps, 4, True), folder / "log", PROGRAM, fault(at, 5, "0", "nan")
        )
        zygote.wait(run, expect=status)
        found = tensors(folder / "checkpoint/iter_0000004")
        biases.append([found[name] for name in found if "expert_bias" in name])
    assert biases[0] and all(bias.any() for bias in biases[0])
    assert all(torch.equal(*pair) for pair in zip(*biases, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_skipped_step_changes_nothing(layout, zygote, corpus, tmp_path):
    """Weights and their state are bit for bit those of the step before, the schedule stays, and the run goes on."""
    ranks, hit, more = LAYOUTS[layout]
    if layout == "ep2":
        more = [*more, *BIASED]
    arguments = flags(corpus, tmp_path, [*SKIP, *more], every=1, moe=layout == "ep2")
    run = zygote.run(ranks, arguments, tmp_path / "log", entry=PROGRAM, environment=fault("bad_loss", 4, hit, "nan"))
    said = [line for line in run.text().splitlines() if line.startswith("skipped: ")]
    assert len(said) == 1 and "step 4 (samples 12 to 15): the loss is nan" in said[0]
    folders = [tmp_path / f"checkpoint/iter_{step:07d}" for step in (3, 4, 5)]
    before, after, later = map(tensors, folders)
    assert all(torch.equal(before[name], after[name]) for name in before if "rng" not in name)
    assert not all(torch.equal(before[name], later[name]) for name in before)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["skipped"] for line in metrics.values()] == [0, 0, 0, 1, 0, 0]
    assert metrics[4]["learning-rate"] == metrics[3]["learning-rate"] > metrics[5]["learning-rate"]


def test_a_spike_is_skipped_and_the_record_survives(zygote, corpus, tmp_path):
    """A loss of 30 times the usual; started again from before it, the run takes the same decision, bit for bit."""
    more = [*SKIP, "--btx-spike-sigma", "6"]
    arguments = flags(corpus, tmp_path, more, steps=72, every=66)
    run = zygote.run(2, arguments, tmp_path / "log", entry=PROGRAM, environment=fault("bad_loss", 70, "0,1", "30"))
    said = [line for line in run.text().splitlines() if line.startswith("skipped: ")]
    assert len(said) == 1 and "step 70 (samples 276 to 279): the loss is" in said[0] and "6.0 sigma of 69" in said[0]
    through = read_losses(tmp_path / "metrics.jsonl")
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "checkpoint/iter_0000066", resumed / "checkpoint/iter_0000066")
    (resumed / "checkpoint" / TRACKER).write_text("66")
    arguments = flags(corpus, resumed, more, steps=72, every=66)
    again = zygote.run(2, arguments, resumed / "log", entry=PROGRAM, environment=fault("bad_loss", 70, "0,1", "30"))
    assert [line for line in again.text().splitlines() if line.startswith("skipped: ")] == said
    assert read_losses(resumed / "metrics.jsonl") == {step: through[step] for step in range(67, 73)}


def test_ten_in_a_row_end_the_run(zygote, corpus, tmp_path):
    """It would skip for ever: status 2, one line with the step, and the last checkpoint is of a skipped one."""
    arguments = flags(corpus, tmp_path, SKIP, steps=20)
    run = zygote.start(2, arguments, tmp_path / "log", PROGRAM, fault("bad_loss", -4, "0,1", "inf"))
    zygote.wait(run, expect=2)
    assert sum(line.startswith("skipped: ") for line in run.text().splitlines()) == 9
    assert all("step 13 (samples 48 to 51): the loss is inf; 10 steps in a row are bad" in e for e in errors_of(run))
    assert read_tracker(tmp_path / "checkpoint") == 12


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--btx-spike-sigma", "6"], "nothing is skipped without --btx-skip-bad-steps"),
        ([*SKIP, "--btx-spike-sigma", "-1"], "--btx-spike-sigma -1.0: expected a number above 0"),
        ([*SKIP, "--check-for-spiky-loss"], "use --btx-spike-sigma in its place"),
        ([*SKIP, "--fp16"], "Megatron's loss scaler skips steps"),
    ],
)
def test_refused(more, said, zygote, corpus, tmp_path):
    """One line each."""
    run = zygote.run(1, flags(corpus, tmp_path, more), tmp_path / "log", expect=2)
    assert len(errors_of(run)) == 1 and said in errors_of(run)[0]


def test_megatrons_own_check_for_spikes(zygote, corpus, tmp_path):
    """It compares with the first 100 micro-batches, and only says so: the run goes on."""
    arguments = flags(corpus, tmp_path, ["--check-for-spiky-loss"], steps=30, every=30)
    run = zygote.run(1, arguments, tmp_path / "log", entry=PROGRAM, environment=fault("bad_loss", 28, "0", "100"))
    assert "the loss of samples 108 to 108 is 10 times the largest before" in run.text()
    assert max(read_losses(tmp_path / "metrics.jsonl")) == 30
