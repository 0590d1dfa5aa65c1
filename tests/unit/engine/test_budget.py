"""How long a run is, and whether it is done: by steps, by samples, by a schedule of batch sizes."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from megatron.core import num_microbatches_calculator as calculator

from megatron_btx.checkpoint.iterations import TRACKER
from megatron_btx.common.errors import InputError
from megatron_btx.engine.checks import refuse
from megatron_btx.engine.checks.arguments import budget_of, of_budget
from megatron_btx.engine.checks.start import finished


@pytest.fixture
def args(tmp_path: Path) -> Namespace:
    """A run of twelve steps that has checkpoints of the fourth and the last."""
    for step in (4, 12):
        folder = tmp_path / "run" / f"iter_{step:07d}"
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (tmp_path / "run" / TRACKER).write_text("12")
    return Namespace(
        load=str(tmp_path / "run"),
        pretrained_checkpoint=None,
        ckpt_step=None,
        override_ckpt_iteration=None,
        finetune=False,
        skip_train=False,
        train_iters=12,
        train_samples=None,
        global_batch_size=4,
        step_batch_size_schedule=None,
        iterations_to_skip=[],
        rank=0,
    )


SAMPLES = {"train_iters": None, "train_samples": 48}


@pytest.mark.parametrize(
    ("change", "done"),
    [
        ({}, True),
        ({"train_iters": 13}, False),
        (SAMPLES, True),
        ({**SAMPLES, "train_samples": 51}, True),  # the incomplete batch is no step
        ({**SAMPLES, "train_samples": 52}, False),
        ({"ckpt_step": 4}, False),
        ({"ckpt_step": 12}, True),
        ({"override_ckpt_iteration": 2}, False),
        ({"finetune": True}, False),
        ({"skip_train": True}, False),
        ({"load": None}, False),
        ({"load": "/nowhere"}, False),
    ],
)
def test_a_finished_run(change, done, args):
    """Told by the checkpoint that will be loaded, which need not be the last."""
    assert bool(finished(Namespace(**vars(args) | change))) == done


def test_a_mix_is_no_finished_run(args, tmp_path):
    (tmp_path / "run" / "iter_0000012").rename(tmp_path / "run" / "release")
    (tmp_path / "run" / TRACKER).write_text("release")
    assert not finished(args)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_iters": 0}, "--train-iters 0: nothing to train"),
        ({**SAMPLES, "train_samples": 3}, "--train-samples 3: fewer than one batch of 4"),
        ({**SAMPLES, "iterations_to_skip": [5, 12]}, "--iterations-to-skip 12: it is the last step"),
    ],
)
def test_a_budget_that_cannot_be(change, said, args):
    with pytest.raises(InputError, match=said):
        refuse(of_budget(Namespace(**vars(args) | change)))


def test_a_schedule_of_batch_sizes(args):
    """Two batches of 2, then batches of 4: 8 samples are three steps, 10 end within the fourth."""
    calculator.init_num_microbatches_calculator(0, None, None, 1, 1, False, "0:2 4:4")
    try:
        given = Namespace(**vars(args) | {**SAMPLES, "train_samples": 8, "step_batch_size_schedule": "0:2 4:4"})
        refuse(of_budget(given))
        assert budget_of(given) == (3, 8)
        given.train_samples = 10
        with pytest.raises(InputError, match="--train-samples 10: ends within a batch .* step 4 ends at 12; give that"):
            refuse(of_budget(given))
    finally:
        calculator.unset_num_microbatches_calculator()
