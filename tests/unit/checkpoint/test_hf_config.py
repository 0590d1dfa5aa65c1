"""Hugging Face configurations as Megatron arguments and back, held against transformers' own reading of them."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from megatron_btx.checkpoint.arguments import MODEL_ARGUMENTS, differences
from megatron_btx.checkpoint.huggingface.config import arguments_from_config
from megatron_btx.checkpoint.huggingface.config_writing import config_from_arguments, refuse_for_megatron
from megatron_btx.checkpoint.huggingface.families import FAMILIES, Family
from megatron_btx.common.errors import InputError
from tests.support.hugging_face import OLDER
from tests.support.public_configurations import MIXTURES, PUBLIC, pico
from tests.support.runner import REPOSITORY

WHERE = "model/config.json"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
MIXTURE = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_layer_freq": 1,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
}
QWEN2_MOE = {**pico(PUBLIC["Qwen2-0.5B"]), "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}
QWEN2_MOE |= {"shared_expert_intermediate_size": 0, "moe_intermediate_size": 24, "num_experts": 4}
QWEN2_MOE |= {"num_experts_per_tok": 2}
BASES = {
    "llama": pico(PUBLIC["Llama-2-7b"]),
    "mistral": pico(PUBLIC["Mistral-7B-v0.1"]),
    "qwen2": pico(PUBLIC["Qwen2-0.5B"]),
    "qwen3": pico(PUBLIC["Qwen3-0.6B"]),
    "mixtral": pico(PUBLIC["Mixtral-8x7B-v0.1"]),
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": pico(PUBLIC["Qwen3-30B-A3B"]),
}


def read(config: dict[str, Any]) -> dict[str, Any]:
    return arguments_from_config(config, WHERE)


def effective(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a configuration, as far as it shapes the model."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    names = (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps vocab_size hidden_act "
        "tie_word_embeddings max_position_embeddings attention_dropout initializer_range attention_bias mlp_bias "
        "num_experts num_experts_per_tok moe_intermediate_size intermediate_size norm_topk_prob qkv_bias "
        "decoder_sparse_step mlp_only_layers shared_expert_intermediate_size use_sliding_window layer_types dtype "
        "rope_parameters"
    ).split()
    found = {name: getattr(made, name, None) for name in names}
    window = getattr(made, "sliding_window", None) if found["use_sliding_window"] in (None, True) else None
    head = getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads
    return found | {"head_dim": head, "window": window, "dtype": str(made.dtype)}


@pytest.mark.parametrize("small", [False, True], ids=["published", "pico"])
@pytest.mark.parametrize("name", PUBLIC)
def test_public_models_round_trip(name: str, small: bool):
    """Arguments -> config -> arguments changes nothing, and transformers sees the same model in both configurations."""
    config = pico(PUBLIC[name]) if small else PUBLIC[name]
    arguments = read(config)
    refuse_for_megatron(arguments, WHERE)
    for base in (config, None):
        assert read(config_from_arguments(arguments, base)) == arguments
    written = config_from_arguments(arguments, config)
    assert effective(written) == effective(config)
    assert written["architectures"] == config["architectures"]
    assert {k: written[k] for k in ("bos_token_id", "eos_token_id", "torch_dtype")}.items() <= config.items()


@pytest.mark.parametrize("name", PUBLIC)
def test_arguments_are_what_transformers_computes_with(name: str):
    arguments, seen = read(PUBLIC[name]), effective(PUBLIC[name])
    same = {
        "kv_channels": "head_dim", "num_query_groups": "num_key_value_heads", "layernorm_epsilon": "rms_norm_eps",
        "num_layers": "num_hidden_layers", "padded_vocab_size": "vocab_size", "hidden_size": "hidden_size",
        "max_position_embeddings": "max_position_embeddings", "ffn_hidden_size": "intermediate_size",
    }  # fmt: skip
    assert {a: arguments[a] for a in same} == {a: seen[key] for a, key in same.items()}
    assert arguments["rotary_base"] == seen["rope_parameters"]["rope_theta"]
    assert arguments["use_rope_scaling"] is (seen["rope_parameters"]["rope_type"] == "llama3")
    if arguments["use_rope_scaling"]:
        assert arguments["rope_scaling_factor"] == seen["rope_parameters"]["factor"]
    assert arguments["untie_embeddings_and_output_weights"] is not seen["tie_word_embeddings"]
    assert arguments["window_size"] == (None if seen["window"] is None else (seen["window"] - 1, 0))
    assert arguments["params_dtype"] == seen["dtype"].removeprefix("torch.")
    assert arguments["group_query_attention"] is (seen["num_key_value_heads"] != seen["num_attention_heads"])
    if name in MIXTURES:
        width = seen["moe_intermediate_size"] or seen["intermediate_size"]
        assert (arguments["moe_ffn_hidden_size"], arguments["moe_router_topk"]) == (width, seen["num_experts_per_tok"])


@pytest.mark.parametrize("config", [*PUBLIC.values(), QWEN2_MOE], ids=[*PUBLIC, "Qwen2-MoE"])
def test_what_transformers_5_writes_reads_the_same(config: dict[str, Any]):
    from transformers import CONFIG_MAPPING

    saved = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config)).to_dict()
    assert "rope_theta" not in saved and "torch_dtype" not in saved
    assert read(saved) == read(config)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_absent_keys_have_the_defaults_of_the_classes(family: Family):
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    sizes += ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size")
    config = {k: v for k, v in BASES[family.model_type].items() if k in sizes}
    config |= {"model_type": family.model_type, "num_attention_heads": 32, "hidden_size": 256}
    if family.model_type == "qwen2_moe":
        config["shared_expert_intermediate_size"] = 0
    arguments, seen = read(config), effective(config)
    assert (arguments["num_query_groups"], arguments["kv_channels"]) == (seen["num_key_value_heads"], seen["head_dim"])
    assert arguments["window_size"] == (None if seen["window"] is None else (seen["window"] - 1, 0))
    assert (arguments["rotary_base"], arguments["layernorm_epsilon"]) == (
        seen["rope_parameters"]["rope_theta"],
        seen["rms_norm_eps"],
    )
    assert arguments["params_dtype"] == "float32" and arguments["untie_embeddings_and_output_weights"]
    assert arguments.get("moe_router_pre_softmax", False) is (family.dialect == "qwen_moe")


DEFAULTS = """
import json
from megatron_btx.checkpoint.huggingface.families import FAMILIES, class_defaults
read = "num_key_value_heads head_dim rms_norm_eps rope_theta initializer_range attention_dropout hidden_act".split()
read += "max_position_embeddings sliding_window use_sliding_window max_window_layers tie_word_embeddings".split()
read += "attention_bias mlp_bias qkv_bias norm_topk_prob decoder_sparse_step mlp_only_layers".split()
read += ["shared_expert_intermediate_size"]
print(json.dumps([[f.model_type, {key: class_defaults(f).get(key) for key in read}] for f in FAMILIES]))
"""


def test_both_majors_have_the_same_defaults():
    """What is read does not depend on which of the two is installed."""
    found = []
    for paths in ([REPOSITORY], [OLDER, REPOSITORY]):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        done = subprocess.run([sys.executable, "-c", DEFAULTS], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0] == found[1]
    by_family = dict(found[0])
    assert by_family["mixtral"]["rope_theta"] == 1e6 and by_family["qwen2_moe"]["qkv_bias"] is True


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096, "short_factor": [1.0], "long_factor": [2.0]}
REFUSED_CONFIGS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "architecture": ("llama", {"architectures": ["GPT2LMHeadModel"]}, ("GPT2LMHeadModel", "Qwen3MoeForCausalLM")),
    "model_type": (
        "llama",
        {"architectures": None, "model_type": "gpt2"},
        ("model_type is 'gpt2'", "LlamaForCausalLM"),
    ),
    "contradiction": ("llama", {"model_type": "mistral"}, ("model_type is 'mistral'", "'llama'")),
    "activation": ("llama", {"hidden_act": "gelu"}, ("hidden_act is 'gelu'", "'silu'")),
    "quantized": ("llama", {"quantization_config": {"bits": 4}}, ("quantization_config",)),
    "attention bias": ("llama", {"attention_bias": True}, ("attention_bias is True",)),
    "attention bias, Mistral": ("mistral", {"attention_bias": True}, ("attention_bias is True",)),
    "attention bias, Qwen3": ("qwen3", {"attention_bias": True}, ("attention_bias is True",)),
    "MLP bias": ("llama", {"mlp_bias": True}, ("mlp_bias is True",)),
    "partial rotary": ("llama", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor is 0.5", "1.0")),
    "partial rotary, 5": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ("rope_parameters.partial_rotary_factor is 0.5",),
    ),
    "rope per layer": ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ("rope_parameters is",)),
    "two bases": ("llama", {"rope_theta": 2.0, "rope_parameters": {"rope_theta": 3.0}}, ("3.0", "rope_theta 2.0")),
    "two scalings": (
        "llama",
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
        ("rope_scaling is", "default"),
    ),
    "a text in a scaling": ("llama", {"rope_scaling": YARN | {"beta_fast": "x"}}, ("rope_scaling.beta_fast is 'x'",)),
    "endless numbers": ("llama", {"rope_scaling": YARN | {"mscale": float("inf")}}, ("rope_scaling.mscale is inf",)),
    "a text for factors": (
        "llama",
        {"rope_scaling": LONG | {"long_factor": "2"}},
        ("rope_scaling.long_factor is '2'",),
    ),
    "factors of none": ("llama", {"rope_scaling": LONG | {"short_factor": []}}, ("rope_scaling.short_factor is []",)),
    "a factor of 0": ("llama", {"rope_scaling": LONG | {"long_factor": [1.0, 0]}}, ("rope_scaling.long_factor is 0",)),
    "no factor": ("llama", {"rope_scaling": {"type": "linear"}}, ("rope_scaling.factor is missing",)),
    "factor as text": ("llama", {"rope_scaling": LLAMA3 | {"factor": "8"}}, ("rope_scaling.factor is '8'",)),
    "head size": ("llama", {"hidden_size": 33}, ("hidden_size is 33", "num_attention_heads 4")),
    "type": ("llama", {"torch_dtype": "int8"}, ("torch_dtype is 'int8'", "bfloat16")),
    "tied": ("llama", {"tie_word_embeddings": "no"}, ("tie_word_embeddings is 'no'", "true or false")),
    "window in some layers": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 1},
        ("max_window_layers 1",),
    ),
    "window by list": (
        "qwen3",
        {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
        ("use_sliding_window is true", "layer_types"),
    ),
    "window read in two ways": (
        "qwen2_moe",
        {"use_sliding_window": True},
        ("use_sliding_window is true", "all layers"),
    ),
    "window off and on": ("qwen2", {"layer_types": ["sliding_attention"] * 2}, ("use_sliding_window is False",)),
    "no window": ("mistral", {"sliding_window": 0}, ("sliding_window is 0", "at least 1")),
    "shared expert": ("qwen2_moe", {"shared_expert_intermediate_size": -8}, ("shared_expert_intermediate_size is -8",)),
    "no width": ("qwen2_moe", {"shared_expert_intermediate_size": None}, ("shared_expert_intermediate_size is None",)),
    "shared expert elsewhere": ("qwen3_moe", {"shared_expert_intermediate_size": 8}, ("size is 8", "expected 0")),
    "top-k": ("mixtral", {"num_experts_per_tok": 5}, ("num_experts_per_tok is 5", "num_experts 4")),
    "two expert counts": ("qwen3_moe", {"num_local_experts": 5}, ("num_local_experts is 5", "num_experts 4")),
    "no mixture": ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, ("mlp_only_layers [0, 1, 2]",)),
    "sparse step": ("qwen3_moe", {"decoder_sparse_step": 0}, ("decoder_sparse_step is 0",)),
    "layer number": ("qwen3_moe", {"mlp_only_layers": [3]}, ("mlp_only_layers is [3]", "0 to 2")),
    "normalised": ("qwen3_moe", {"norm_topk_prob": 1}, ("norm_topk_prob is 1",)),
}


@pytest.mark.parametrize("model_type, change, parts", REFUSED_CONFIGS.values(), ids=REFUSED_CONFIGS)
def test_configurations_are_refused_by_name(model_type: str, change: dict[str, Any], parts: tuple[str, ...]):
    with pytest.raises(InputError) as refusal:
        read(BASES[model_type] | change)
    message = str(refusal.value)
    assert message.startswith(f"{WHERE}: ") and "\n" not in message and "; " in message
    assert all(part in message for part in parts), message


COUNTS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size max_position_embeddings "
    "num_experts num_experts_per_tok moe_intermediate_size num_key_value_heads head_dim"
).split()
NUMBERS = ("rms_norm_eps", "rope_theta", "initializer_range", "attention_dropout")
NEVER = ("8", -1, True, [8], float("nan"), float("inf"))
IMPOSSIBLE = [(key, value) for key in (*COUNTS, *NUMBERS) for value in NEVER]
IMPOSSIBLE += [(key, value) for key in COUNTS for value in (0, 2.5)] + [(key, 0) for key in NUMBERS[:2]]
IMPOSSIBLE += [(key, 2.5) for key in NUMBERS[2:]] + [(key, None) for key in COUNTS[:9]]


@pytest.mark.parametrize("key, value", IMPOSSIBLE)
def test_impossible_numbers_are_refused(key: str, value: object):
    found = "is missing" if value is None else f"is {value!r}"
    with pytest.raises(InputError, match=re.escape(f"{WHERE}: {key} {found}, expected ")):
        read(BASES["qwen3_moe"] | {key: value})


@pytest.mark.parametrize("key", COUNTS[:5])
def test_missing_sizes_are_refused(key: str):
    with pytest.raises(InputError, match=f"^{WHERE}: {key} is missing, expected an integer"):
        read({k: v for k, v in BASES["llama"].items() if k != key})


def test_null_heads_mean_what_the_classes_make_of_them():
    arguments = read(BASES["mistral"] | {"num_key_value_heads": None, "head_dim": None})
    assert (arguments["num_query_groups"], arguments["kv_channels"]) == (8, 8)
    assert not arguments["group_query_attention"]


CARRIED = {
    "other llama3": (LLAMA3 | {"low_freq_factor": 2.0}, "rope_scaling.low_freq_factor is 2.0"),
    "other length": (LLAMA3 | {"original_max_position_embeddings": 4096}, "original_max_position_embeddings is 4096"),
    "yarn": ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, "rope_type is 'yarn'"),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic'"),
    "broken linear": ({"type": "linear", "factor": 2.5}, "rotary_seq_len_interpolation_factor is 2.5"),
}


@pytest.mark.parametrize("scaling, message", CARRIED.values(), ids=CARRIED)
def test_rotary_scalings_megatron_lacks_are_carried_and_refused_for_it(scaling: dict[str, Any], message: str):
    config = BASES["llama"] | {"rope_scaling": scaling}
    arguments = read(config)
    written = config_from_arguments(arguments, config)["rope_scaling"]
    assert written == {k: v for k, v in scaling.items() if k != "type"} | {"rope_type": written["rope_type"]}
    assert written["rope_type"] == scaling.get("rope_type", scaling.get("type"))
    with pytest.raises(InputError, match=f"^{WHERE}: .*{message}, expected .*; convert it"):
        refuse_for_megatron(arguments, WHERE)


def test_linear_scaling_is_megatrons_interpolation():
    arguments = read(BASES["llama"] | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    refuse_for_megatron(arguments, WHERE)
    assert arguments["rotary_seq_len_interpolation_factor"] == 4 and not arguments["use_rope_scaling"]
    made = config_from_arguments({k: v for k, v in arguments.items() if k != "hf_rope_scaling"})
    assert made["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_megatrons_own_rope_scaling_is_written_as_llama_3():
    """A Megatron checkpoint carries no Hugging Face scaling: only the switch and the factor."""
    arguments = read(BASES["llama"]) | {"use_rope_scaling": True, "rope_scaling_factor": 32.0}
    assert config_from_arguments(arguments)["rope_scaling"] == LLAMA3 | {"factor": 32.0}


def test_qwen2_forms_say_biases_and_leave_out_the_usual_head_size():
    arguments = read(BASES["qwen2"]) | MIXTURE
    for bias in (True, False):
        written = config_from_arguments(arguments | {"add_qkv_bias": bias}, QWEN2_MOE)
        assert (written["model_type"], written["qkv_bias"], "head_dim" in written) == ("qwen2_moe", bias, False)
        assert read(written)["add_qkv_bias"] is bias
    assert "head_dim" not in config_from_arguments(read(BASES["qwen2"]))


def test_what_only_hugging_face_can_run_is_refused_for_megatron():
    with pytest.raises(InputError, match="rotary_base is 10000.5"):
        refuse_for_megatron(read(BASES["llama"] | {"rope_theta": 10000.5}), WHERE)
    with pytest.raises(InputError, match="num_experts_per_tok is 1"):
        refuse_for_megatron(read(BASES["mixtral"] | {"num_experts_per_tok": 1}), WHERE)


def test_kinds_of_layers_turn_a_window_off():
    """AutoModel takes a class for Mistral that goes by layer_types; for Mixtral sliding_window alone says it."""
    kinds = {"sliding_window": 8, "layer_types": ["full_attention"] * BASES["mistral"]["num_hidden_layers"]}
    written = config_from_arguments(read(BASES["mistral"] | kinds), BASES["mistral"] | kinds)
    assert read(BASES["mistral"] | kinds)["window_size"] is None and read(written)["window_size"] is None
    assert written["sliding_window"] is None and set(written.get("layer_types") or ()) <= {"full_attention"}


def test_windows_and_dense_layers_round_trip():
    """Every family that has them says them in a way that transformers reads as meant."""
    for model_type, base in BASES.items():
        arguments = read(base) | {"window_size": (7, 0)}
        written = config_from_arguments(arguments, base)
        assert read(written)["window_size"] == (7, 0) and effective(written)["window"] == 8
        assert set(effective(written)["layer_types"] or ()) <= {"sliding_attention"}
        assert written["model_type"] == ("mistral" if model_type == "llama" else model_type)
    for model_type in ("qwen2_moe", "qwen3_moe"):
        layers = BASES[model_type]["num_hidden_layers"]
        for frequency in ([0] + [1] * (layers - 1), 2):
            arguments = read(BASES[model_type]) | {"moe_layer_freq": frequency}
            pattern = [0, 1, 1][:layers] if isinstance(frequency, list) else [1, 0, 1][:layers]
            assert read(config_from_arguments(arguments))["moe_layer_freq"] == pattern
    assert read(BASES["qwen3_moe"] | {"decoder_sparse_step": 2})["moe_layer_freq"] == [0, 1, 0]


@pytest.mark.parametrize(
    "source, change, base, expected",
    [
        ("llama", {}, None, "LlamaForCausalLM"),
        ("llama", {}, "mistral", "MistralForCausalLM"),
        ("llama", {"window_size": (7, 0)}, "llama", "MistralForCausalLM"),
        ("llama", {"window_size": (-1, -1)}, "llama", "LlamaForCausalLM"),
        ("llama", {"hidden_size": 34}, "llama", "MistralForCausalLM"),
        ("qwen2", {}, "llama", "Qwen2ForCausalLM"),
        ("qwen2", {"kv_channels": 12}, None, "Qwen2ForCausalLM"),
        ("qwen3", {}, None, "Qwen3ForCausalLM"),
        ("llama", MIXTURE, "llama", "MixtralForCausalLM"),
        ("llama", MIXTURE | {"moe_router_topk": 4, "moe_router_pre_softmax": True}, None, "MixtralForCausalLM"),
        ("qwen2", MIXTURE, "qwen2", "Qwen2MoeForCausalLM"),
        ("qwen2", MIXTURE | {"moe_router_pre_softmax": True}, "qwen2", "Qwen2MoeForCausalLM"),
        ("qwen3", MIXTURE, "qwen3", "Qwen3MoeForCausalLM"),
    ],
)
def test_the_architecture_that_can_say_the_model_is_chosen(
    source: str, change: dict[str, Any], base: str | None, expected: str
):
    arguments = read(BASES[source]) | change
    written = config_from_arguments(arguments, BASES[base] if base else None)
    assert written["architectures"] == [expected]
    again = read(written)
    changed = {argument.name for argument, _, _ in differences(arguments, again)}
    # Allowed: Mixtral has one width; with all experts chosen both orders are one; a window of all keys is none.
    allowed = {"ffn_hidden_size"}
    allowed |= {"moe_router_pre_softmax"} if change.get("moe_router_topk") == 4 else set()
    allowed |= {"window_size"} if change.get("window_size") == (-1, -1) else set()
    assert changed <= allowed
    assert again["kv_channels"] == effective(written)["head_dim"]


OTHER_VALUES = {
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "softmax_type": "learnable",
    "swiglu": False,
    "add_bias_linear": True,
    "window_attn_skip_freq": [0, 1],
    "moe_router_score_function": "sigmoid",
}
TRANSLATED_OR_WITHOUT_EFFECT = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention num_query_groups kv_channels "
    "layernorm_epsilon add_position_embedding max_position_embeddings rotary_base use_rope_scaling rope_scaling_factor "
    "rotary_seq_len_interpolation_factor add_qkv_bias qk_layernorm window_size untie_embeddings_and_output_weights "
    "padded_vocab_size num_experts moe_layer_freq moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax "
    "mup_base_hidden_size mup_base_head_dim mup_embedding_mult mup_output_mult mup_attn_scale_power moe_router_dtype "
    "moe_token_drop_policy"
).split()


@pytest.mark.parametrize("name", [a.name for a in MODEL_ARGUMENTS if a.name not in TRANSLATED_OR_WITHOUT_EFFECT])
def test_arguments_without_a_key_are_refused(name: str):
    """Every row of the table is either translated or refused when it has another value."""
    argument = next(argument for argument in MODEL_ARGUMENTS if argument.name == name)
    value = OTHER_VALUES.get(name, True if argument.switch is not None else 3)
    with pytest.raises(InputError, match=f"^the model's arguments: {name} is {value!r}, expected ".replace("[", r"\[")):
        config_from_arguments(read(BASES["llama"]) | MIXTURE | {name: value})


REFUSED_ARGUMENTS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "soft first layer": ("llama", MIXTURE | {"btx_sample_top1": True}, ("btx_sample_top1 is True",)),
    "biases and norms": ("qwen3", {"add_qkv_bias": True}, ("add_qkv_bias is True", "qk_layernorm True")),
    "dense layers": ("llama", MIXTURE | {"moe_layer_freq": [0, 1]}, ("moe_layer_freq is [0, 1]", "Mixtral")),
    "pre-softmax": ("llama", MIXTURE | {"moe_router_pre_softmax": True}, ("moe_router_pre_softmax is True", "Mixtral")),
    "top-k": ("llama", MIXTURE | {"moe_router_topk": 5}, ("moe_router_topk is 5", "num_experts 4")),
    "no top-k": ("llama", {"num_experts": 4, "moe_router_topk": None}, ("moe_router_topk is missing",)),
    "head size": ("qwen2", MIXTURE | {"kv_channels": 12}, ("kv_channels is 12", "112/14", "Qwen2-MoE")),
    "window ahead": ("llama", {"window_size": (7, 7)}, ("window_size is (7, 7)", "(keys before, 0)")),
    "window as a number": ("llama", {"window_size": 7}, ("window_size is 7",)),
    "two scalings": (
        "llama",
        {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2},
        ("rotary_seq_len_interpolation_factor is 2", "llama3"),
    ),
    "type": ("llama", {"fp16": False, "params_dtype": "torch.int8"}, ("params_dtype is 'int8'",)),
    "no sizes": ("llama", {"num_layers": None}, ("num_layers is missing",)),
    "base as text": ("llama", {"rotary_base": "1e4"}, ("rotary_base is '1e4'",)),
}


@pytest.mark.parametrize("model_type, change, parts", REFUSED_ARGUMENTS.values(), ids=REFUSED_ARGUMENTS)
def test_arguments_are_refused_by_name(model_type: str, change: dict[str, Any], parts: tuple[str, ...]):
    with pytest.raises(InputError) as refusal:
        config_from_arguments(read(BASES[model_type]) | change, BASES[model_type], "mix/iter_0000000")
    message = str(refusal.value)
    assert message.startswith("mix/iter_0000000: ") and "\n" not in message and "; " in message
    assert all(part in message for part in parts), message


def test_what_is_not_given_is_what_megatron_makes_of_it():
    """A stored namespace may hold None, an older name, or nothing where Megatron has a rule."""
    arguments = read(BASES["llama"])
    stored = {k: v for k, v in arguments.items() if k not in ("layernorm_epsilon", "params_dtype", "fp16")}
    stored |= {"kv_channels": None, "num_query_groups": None, "padded_vocab_size": None, "norm_epsilon": 1e-5}
    assert differences(read(config_from_arguments(stored)), arguments) == []
    assert config_from_arguments(stored)["torch_dtype"] == "float32"
    assert config_from_arguments(stored | {"bf16": True})["torch_dtype"] == "bfloat16"
    # All rows that are stored take part in the softmax, so all are written.
    assert config_from_arguments(arguments | {"padded_vocab_size": 256})["vocab_size"] == 256
