"""What is watched and what bounds a mixture's start: refused in one line, before Megatron runs."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_btx.checkpoint.iterations import TRACKER
from megatron_btx.common.errors import InputError
from megatron_btx.training import validation
from tests.support import pico


@pytest.fixture
def args(tmp_path: Path) -> Namespace:
    """A mixture that starts from a mix, watched on two domains."""
    text = pico.write_corpus(tmp_path / "text", 5)
    return Namespace(
        btx_valid_data=[f"one={text}", f"two={text}"],
        btx_valid_tokens=1024,
        btx_first_loss_bound=None,
        num_layers=2,
        moe_layer_freq=1,
        untie_embeddings_and_output_weights=True,
        padded_vocab_size=128,
        num_experts=4,
        skip_train=False,
        pretrained_checkpoint=str(tmp_path / "mix"),
        load=None,
        ckpt_step=None,
        finetune=False,
        eod_mask_loss=False,
        seq_length=32,
        micro_batch_size=1,
        data_parallel_size=1,
        pipeline_model_parallel_size=1,
    )


def evaluation(file: Path, *losses: float) -> str:
    """An evaluation of as many experts as losses, equal on both domains."""
    models = {f"expert {n}": {"losses": {"one": loss, "two": loss}} for n, loss in enumerate(losses)}
    file.write_text(json.dumps({"models": models}))
    return str(file)


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        ("-1", "expected a loss above 0"),
        ("nan", "expected a loss above 0"),
        ("inf", "expected a loss above 0"),
        ("", "expected a loss above 0"),
        ("{tmp}", "is no result of megatron_btx.evaluate .* is no file, .*; evaluate the experts"),
        ("{tmp}/nothing.json", "is no result of megatron_btx.evaluate .* does not exist; .*; evaluate the experts"),
        ('{"models": {}}', "holds no model; evaluate the experts"),
        ('{"models": {"a": {"losses": {"one": 1.0}}}}', "has no 'two'; evaluate the experts .* .one, two."),
        ("[]", "is no result of megatron_btx.evaluate"),
        ("no JSON", "is no result of megatron_btx.evaluate"),
        ((1.0, math.nan), "the loss of expert 1 on one is nan, expected above 0"),
        ((1.0, math.inf), "the loss of expert 1 on one is inf"),
        ((-1.0, 1.0), "the loss of expert 0 on one is -1.0"),
        (
            '{"models": {"a": {"losses": {"one": 1.0, "two": 1.0}}}, "eod_mask_loss": true}',
            "measured with --eod-mask-loss and this run",
        ),
    ],
)
def test_what_is_no_bound(bound, said, args, tmp_path):
    """Neither a number of nats nor an evaluation that bounds something: flag, what was found, remedy."""
    file = tmp_path / "bound.json"
    if isinstance(bound, tuple):
        bound = evaluation(file, *bound)
    elif bound.startswith(("{tmp}", "-")) or bound in ("", "nan", "inf"):
        bound = bound.replace("{tmp}", str(tmp_path))
    else:
        file.write_text(bound)
        bound = str(file)
    args.btx_first_loss_bound = bound
    with pytest.raises(InputError, match=f"^--btx-first-loss-bound {bound}: .*{said}"):
        validation.check(args)


def test_bounds(args, tmp_path):
    """By default that of guessing; a number; the worst expert of every domain."""
    validation.check(args)
    assert validation.find_bounds(args) == math.log(128)
    args.btx_first_loss_bound = "2.5"
    assert validation.find_bounds(args) == 2.5
    args.btx_first_loss_bound = evaluation(tmp_path / "bound.json", 1.0, 3.0, 2.0)
    validation.check(args)
    assert validation.find_bounds(args) == {"one": (3.0, "expert 1"), "two": (3.0, "expert 1")}


@pytest.mark.parametrize(
    ("given", "due"),
    [
        ({}, [4, 8, 10]),
        ({"exit_interval": 3}, [3, 4, 6, 8, 9, 10]),
        ({"start_eval_at_iter": 5}, [8, 10]),
    ],
)
def test_when_losses_are_taken(given, due):
    """At --eval-interval and after the last step, where Megatron's flags say when that is."""
    args = Namespace(
        **{"train_iters": 10, "eval_interval": 4, "exit_interval": None, "start_eval_at_iter": None} | given
    )
    assert [done for done in range(1, 11) if validation.is_due(done, args)] == due


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"btx_valid_tokens": 31}, "--btx-valid-tokens 31: fewer than one batch"),
        ({"seq_length": 1024}, "--btx-valid-data one=.* holds 366 tokens, fewer than one batch"),
        ({"btx_valid_data": ["one={text}", "mean={text}"]}, "--btx-valid-data mean=.* rename it"),
        ({"skip_train": True}, "--btx-valid-data: --skip-train takes no step .* megatron_btx.evaluate"),
        ({"btx_first_loss_bound": "2", "num_experts": None}, "--btx-first-loss-bound 2: the model has no experts"),
        ({"btx_first_loss_bound": "2", "pretrained_checkpoint": None}, "bound 2: no checkpoint is loaded"),
        (
            {"btx_first_loss_bound": "2", "skip_train": True, "btx_valid_data": []},
            "--btx-first-loss-bound 2: --skip-train takes no step; leave it out",
        ),
    ],
)
def test_what_cannot_be_watched(change, said, args):
    text = args.btx_valid_data[0].partition("=")[2]
    if "btx_valid_data" in change:
        change = change | {"btx_valid_data": [word.format(text=text) for word in change["btx_valid_data"]]}
    with pytest.raises(InputError, match=said):
        validation.check(Namespace(**vars(args) | change))


@pytest.mark.parametrize(
    ("loaded", "starts"),
    [({}, False), ({"pretrained_checkpoint": "{mix}"}, True), ({"load": "{mix}"}, True), ({"load": "{new}"}, False)],
)
def test_a_mix_may_come_by_either_flag(loaded, starts, args, tmp_path):
    """Also by --load, which takes a release without --finetune; a folder without a checkpoint is none."""
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / TRACKER).write_text("release")
    folders = {"mix": tmp_path / "mix", "new": tmp_path / "new"}
    given = {"pretrained_checkpoint": None} | {flag: path.format(**folders) for flag, path in loaded.items()}
    assert validation.starts_from_a_mix(Namespace(**vars(args) | given)) == starts
