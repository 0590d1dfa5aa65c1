"""What a finetuning run lets you see: routing per layer, loss per domain, and whether it started sound."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_btx.training.validation import MARGIN_NATS
from tests.distributed.test_identities import evaluate
from tests.distributed.test_refusals import refusal
from tests.support import pico
from tests.support.mixing import mix, rewrite
from tests.support.runner import read_metrics


@pytest.fixture(scope="module")
def mixture(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    experts = {"a": dense / "iter_0000005", "b": dense, "c": dense, "d": dense / "iter_0000005"}
    return mix(experts, tmp_path_factory.mktemp("watched") / "mix")


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two domains that are not the training text."""
    folder = tmp_path_factory.mktemp("domains")
    return {name: pico.write_corpus(folder / name, 60, seed) for seed, name in enumerate(("one", "two"), start=3)}


def watched(domains: dict[str, Path], tokens: int = 1024) -> list[str]:
    words = [f"{name}={prefix}" for name, prefix in domains.items()]
    return ["--btx-valid-data", *words, "--btx-valid-tokens", str(tokens)]


OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"


@pytest.mark.parametrize(
    ("world_size", "layout", "measured"),
    [
        # Routers' noise is of training alone.
        (1, "", "--moe-input-jitter-eps 0.3"),
        (
            2,
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
            "--moe-router-force-load-balancing",
        ),
        (
            2,
            "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1",
            "--eod-mask-loss --reset-position-ids",
        ),
        (2, "--expert-model-parallel-size 2 " + OVERLAP, ""),
    ],
)
def test_loss_per_domain_is_the_evaluations(world_size, layout, measured, mixture, domains, zygote, corpus, tmp_path):
    """At every interval and after the last step, equal to evaluating the saved checkpoint; training goes on unmoved."""
    flags = ["--pretrained-checkpoint", str(mixture), *layout.split(), *measured.split()]
    plain = pico.train(corpus, 5, tmp_path / "plain.jsonl", moe=True) + flags
    zygote.run(world_size, plain, tmp_path / "log" / "plain")
    arguments = pico.train(corpus, 5, tmp_path / "metrics.jsonl", moe=True) + flags + watched(domains)
    arguments += ["--eval-interval", "2", "--save", str(tmp_path / "run"), "--save-interval", "2"]
    zygote.run(world_size, arguments, tmp_path / "log" / "watched")
    found, reference = read_metrics(tmp_path / "metrics.jsonl"), read_metrics(tmp_path / "plain.jsonl")
    assert [step for step, values in found.items() if "lm loss validation one" in values] == [2, 4, 5]
    assert {step: v["lm loss"] for step, v in found.items()} == {step: v["lm loss"] for step, v in reference.items()}
    for step, name in ((2, "one"), (5, "two")):
        saved = {"run": tmp_path / "run" / f"iter_{step:07d}"}
        model = [*pico.MOE, "--micro-batch-size", "1", *measured.split()]
        result = evaluate(zygote, tmp_path / name, saved, domains[name], model)
        loss = result["run"]["losses"]["text"]
        assert found[step][f"lm loss validation {name}"] == pytest.approx(loss, abs=1e-6)
        log = (tmp_path / name / "log" / "evaluate.0").read_text()
        assert f"run: text {loss:.4f}" in log and "INFO" not in log and "arguments ---" not in log, "its own lines"
    values = found[5]
    assert values["lm loss validation mean"] == pytest.approx(
        (values["lm loss validation one"] + values["lm loss validation two"]) / 2
    )


def test_loss_after_the_first_step_of_a_start(domains, zygote, corpus, tmp_path):
    """Parameters that are gathered while training are there when they are measured, also before Megatron's hooks are.

    They are not yet after the first step of every start, of a new run and of a resumed one.
    """
    found = {}
    for name, flags in {"plain": "--use-distributed-optimizer", "overlapped": OVERLAP}.items():
        metrics, run = tmp_path / f"{name}.jsonl", str(tmp_path / name)
        arguments = [*pico.train(corpus, 4, metrics), *flags.split(), *watched(domains), "--eval-interval", "1"]
        arguments += ["--save", run, "--load", run, "--save-interval", "2", "--exit-interval", "2"]
        for start in ("new", "resumed"):
            zygote.run(2, arguments, tmp_path / "log" / f"{name}-{start}")
        found[name] = {step: values["lm loss validation one"] for step, values in read_metrics(metrics).items()}
    assert sorted(found["plain"]) == [1, 2, 3, 4]
    assert found["overlapped"] == pytest.approx(found["plain"], abs=1e-6)


def test_megatrons_own_validation_has_batches_of_its_own_size(domains, zygote, corpus, tmp_path):
    """Tensor-parallel ranks that do not read them know it too, and the losses per domain keep the size of training.

    Its losses stand at their step, those of the test set under a name of their own.
    """
    arguments = pico.train(corpus, 2, tmp_path / "metrics.jsonl") + watched(domains)
    arguments += ["--valid-data-path", str(domains["one"]), "--test-data-path", str(domains["two"])]
    arguments += ["--eval-interval", "1", "--eval-iters", "1"]
    arguments += "--eval-micro-batch-size 2 --eval-global-batch-size 4 --tensor-model-parallel-size 2".split()
    run = zygote.run(2, arguments, tmp_path / "log")
    found = read_metrics(tmp_path / "metrics.jsonl")
    for step, where in ((1, "iteration 1"), (2, "iteration 2"), (2, "iteration 2 on validation set")):
        printed = f"validation loss at {where} | lm loss value: "
        assert printed in run.text() and {"lm loss validation", "lm loss validation one"} <= set(found[step])
    assert f"on validation set | lm loss value: {found[2]['lm loss validation']:.6E}" in run.text()
    assert f"on test set | lm loss value: {found[2]['lm loss test']:.6E}" in run.text()
    assert "lm loss test" not in found[1]


def test_loads_are_of_the_whole_interval(mixture, zygote, corpus, tmp_path):
    """The load of an interval of three steps is the mean of the loads of its steps; so is the entropy."""
    for interval in (1, 3):
        arguments = pico.train(corpus, 6, tmp_path / f"{interval}.jsonl", moe=True)
        arguments += ["--pretrained-checkpoint", str(mixture), "--log-interval", str(interval)]
        zygote.run(1, arguments, tmp_path / "log" / str(interval))
    single, triple = read_metrics(tmp_path / "1.jsonl"), read_metrics(tmp_path / "3.jsonl")
    names = [name for name in single[1] if name.startswith(("moe/load", "moe/router_entropy"))]
    assert len(names) == 4 * 4 + 4
    for name in names:
        assert name not in triple[1] and name not in triple[2]
        for end in (3, 6):
            mean = sum(single[step][name] for step in range(end - 2, end + 1)) / 3
            assert triple[end][name] == pytest.approx(mean, abs=1e-9)
    for layer in range(4):
        assert sum(triple[6][f"moe/load_layer_{layer}_expert_{e}"] for e in range(4)) == pytest.approx(1)
        assert 0 < triple[6][f"moe/router_entropy_layer_{layer}"] < math.log(4)
        assert triple[6][f"moe/dropped_layer_{layer}"] == 0


def test_dead_experts_and_drops_are_counted(mixture, zygote, corpus, tmp_path):
    """Routers of zeros want one expert alone: the others are dead in every layer, and the capacity drops tokens."""
    forced = rewrite(mixture, tmp_path / "forced", lambda key, t: t * 0 if key.endswith("router.weight") else t)
    flags = "--moe-router-topk 1 --moe-router-pre-softmax --moe-expert-capacity-factor 1.5".split()
    flags += "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0 --lr 0 --min-lr 0".split()
    arguments = pico.train(corpus, 1, tmp_path / "metrics.jsonl", moe=True) + flags
    zygote.run(1, [*arguments, "--pretrained-checkpoint", str(forced)], tmp_path / "log")
    step = read_metrics(tmp_path / "metrics.jsonl")[1]
    # Equal logits: all tokens of a layer want the same expert, whose capacity is 32 x 1.5 / 4 = 12 of 32.
    assert step["moe/dead_experts"] == 12
    for layer in range(4):
        assert max(step[f"moe/load_layer_{layer}_expert_{e}"] for e in range(4)) == 1
        assert step[f"moe/dropped_layer_{layer}"] == pytest.approx(1 - 12 / 32)
        assert step[f"moe/router_entropy_layer_{layer}"] == pytest.approx(math.log(4), abs=1e-6)


def experts_evaluation(file: Path, one: float, two: float) -> Path:
    losses = {"worse": {"one": one, "two": two}, "better": {"one": 0.1, "two": 0.1}}
    file.write_text(json.dumps({"models": {name: {"losses": of} for name, of in losses.items()}}))
    return file


def test_a_sound_mix_trains(mixture, domains, zygote, corpus, tmp_path):
    """Bounded by its worst expert on a domain, it starts; on other text its first step may be worse than that.

    Its losses per domain are logged after its last step, also where --exit-interval says which that is.
    """
    text = {"one": corpus, "two": corpus}
    arguments = pico.train(domains["two"], 4, tmp_path / "metrics.jsonl", moe=True) + ["--exit-interval", "2"]
    arguments += ["--pretrained-checkpoint", str(mixture), *watched(text)]
    worst = 4.2
    bound = experts_evaluation(tmp_path / "experts.json", worst, worst)
    run = zygote.run(1, [*arguments, "--btx-first-loss-bound", str(bound)], tmp_path / "log")
    assert "the mix before its first step | one " in run.text()
    assert f"sound up to {math.log(pico.PADDED_VOCABULARY):.4f}" in run.text()
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found[1]["lm loss"] > worst + MARGIN_NATS, "or this test shows nothing"
    assert [step for step, values in found.items() if "lm loss validation one" in values] == [2]


@pytest.mark.parametrize(
    ("world_size", "flag", "kind"),
    [(1, "--pretrained-checkpoint", "noise"), (2, "--pretrained-checkpoint", "noise"), (1, "--load", "nan")],
)
def test_a_broken_mix_stops_at_its_first_step(world_size, flag, kind, mixture, domains, zygote, corpus, tmp_path):
    """A mix whose head is scrambled is worse than guessing; nothing is saved. Also over a pipeline.

    A fresh mix is a release, which --load takes as well.
    """
    import torch

    def scrambled(key, tensor):
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        noise = noise * math.nan if kind == "nan" else noise
        return noise if key == "output_layer.weight" else tensor

    broken = rewrite(mixture, tmp_path / "broken", scrambled)
    (broken / "iter_0000001").rename(broken / "release")
    (broken / "latest_checkpointed_iteration.txt").write_text("release")
    arguments = pico.train(corpus, 2, moe=True) + [flag, str(broken)]
    arguments += ["--save", str(tmp_path / "run"), "--save-interval", "2"]
    arguments += ["--pipeline-model-parallel-size", str(world_size)]
    if kind == "nan":  # the step itself is judged before its loss is
        run = zygote.run(world_size, arguments, tmp_path / "log", expect=16)
        assert "error: step 1: " in run.text() and "is no number (NaN)" in run.text()
    else:
        line = refusal(zygote, arguments, tmp_path / "log", world_size)
        assert "--btx-first-loss-bound" in line and f"above {math.log(pico.PADDED_VOCABULARY):.4f}" in line
    assert not list((tmp_path / "run").glob("iter_*"))


@pytest.mark.parametrize(("bound", "said"), [("{worse}", "worse: 0.2000"), ("0.01", "above 0.0100")])
def test_bounds(bound, said, mixture, domains, zygote, corpus, tmp_path):
    """By the worst expert of a domain, by a number; what is no bound: tests/unit/training/test_validation.py."""
    worse = experts_evaluation(tmp_path / "worse.json", 9.0, 0.2)
    arguments = pico.train(corpus, 1, moe=True) + ["--pretrained-checkpoint", str(mixture), *watched(domains)]
    assert said in refusal(zygote, [*arguments, "--btx-first-loss-bound", bound.format(worse=worse)], tmp_path / "log")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--btx-freeze expertz", "'expertz': there is no such group; this model has experts, router"),
        ("--moe-router-topk 5", "can take 1 to 4 experts"),
        ("--btx-valid-data one=/nowhere/text", "/nowhere/text.bin does not exist"),
        # Seen when the model is there, before there is an optimizer.
        ("--pipeline-model-parallel-size 2 --btx-freeze all-but:head", "0 trains nothing, 1 trains no experts"),
    ],
)
def test_refusals(flags, said, zygote, corpus, tmp_path):
    """One line with the remedy, before any of two ranks trains; all the others: tests/unit/engine/test_checks.py."""
    line = refusal(zygote, pico.train(corpus, 1, moe=True) + flags.split(), tmp_path / "log", 2)
    assert said in line, line


def records_of(log: bytes) -> list[bytes]:
    """The records of an offline run: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    at, records, parts = 7, [], b""
    while at + 7 <= len(log):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        parts += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(parts)
            parts = b""
    return records


def test_wandb_gets_what_the_metrics_have(mixture, domains, zygote, corpus, tmp_path):
    """Offline, as on a node without a network: every number of the routing and of the domains is in its record."""
    from wandb.proto import wandb_internal_pb2

    arguments = pico.train(corpus, 2, tmp_path / "metrics.jsonl", moe=True) + watched(domains)
    arguments += ["--pretrained-checkpoint", str(mixture), "--wandb-project", "btx", "--wandb-exp-name", "test"]
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    arguments += ["--wandb-save-dir", str(tmp_path), "--tensorboard-dir", str(tmp_path / "tensorboard")]
    zygote.run(1, arguments, tmp_path / "log", environment=environment)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found: dict[int, dict[str, str]] = {}
    for data in records_of(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if items:
            found.setdefault(int(items["_step"]), {}).update(items)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    for step, values in metrics.items():
        names = [name for name in values if name.startswith(("moe/", "lm loss validation"))]
        assert len(names) >= 4 * 4 + 4 + 4 + 1
        for name in names:
            assert json.loads(found[step][name]) == pytest.approx(values[name], rel=1e-9), name
