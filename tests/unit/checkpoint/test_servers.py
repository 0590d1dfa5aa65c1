"""What servers make of a mixture: the table, its words in a plan, and the documentation's copy of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.checkpoint.huggingface.servers import SERVERS, TABLE, deviations, server_lines
from megatron_btx.mixing.cli import main
from tests.support.runner import REPOSITORY
from tests.unit.mixing import folders

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "rope_scaling": None,
}
_QWEN = {"num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": [], "use_sliding_window": False}
CONFIGS = {
    "mixtral": _COMMON | {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": _COMMON | _QWEN | {"model_type": "qwen2_moe", "norm_topk_prob": False},
    "qwen3_moe": _COMMON | _QWEN | {"model_type": "qwen3_moe", "head_dim": 32},
}
"""One of each family that all servers follow."""

WINDOW = {"sliding_window": 4095, "use_sliding_window": True}
CASES = {
    "normalised": ("qwen2_moe", {"norm_topk_prob": True}, {"llama.cpp: computes another model"}),
    "all experts": ("qwen2_moe", {"norm_topk_prob": True, "num_experts_per_tok": 4}, set()),
    "softmax first": ("qwen3_moe", {"norm_topk_prob": False}, {"llama.cpp: computes another model"}),
    "softmax first, all": ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 4}, set()),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [0]}, {"llama.cpp: does not load it"}),
    "tied Qwen2": ("qwen2_moe", {"tie_word_embeddings": True}, {"llama.cpp: does not load it"}),
    "tied Qwen3": ("qwen3_moe", {"tie_word_embeddings": True}, set()),
    "window": ("mixtral", {"sliding_window": 4095}, {"llama.cpp: computes another model"}),
    "window of Qwen": ("qwen3_moe", WINDOW, {"llama.cpp: computes another model"}),
    "window that is off": ("qwen3_moe", WINDOW | {"use_sliding_window": False}, set()),
    "window as long as texts": ("mixtral", {"sliding_window": 4096}, set()),
    "scaled Mixtral": ("mixtral", {"rope_scaling": {"rope_type": "llama3"}}, set()),
    "scaled Qwen": ("qwen3_moe", {"rope_scaling": {"rope_type": "linear"}}, set()),
    "Llama 3 in Qwen": ("qwen3_moe", {"rope_scaling": {"rope_type": "llama3"}}, {"llama.cpp: computes another model"}),
    "dynamic": ("qwen2_moe", {"rope_scaling": {"rope_type": "dynamic"}}, {"llama.cpp: computes another model"}),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_plain_mixtures_are_served_by_all(family):
    assert server_lines(CONFIGS[family]) == ["  servers: computed as by transformers in vLLM, llama.cpp"]


@pytest.mark.parametrize("case", CASES)
def test_conditions(case):
    family, change, expected = CASES[case]
    config = CONFIGS[family] | change
    found = deviations(config)
    assert {f"{server}: {outcome}" for server, (outcome, _) in found.items()} == expected
    lines = server_lines(config)
    for server, (outcome, reasons) in found.items():
        assert sum(f"warning: {server} {outcome}: {'; '.join(reasons)} (" in line for line in lines) == 1
        assert server not in lines[0]


def test_every_condition_is_a_case():
    """A condition that no case meets would be a claim without a test."""
    met = set()
    for family, change, _ in CASES.values():
        config = CONFIGS[family] | change
        met |= {row for row in TABLE if family in row.families and row.holds(config)}
    assert met == set(TABLE)


def test_several_reasons_stand_in_one_line_and_refusals_first():
    config = CONFIGS["qwen2_moe"] | {"norm_topk_prob": True, "tie_word_embeddings": True, "mlp_only_layers": [0]}
    own = [line for line in server_lines(config) if "llama.cpp" in line]
    assert len(own) == 1
    assert own[0].startswith("  warning: llama.cpp does not load it: ")
    assert own[0].count(";") == 2 and "normalises" in own[0].rpartition(";")[2]


def test_nothing_is_said_of_dense_models():
    assert server_lines({"model_type": "llama"}) == []


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.condition)
def test_the_documentation_has_the_same_table(row):
    """A row per condition in docs/formats.md, each server's cell as the table says it."""
    answers = {row.server: f"{row.outcome}: {row.why}"}
    cells = [row.condition, ", ".join(row.families), *(answers.get(server, "follows") for server in SERVERS)]
    assert f"| {' | '.join(cells)} |\n" in (REPOSITORY / "docs" / "formats.md").read_text()


def write_expert(folder: Path, seed: int, with_biases: bool) -> Path:
    """A pico Llama, or with biases on query, key and value a pico Qwen2."""
    config, numbers = dict(folders.CONFIG), folders.llama_tensors(seed)
    if with_biases:
        config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        for key in [key for key in numbers if key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
            numbers[key.replace("weight", "bias")] = torch.zeros(len(numbers[key]))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(folders.safetensors_bytes(numbers))
    return folder


@pytest.mark.parametrize("with_biases", [False, True])
def test_the_plan_names_servers(with_biases, tmp_path, capsys):
    """Of a Hugging Face result, and of none other: here Mixtral, which all follow, and Qwen2-MoE."""
    words = [f"--expert={n}={write_expert(tmp_path / n, at, with_biases)}" for at, n in enumerate("abc")]
    assert main([*words, "--dry-run", "--output-format=hf"]) == 0
    said = capsys.readouterr().out
    assert ("warning: llama.cpp computes another model: it never normalises" in said) is with_biases
    assert f"computed as by transformers in vLLM{'' if with_biases else ', llama.cpp'}\n" in said
    assert main([*words, "--dry-run"]) == 0
    assert "servers:" not in capsys.readouterr().out
