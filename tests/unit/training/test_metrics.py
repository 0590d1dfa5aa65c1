"""--btx-metrics: complete lines of JSON, Megatron's own tags, appended after a resume, the last one counting."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_btx.training.metrics import MetricsWriter
from tests.support import pico
from tests.support.runner import read_losses, read_metrics


class Inner:
    """Records what reaches TensorBoard."""

    def __init__(self) -> None:
        self.calls = []

    def add_scalar(self, *arguments):
        self.calls.append(arguments)

    def add_text(self, *arguments):
        self.calls.append(arguments)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_one_line_a_step(tmp_path):
    """Each step's scalars and no other's, as plain numbers, in a folder that is made."""
    file = tmp_path / "new" / "metrics.jsonl"
    writer = MetricsWriter(str(file), None)
    writer.add_scalar("learning-rate", 1e-3, 1)
    writer.add_scalar("learning-rate vs samples", 1e-3, 4)
    writer.after_log(1, {"lm loss": torch.tensor(2.5)})
    writer.add_scalar("grad-norm", torch.tensor(0.1), 2)
    writer.after_log(2, {"lm loss": torch.tensor(2.25)})
    first, second = lines(file)
    assert {k: v for k, v in first.items() if k != "time"} == {"iteration": 1, "learning-rate": 1e-3, "lm loss": 2.5}
    assert set(second) == {"iteration", "time", "grad-norm", "lm loss"}
    assert first["time"] <= second["time"]


def test_a_line_is_on_disk_when_its_step_ends(tmp_path):
    """Without closing or flushing: what was logged survives a SIGKILL."""
    file = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(str(file), None)
    for step in range(1, 4):
        writer.after_log(step, {"lm loss": torch.tensor(float(step))})
        assert len(lines(file)) == step
    del writer


def test_appends_after_a_resume(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for values in ((3.0, 2.0), (1.5, 1.0)):
        writer = MetricsWriter(str(file), None)
        for step, value in zip((1, 2) if values[0] == 3.0 else (2, 3), values, strict=True):
            writer.after_log(step, {"lm loss": torch.tensor(value)})
    assert [line["iteration"] for line in lines(file)] == [1, 2, 2, 3]
    assert read_losses(file) == {1: 3.0, 2: 1.5, 3: 1.0}


def test_a_line_that_was_cut_does_not_spoil_the_next(tmp_path):
    """A full disk or a power failure can cut a line: the resumed run starts a new one."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"iteration": 1, "lm loss": 3.0}\n{"iteration": 2, "lm lo')
    MetricsWriter(str(file), None).after_log(2, {"lm loss": torch.tensor(2.0)})
    assert read_losses(file) == {1: 3.0, 2: 2.0}


def test_everything_reaches_tensorboard(tmp_path):
    inner = Inner()
    writer = MetricsWriter(str(tmp_path / "metrics.jsonl"), inner)
    writer.add_scalar("lm loss vs samples", 1.0, 8)
    writer.add_text("args", "text", 0)
    assert inner.calls == [("lm loss vs samples", 1.0, 8), ("args", "text", 0)]
    without = MetricsWriter(str(tmp_path / "other.jsonl"), None)
    assert without.add_text("args", "text", 0) is None and without.flush() is None


def test_the_tags_of_a_real_run(zygote, corpus, tmp_path):
    """A mixture's run: Megatron's tags in full precision, one line per iteration."""
    metrics = tmp_path / "metrics.jsonl"
    zygote.run(1, pico.train(corpus, 3, metrics, moe=True), tmp_path / "log")
    steps = read_metrics(metrics)
    assert [line["iteration"] for line in lines(metrics)] == [1, 2, 3]
    for step in steps.values():
        tags = {"time", "lm loss", "learning-rate", "grad-norm", "load_balancing_loss"}
        assert tags <= set(step), tags - set(step)
        assert not any(tag.endswith("vs samples") for tag in step)
        assert step["learning-rate"] == pytest.approx(0.01, rel=1e-6)  # Megatron keeps it in fp32
        assert 1 < step["lm loss"] < 6 and step["grad-norm"] > 0
    printed = f"{steps[3]['lm loss']:.6E}"
    assert printed in (tmp_path / "log.0").read_text(), "the log's own rounded loss"


def test_the_learning_rate_of_a_schedule_that_no_group_has(zygote, corpus, tmp_path):
    """With a multiplier on every group Megatron finds none to log; it is the schedule's, as without multipliers."""
    found = {}
    groups = ("attention", "mlp", "norms", "embeddings", "head")
    for name, factors in {"plain": [], "multiplied": [f"{group}=3" for group in groups]}.items():
        metrics = tmp_path / f"{name}.jsonl"
        arguments = pico.train(corpus, 3, metrics) + "--lr-decay-style cosine --lr-warmup-iters 1".split()
        zygote.run(1, arguments + (["--btx-lr-multiplier", *factors] if factors else []), tmp_path / "log" / name)
        found[name] = {step: values["learning-rate"] for step, values in read_metrics(metrics).items()}
    assert found["multiplied"] == pytest.approx(found["plain"], rel=1e-6) and len(found["plain"]) == 3
