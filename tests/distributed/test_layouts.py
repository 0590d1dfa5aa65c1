"""One mixed checkpoint trains one curve, whatever the layout: TP x PP x VPP x EP x DP, either optimizer."""

from __future__ import annotations

import pytest

from tests.support import pico
from tests.support.runner import read_losses

TOLERANCE = 1e-5
"""Some steps of fp32 training whose sums are taken in other orders; measured: under 1e-6."""
STEPS = 6

TP = "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"
LAYOUTS = {
    "1": (1, ""),
    "dp2": (2, ""),
    "ep2": (2, "--expert-model-parallel-size 2"),
    "tp2": (2, TP),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2-vpp2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "tp2-ep2": (2, f"{TP} --expert-model-parallel-size 2"),
    "pp2-ep2": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
    "ep4": (4, "--expert-model-parallel-size 4"),
}


@pytest.fixture(scope="module")
def train(four_experts, zygote, corpus, tmp_path_factory):
    """Some steps under a layout: the losses."""
    known = {}

    def losses(layout: str, distributed_optimizer: bool) -> dict[int, float]:
        key = (layout, distributed_optimizer)
        if key not in known:
            folder = tmp_path_factory.mktemp(f"layout-{layout}")
            world_size, flags = LAYOUTS[layout]
            arguments = pico.train(corpus, STEPS, folder / "metrics.jsonl", moe=True) + flags.split()
            arguments += ["--pretrained-checkpoint", str(four_experts)]
            arguments += ["--use-distributed-optimizer"] if distributed_optimizer else []
            zygote.run(world_size, arguments, folder / "log")
            known[key] = read_losses(folder / "metrics.jsonl")
        return known[key]

    return losses


@pytest.mark.parametrize("distributed_optimizer", [False, True], ids=["plain", "distributed-optimizer"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_same_curve(layout, distributed_optimizer, train):
    """Every layout gives the single rank's losses."""
    reference, found = train("1", False), train(layout, distributed_optimizer)
    assert len(reference) == STEPS
    assert reference[STEPS] < reference[1] - 0.3, "it must learn for the comparison to mean anything"
    assert found == pytest.approx(reference, abs=TOLERANCE)
