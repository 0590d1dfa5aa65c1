"""What the training program says of a checkpoint that failed: the cause, and a remedy that is true."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_btx.checkpoint.iterations import TRACKER
from megatron_btx.common.errors import MachineError
from megatron_btx.training.run import _checkpointing_failed


def load_checkpoint(cause: Exception) -> None:
    """Fails as Megatron's function of this name does."""
    raise CheckpointException("", {3: (cause, None)})


def save_checkpoint(cause: Exception) -> None:
    raise CheckpointException("", {3: (cause, None)})


@pytest.mark.parametrize(
    ("step", "cause", "said", "remedy"),
    [
        (
            save_checkpoint,
            OSError(28, "No space left on device"),
            "OSError: .* No space",
            "Make room and start the same",
        ),
        # As Megatron reports one in a writing process.
        (save_checkpoint, RuntimeError("Worker failure: error: <class 'OSError'>"), "OSError", "Make room"),
        (
            save_checkpoint,
            RuntimeError("Worker failure"),
            "written .*MiB free.*: RuntimeError: W",
            r"\. Start the same",
        ),
        (load_checkpoint, KeyError("step"), "read: KeyError: 'step'", "flags it was written with, or an older one"),
        (load_checkpoint, KeyError("optimizer.state.exp_avg " * 99), r"KeyError: .{200,300}\[...\]", "--ckpt-step"),
        (load_checkpoint, OSError(5, "Input/output error"), "read: OSError", "or an older one with --ckpt-step"),
    ],
)
def test_a_checkpoint_that_failed(step, cause, said, remedy, tmp_path: Path):
    """Room is asked for where the system refused to write, and never for reading."""
    start = tmp_path / "start"
    start.mkdir()
    (start / TRACKER).write_text("release")
    start_from = {"load": str(start), "pretrained_checkpoint": None, "ckpt_step": None, "finetune": False}
    args = Namespace(save=str(tmp_path / "run"), **start_from)
    with pytest.raises(CheckpointException) as failure:
        step(cause)
    with pytest.raises(Exception, match=f"{said}.*{remedy}") as raised:
        raise _checkpointing_failed(args, failure.value)
    assert str(raised.value).startswith(args.load if step is load_checkpoint else args.save)
    assert isinstance(raised.value, MachineError) == (said == "written .*MiB free.*: RuntimeError: W"), "status 1"
