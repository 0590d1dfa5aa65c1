"""What the training program refuses before it trains: exit code 2, one line with flag, both values and remedy."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from megatron.core.datasets.utils import compile_helpers

from tests.support import pico
from tests.support.hostile import Call, payload, plant
from tests.support.mixing import mix, rewrite
from tests.support.runner import Zygote, read_losses


def refusal(zygote: Zygote, arguments: list[str], log: Path, world_size: int = 1) -> str:
    """Run, expect the refusal, and return its one line: what the ranks say that were not ended before they spoke."""
    run = zygote.run(world_size, arguments, log, expect=None)
    assert run.codes is not None
    # The zygote ends all ranks when one has failed.
    assert 2 in run.codes and set(run.codes) <= {2, -9}, f"{run.codes}\n{run.text()[-3000:]}"
    assert "Traceback" not in run.text()
    lines = {line[line.index("error:") :] for line in run.text().splitlines() if _ERROR.match(line)}
    assert len(lines) == 1, run.text()[-3000:]
    return lines.pop()


_ERROR = re.compile(r"(rank \d+: )?error: ")


def without(words: list[str], *flags: str) -> list[str]:
    """A command line without some flags and their values."""
    kept, dropping = [], False
    for word in words:
        dropping = word in flags if word.startswith("--") else dropping
        if not dropping:
            kept.append(word)
    return kept


LAYOUTS = {
    "tensor parallelism": (1, "--tensor-model-parallel-size 2", ["1", "2"]),
    "pipeline stages and layers": (3, "--pipeline-model-parallel-size 3", ["layers", "pipeline"]),
    "experts and their ranks": (
        3,
        "--num-experts 4 --expert-model-parallel-size 3 --global-batch-size 3",
        ["experts", "parallel_size"],
    ),
    "batch and ranks": (3, "", ["batch_size (4)", "data_parallel_size (3)"]),
    "more experts' ranks than ranks": (1, "--num-experts 4 --expert-model-parallel-size 2", ["(1)", "(2)"]),
    "heads and tensor parallelism": (3, "--tensor-model-parallel-size 3 --padded-vocab-size 129", ["(4)", "(3)"]),
    "experts, tensor parallel alone": (2, "--num-experts 4 --tensor-model-parallel-size 2", ["sequence parallelism"]),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_that_do_not_fit(case, zygote, corpus, tmp_path):
    """Megatron's own checks, as one line."""
    world_size, flags, named = LAYOUTS[case]
    message = refusal(zygote, pico.train(corpus, 1) + flags.split(), tmp_path / "log", world_size)
    assert message.startswith("error: Megatron refuses these arguments: ")
    for text in named:
        assert text in message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--moe-router-load-balancing-type aux_loss global_aux_loss", "moe_aux_loss_coeff must be a list"),
        ("--recompute-granularity selective --recompute-modules moe_act", "moe_act"),
        ("--moe-router-padding-for-quantization", "fp8"),
    ],
)
def test_configurations_that_do_not_fit(flags, said, zygote, corpus, tmp_path):
    """What Megatron checks when it makes its configuration, after the command line, or even the model."""
    line = refusal(zygote, pico.train(corpus, 1, moe=True) + flags.split(), tmp_path / "log")
    assert said in line


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--eval-interval", "0"], "--eval-interval 0: expected 1 or more"),
        (["--train-iters", "0"], "--train-iters 0: nothing to train"),
        (["--seed", "0"], "--seed 0: Megatron takes positive seeds"),
        (pico.MOE, "--disable-bias-linear"),
    ],
)
def test_what_cannot_be_trained(given, named, zygote, corpus, tmp_path):
    """A budget of nothing, a seed that Megatron does not take, experts with biases in local layers."""
    arguments = pico.train(corpus, 1)
    if given == pico.MOE:
        arguments = without(arguments, "--disable-bias-linear")
    assert named in refusal(zygote, arguments + given, tmp_path / "log")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--btx-no-such-flag", "unrecognized arguments: --btx-no-such-flag; "),
        ("--btx-metric=x", "unrecognized arguments: --btx-metric=x; did you mean --btx-metrics? --help and"),
    ],
)
def test_unknown_flags(flag, said, zygote, corpus, tmp_path):
    """argparse's own refusal, and the flag that may be meant."""
    run = zygote.run(1, [*pico.train(corpus, 1), flag], tmp_path / "log", expect=2)
    assert said in run.text()


def _no_index(prefix: Path) -> None:
    Path(f"{prefix}.idx").unlink()


def _empty(prefix: Path) -> None:
    Path(f"{prefix}.bin").write_bytes(b"")


def _nothing(prefix: Path) -> None:
    Path(f"{prefix}.idx").unlink()
    Path(f"{prefix}.bin").unlink()


@pytest.mark.parametrize("flag", ["--train-data-path", "--valid-data-path", "--data-path"])
@pytest.mark.parametrize(
    ("damage", "named"),
    [(_no_index, "text.idx does not exist"), (_empty, "text.bin is empty"), (_nothing, "text.bin does not exist")],
)
def test_missing_and_empty_datasets(damage, named, flag, zygote, corpus, tmp_path):
    """The flag, the file and the remedy; alone or as one part of a blend."""
    pico.write_corpus(tmp_path / "text", documents=2)
    damage(tmp_path / "text")
    blend = ["0.5", str(corpus), "0.5"] if flag == "--train-data-path" else []
    given = [*without(pico.train(corpus, 1), "--train-data-path"), flag, *blend, str(tmp_path / "text")]
    if flag == "--valid-data-path":
        given += ["--train-data-path", str(corpus)]
    message = refusal(zygote, given, tmp_path / "log")
    assert flag in message and named in message and "tools/preprocess_data.py" in message


def test_no_dataset(zygote, corpus, tmp_path):
    message = refusal(zygote, without(pico.train(corpus, 1), "--train-data-path"), tmp_path / "log")
    assert "no training data" in message and "--train-data-path" in message


@pytest.fixture(scope="module")
def mixture(dense, tmp_path_factory) -> Path:
    """A mixture whose routers count as trained: a fresh one leaves its routing open (test_routing_methods.py)."""
    folder = tmp_path_factory.mktemp("mixture")
    fresh = mix(dict.fromkeys("abcd", dense), folder / "mix")
    return rewrite(fresh, folder / "trained", arguments={"btx_untrained_routers": None})


CHANGES = {
    "norm epsilon": (False, "--norm-epsilon 1e-3", ["--norm-epsilon", "1e-05", "0.001", "layernorm_epsilon"]),
    "rotary base": (False, "--rotary-base 500", ["--rotary-base", "10000", "500", "rotary_base"]),
    "rope scaling": (False, "--use-rope-scaling", ["--use-rope-scaling", "False", "True"]),
    "ffn size": (False, "--ffn-hidden-size 96", ["--ffn-hidden-size", "48", "96"]),
    "vocabulary": (False, "--padded-vocab-size 256", ["--padded-vocab-size", "128", "256"]),
    "tokenizer": (False, "--vocab-size 95", ["NullTokenizer of 96", "NullTokenizer of 95", "tokenizer_model"]),
    "a dense model from a mixture": (True, "", ["--num-experts", "4", "None"]),
    "number of experts": (True, f"{' '.join(pico.MOE)} --num-experts 2", ["--num-experts", "4", "2"]),
    "router top-k": (True, f"{' '.join(pico.MOE)} --moe-router-topk 1 --moe-router-pre-softmax", ["topk", "2", "1"]),
    "router precision": (True, " ".join(without(pico.MOE, "--moe-router-dtype")), ["--moe-router-dtype", "fp32"]),
    "precision": (False, "--bf16", ["--bf16", "False", "True"]),
    "QK norm": (False, "--qk-layernorm", ["--qk-layernorm", "False", "True"]),
}


OTHER_TENSORS = ("ffn size", "a dense model from a mixture", "number of experts", "QK norm")
"""The weights would not fit, so that allowing the change is not offered."""

RESUMED = ("norm epsilon", "tokenizer", "router top-k", "precision")


@pytest.mark.parametrize(
    ("case", "how"),
    [(case, "start") for case in CHANGES if case != "precision"] + [(case, "resume") for case in RESUMED],
)
def test_another_model_than_the_checkpoints(case, how, dense, mixture, zygote, corpus, tmp_path):
    """Whether it starts from the weights or resumes: flag, both values, and how to allow it where weights fit."""
    moe, flags, named = CHANGES[case]
    source = str(mixture if moe else dense)
    start = ["--pretrained-checkpoint", source] if how == "start" else ["--load", source]
    metrics = tmp_path / "metrics.jsonl"
    message = refusal(zygote, [*pico.train(corpus, 12, metrics), *start, *flags.split()], tmp_path / "log")
    for text in [source, *named]:
        assert text in message
    assert ("--btx-allow-change" in message) == (case not in OTHER_TENSORS)
    assert not metrics.exists()


def test_an_allowed_change_goes_through(dense, zygote, corpus, tmp_path):
    """--btx-allow-change with the name from the refusal: it trains, with another loss."""
    losses = {}
    for name, flags in {"stored": "", "changed": "--norm-epsilon 1e-1 --btx-allow-change layernorm_epsilon"}.items():
        metrics = tmp_path / f"{name}.jsonl"
        arguments = [*pico.train(corpus, 1, metrics), "--pretrained-checkpoint", str(dense), *flags.split()]
        zygote.run(1, arguments, tmp_path / f"log-{name}")
        losses[name] = read_losses(metrics)[1]
    assert abs(losses["stored"] - losses["changed"]) > 1e-4


def test_allowing_one_change_allows_no_other(dense, zygote, corpus, tmp_path):
    flags = ["--norm-epsilon", "1e-3", "--rotary-base", "500", "--btx-allow-change", "layernorm_epsilon"]
    arguments = [*pico.train(corpus, 1), "--pretrained-checkpoint", str(dense), *flags]
    message = refusal(zygote, arguments, tmp_path / "log")
    assert "--rotary-base" in message and "--norm-epsilon" not in message


def sentencepiece_model(file: Path, words: str) -> Path:
    """A real tokenizer, of a few words."""
    import sentencepiece

    file.parent.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 20),
        model_prefix=str(file.with_suffix("")),
        vocab_size=90,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return file


def test_a_tokenizer_of_other_content(dense, zygote, corpus, tmp_path):
    """The same file name with other content is refused, unless allowed; the same content elsewhere is no change."""
    old = sentencepiece_model(tmp_path / "old" / "t.model", "one two three four five six seven")
    new = sentencepiece_model(tmp_path / "new" / "t.model", "eins zwei drei vier sechs sieben zehn")
    moved = Path(shutil.copytree(old.parent, tmp_path / "moved")) / "t.model"
    kind = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(old)}
    source = rewrite(dense, tmp_path / "source", arguments=kind)
    given = [
        *without(pico.train(corpus, 1), "--tokenizer-type", "--vocab-size"),
        "--pretrained-checkpoint",
        str(source),
    ]
    given += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]
    message = refusal(zygote, [*given, str(new)], tmp_path / "log-new")
    assert "tokenizers differ" in message and "--btx-allow-change tokenizer_model" in message
    # The corpus is of another tokenizer than both.
    zygote.run(1, [*given, str(moved), "--btx-allow-change", "dataset_tokenizer"], tmp_path / "log-moved")
    allowed = ["--btx-allow-change", "tokenizer_model", "dataset_tokenizer"]
    zygote.run(1, [*given, str(new), *allowed], tmp_path / "log-allowed")


def test_an_evaluation_of_less_than_a_batch(dense, zygote, corpus, tmp_path):
    """Before a model is built."""
    words = ["--btx-eval-model", f"m={dense}", "--btx-eval-data", f"text={corpus}", "--btx-eval-tokens", "31"]
    words += ["--btx-eval-output", str(tmp_path / "result.json")]
    run = zygote.run(
        1, pico.train(corpus, 1) + words, tmp_path / "log", entry="megatron_btx.evaluation.program", expect=2
    )
    assert "error: --btx-eval-tokens 31: fewer than one batch, expected at least 32: " in run.text()
    assert "initializing" not in run.text()


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_a_damaged_checkpoint(flag, dense, zygote, corpus, tmp_path):
    """One line that names the file, instead of a traceback out of every rank."""
    broken = shutil.copytree(dense, tmp_path / "broken")
    index = broken / "iter_0000010" / ".metadata"
    index.write_bytes(index.read_bytes()[:1000])
    message = refusal(zygote, [*pico.train(corpus, 12), flag, str(broken)], tmp_path / "log")
    assert str(index) in message and "truncated" in message


def test_a_checkpoint_that_is_not_there(zygote, corpus, tmp_path):
    """Never a model that silently starts from random weights."""
    arguments = [*pico.train(corpus, 1), "--pretrained-checkpoint", str(tmp_path / "nowhere")]
    assert f"{tmp_path / 'nowhere'}: no such folder" in refusal(zygote, arguments, tmp_path / "log")


def test_metrics_that_cannot_be_written(zygote, corpus, tmp_path):
    """Found by the last rank alone, which says so."""
    (tmp_path / "file").write_text("")
    arguments = pico.train(corpus, 1, tmp_path / "file" / "metrics.jsonl")
    run = zygote.run(2, arguments, tmp_path / "log", expect=None)
    assert run.codes is not None and run.codes[1] == 2
    assert f"rank 1: error: {tmp_path / 'file'}" in run.text()


def test_a_payload_in_a_runs_own_checkpoint(zygote, corpus, dense, tmp_path):
    """Resumed by two ranks: refused by all of them before they meet; and by PyTorch, where our check finds it inert."""
    for case, value, named in (
        ("seen", payload(tmp_path), "posix.mkdir"),
        ("unseen", Call(compile_helpers), "compile"),
    ):
        root = Path(shutil.copytree(dense, tmp_path / case))
        plant(root / "iter_0000010", "rng_state", value)
        arguments = [*pico.train(corpus, 12), "--load", str(root), "--override-opt-param-scheduler"]
        line = refusal(zygote, arguments, tmp_path / f"{case}-log", 2)
        assert named in line and "could run code" in line and str(root) in line
    assert not (tmp_path / "ran").exists()


LATE = {
    "a window": (1, "--transformer-impl local --window-size (8,0)"),
    "norms of another form": (1, "--transformer-impl local --apply-layernorm-1p"),
    "a warmup without end": (1, "--lr-warmup-iters 4"),
    "a schedule without its end": (1, "--lr-decay-style WSD"),
    "an optimizer of others": (1, "--use-precision-aware-optimizer --use-distributed-optimizer"),
    "the model's own checks": (1, "--recompute-granularity selective --recompute-modules moe_act"),
    "graphs of the model": (1, "--cuda-graph-impl local --cuda-graph-scope full_iteration"),
    "nothing but spread experts": (2, "--expert-model-parallel-size 2 --btx-freeze all-but:experts"),
    "a stage without experts": (
        4,
        "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2 --moe-layer-freq [0,0,1,1]",
    ),
    "a cache that is a file": (1, "--data-cache-path {corpus}.idx/cache"),
}


@pytest.mark.parametrize("case", LATE)
def test_the_check_refuses_what_the_run_refuses(case, zygote, corpus, tmp_path):
    """Also what Megatron would say only when model, optimizer and data are there: the same line."""
    world_size, flags = LATE[case]
    words = pico.train(corpus, 4, moe=True, cache=tmp_path / "cache") + flags.format(corpus=corpus).split()
    run = refusal(zygote, words, tmp_path / "run", world_size)
    check = refusal(zygote, [*words, "--btx-check"], tmp_path / "check", world_size)
    assert check == run
