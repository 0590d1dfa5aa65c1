"""Our routers in Megatron's Transformer Engine layers, and a mix loaded into them: built on the CPU, nothing computed.

With the real Transformer Engine too where it is installed; else with stand-ins for its modules
(tests/support/te_stand_ins.py).
Megatron's wrappers, specifications, keys and loader are its own either way.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from megatron_btx.checkpoint.iterations import resolve_iteration
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from tests.support.runner import REPOSITORY


def kinds() -> list[str]:
    try:
        version("transformer_engine_torch")
    except PackageNotFoundError:
        return ["stand-ins"]
    return ["stand-ins", "real"]


@pytest.fixture(scope="module", params=kinds())
def built(request, four_experts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """Facts of the models, and their parameters after loading."""
    parameters = tmp_path_factory.mktemp("te") / "parameters.pt"
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.te_program", str(four_experts), request.param]
    done = subprocess.run([*command, str(parameters)], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), torch.load(parameters)


CASES = [f"{routing} {experts}" for routing in ("sampled", "paper") for experts in ("sequential", "grouped")]


@pytest.mark.parametrize("case", CASES)
def test_routers_in_transformer_engine_layers(case, built):
    """Every layer has our router; under sampling the first takes all experts, by a configuration of its own."""
    model = built[0][case]
    experts = {"sequential": "SequentialMLP", "grouped": "TEGroupedMLP"}[case.split()[1]]
    soft = ["SoftMoELayer", "BTXRouter", experts, 4, 4, True, False, False]
    sampled = ["MoELayer", "BTXRouter", experts, 1, 1, False, True, False]
    paper = ["MoELayer", "BTXRouter", experts, 2, 2, False, False, True]
    assert model["layers"] == ([soft, *[sampled] * 3] if case.startswith("sampled") else [paper] * 4)
    assert model["topk"] == (1 if case.startswith("sampled") else 2)


@pytest.mark.parametrize("case", CASES)
def test_groups_of_transformer_engine_names(case, built):
    """--btx-freeze knows its names."""
    layer = "decoder.layers.3."
    found = {n.removeprefix(layer): g for n, g in built[0][case]["groups"].items() if n.startswith(layer)}
    matrices = ["local_experts.{}.linear_fc1.weight", "local_experts.{}.linear_fc2.weight"]
    if case.endswith("grouped"):
        matrices = ["linear_fc1.weight{}", "linear_fc2.weight{}"]
    assert found == {
        "self_attention.linear_qkv.layer_norm_weight": "norms",
        "self_attention.linear_qkv.weight": "attention",
        "self_attention.linear_proj.weight": "attention",
        "pre_mlp_layernorm.weight": "norms",
        "mlp.router.weight": "router",
        **{f"mlp.experts.{matrix.format(number)}": "experts" for matrix in matrices for number in range(4)},
    }


@pytest.mark.parametrize("case", CASES)
def test_a_mix_loads_into_transformer_engine_layers(case, built, four_experts):
    """Every key and extra state that is asked for is there, and every parameter is the mix's, bit for bit."""
    model, parameters = built[0][case], built[1][case]
    assert (model["absent"], model["missing"], len(model["asked"])) == ([], [], 10)
    reader = TorchDistReader(resolve_iteration(four_experts))
    for key, shape in model["asked"].items():
        whole = reader.read(key, (0,) * len(shape), tuple(shape))
        for name, part in parts_of(key, whole, case.endswith("grouped")):
            assert torch.equal(parameters.pop(name), part), name
    assert not parameters


def parts_of(key: str, whole: torch.Tensor, grouped: bool):
    """The parameters that a tensor of the checkpoint holds."""
    if not key.startswith("decoder.layers."):
        yield key, whole
        return
    for layer, of_layer in enumerate(whole):
        name = key.replace("layers.", f"layers.{layer}.")
        if ".experts.experts." not in name:
            yield name, of_layer
            continue
        for expert, part in enumerate(of_layer):
            single = name.replace("experts.experts", f"experts.local_experts.{expert}")
            yield (name.replace("experts.experts", "experts") + str(expert) if grouped else single), part
