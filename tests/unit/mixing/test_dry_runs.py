"""What is foreseen of conversions before any of them runs, of real model folders, and how a recipe says it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.common.errors import InputError
from megatron_btx.mixing.dry_runs import foresee
from megatron_btx.plan.checks import check_inputs
from megatron_btx.plan.planner import plan_stages
from megatron_btx.recipe.load import parse_recipe
from megatron_btx.recipe.options import say_keys
from tests.quickstart.test_four_models import make_tokenizer
from tests.support import hugging_face

Numbers = dict[str, torch.Tensor]
Edit = Callable[[dict[str, Any], Numbers], None]


def _to_bf16(config: dict[str, Any], numbers: Numbers) -> None:
    config |= {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    numbers |= {name: tensor.bfloat16() for name, tensor in numbers.items()}


def _tie(config: dict[str, Any], numbers: Numbers) -> None:
    config["tie_word_embeddings"] = True
    del numbers["lm_head.weight"]


def _turn_faster(config: dict[str, Any], numbers: Numbers) -> None:
    config["rope_theta"] = 5e5
    config.get("rope_parameters", {})["rope_theta"] = 5e5


def _break(config: dict[str, Any], numbers: Numbers) -> None:
    numbers["model.norm.weight"][-1] = torch.nan


def _widen(config: dict[str, Any], numbers: Numbers) -> None:
    config["intermediate_size"] = 64
    for name, tensor in numbers.items():
        if ".mlp." in name:
            rows, columns = (64, 32) if "down" not in name else (32, 64)
            numbers[name] = tensor.new_zeros(rows, columns)


def _add_token(config: dict[str, Any], numbers: Numbers) -> None:
    config["vocab_size"] = 259
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        numbers[name] = torch.cat([numbers[name], numbers[name][:1]])


FAULTS: dict[str, tuple[Edit, str]] = {
    "dtype": (_to_bf16, r"torch.float32 in seed, torch.bfloat16 in other; .*mix\.take: \{dtype: seed\}"),
    "tied": (_tie, r"configuration: untie_embeddings_and_output_weights: True in seed, False in other"),
    "rotary": (_turn_faster, r"configuration: rotary_base: .*mix\.take: \{rotary_base: seed\} \(or =other\)"),
    "nan": (
        _break,
        r"model\.norm\.weight: .* holds NaN or infinite numbers .*Fetch it again, or take an earlier state",
    ),
    "width": (_widen, r"ffn_hidden_size|intermediate_size"),
    "rows": (_add_token, r"."),
    "bare": (lambda config, numbers: None, r"no tokenizer comes with it.*mix\.allow-other-tokenizer: true"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seed, and beside it one with each fault."""
    place = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1}
    hugging_face.save(hugging_face.make_model(hugging_face.MODELS["qwen2"] | sizes), place / "seed")
    make_tokenizer(place / "seed")
    config, numbers = hugging_face.config_of(place / "seed"), hugging_face.tensors(place / "seed")
    for name, (edit, _) in FAULTS.items():
        other, others = {**config}, {key: tensor.clone() for key, tensor in numbers.items()}
        if "rope_parameters" in other:
            other["rope_parameters"] = {**other["rope_parameters"]}
        edit(other, others)
        hugging_face.write_folder(place / name, other, others)
        if name != "bare":
            make_tokenizer(place / name)
    return place


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_mix_would_refuse_is_foreseen(fault: str, models: Path) -> None:
    words = ["--expert", f"seed={models}/seed", "--expert", f"other={models / fault}", "--output", "result"]
    if fault == "rows":  # of padding, which no token has
        (note,) = foresee(words, {})
        assert note.startswith("seed and other have the same first rows in every matrix: is one model given twice?")
        assert foresee(words, {}, stand_ins=["other"]) == []
        return
    with pytest.raises(InputError) as refusal:
        foresee(words, {})
    assert re.search(FAULTS[fault][1], say_keys(str(refusal.value), "mix"))


def test_another_tokenizer_than_that_of_the_data_is_foreseen(models: Path) -> None:
    """It would be refused by the first program that loads the result, after hours of other stages."""
    words = ["--method=copy", "--expert", f"model={models}/seed", "--output", "result"]
    tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": f"{models}/seed"}
    assert foresee(words, {}, tokenizer) == []
    with pytest.raises(InputError, match=r"tokenizers .*training: \{btx-allow-change: tokenizer_model\}"):
        foresee(words, {}, {"tokenizer_type": "NullTokenizer", "vocab_size": 258})


@pytest.mark.parametrize("order", [("bare", "seed"), ("seed", "bare")])
def test_a_result_has_a_tokenizer_where_one_expert_has(order: tuple[str, str], models: Path) -> None:
    words = [word for name in order for word in ("--expert", f"{name}={models / name}")]
    tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": f"{models}/seed"}
    foresee([*words, "--allow-other-tokenizer", "--output", "result"], {}, tokenizer)


def test_sizes_alone_are_said_to_be_compared(models: Path) -> None:
    words = [word for name in ("one", "two") for word in ("--expert", f"{name}={models}/bare")]
    sizes, twice = foresee([*words, "--output", "result"], {})
    assert sizes == "no source has a tokenizer's files: the sizes of the vocabularies alone are compared"
    assert "one model given twice" in twice


@pytest.fixture
def tree(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe of the seed and one expert that it is to be trained into."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    return {
        "data": {"domains": {"math": {"text": {"train": ["a.txt"]}}, "code": {"text": {"train": ["a.txt"]}}}},
        "seed": {"from": f"{models}/seed"},
        "experts": {"math": {"from": f"{models}/seed"}, "code": {"blend": {"code": 1}, "tokens": 1000}},
        "training": {"seq-length": 32, "micro-batch-size": 1, "global-batch-size": 2, "save-interval": 9},
        "mix": {"experts": ["seed", "math", "code"], "top-k": 2},
        "finetune": {"blend": {"math": 1}, "tokens": 1000},
        "baselines": {"average": True},
        "export": True,
    }


def check(tree: dict[str, Any]) -> list[str]:
    recipe = parse_recipe(tree, "r.yaml")
    stages = plan_stages(recipe)
    return check_inputs(recipe, stages, [stage.name for stage in stages if stage.name != "data"])


@pytest.mark.usefixtures("starts_warm")
def test_every_refusal_is_said_once_with_all_its_stages_and_then_a_server_that_will_not_take_the_export(
    tree: dict[str, Any], models: Path
) -> None:
    """What servers do is known from family, top-k and order, before anything is trained."""
    tree["experts"]["math"]["from"] = f"{models}/dtype"
    with pytest.raises(InputError) as refusal:
        check(tree)
    said = str(refusal.value)
    assert said.startswith("r.yaml: stage mix, average, export: model.embed_tokens.weight: ")
    assert "mix.take: {dtype: seed}" in said and "--" not in said
    tree["mix"]["take"] = {"dtype": "seed"}
    (warning,) = check(tree)
    assert warning.startswith("export: warning: llama.cpp computes another model: it never normalises")


@pytest.mark.usefixtures("starts_warm")
def test_what_a_mix_is_noted_for_is_said_once_with_its_stages(tree: dict[str, Any]) -> None:
    """Of models that are given: what is trained here is its seed's equal until then."""
    tree["mix"] |= {"router-std": 40.0}
    note, routing, server = check(tree)
    assert note.startswith("mix, average, export: seed and math have the same first rows in every matrix")
    assert routing.startswith("mix, export: warning: routing starts") and "a smaller mix.router-std (the" in routing
    assert server.startswith("export: warning: llama.cpp")
