"""The table of model arguments: it agrees with Megatron's parser, and its flags give back the values they came from."""

from __future__ import annotations

import argparse

import pytest

from megatron_btx.checkpoint.arguments import (
    MODEL_ARGUMENTS,
    NUMERICS_ARGUMENTS,
    differences,
    model_flags,
)
from megatron_btx.common.errors import InputError
from megatron_btx.engine.flags import add_own_arguments
from megatron_btx.tokenizers.comparison import check_same_tokenizer


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser())
    add_own_arguments(parser)
    return parser


OTHER_VALUES = {
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "softmax_type": "learnable",
    "moe_router_score_function": "sigmoid",
    "moe_router_dtype": "fp64",
    "moe_token_drop_policy": "position",
    "window_size": (8, 0),
    "moe_layer_freq": [0, 1, 1, 1],
    "no_rope_freq": 4,
    "window_attn_skip_freq": [0, 1],
    "transformer_impl": "local",
    "padded_vocab_size": 512,
}


def other_value(argument) -> object:
    """A value that is not Megatron's default."""
    if argument.switch is not None:
        return argument.switch
    if argument.name in OTHER_VALUES:
        return OTHER_VALUES[argument.name]
    return {float: 0.25, int: 3, type(None): 3}[type(argument.default)]


@pytest.mark.parametrize("argument", [*MODEL_ARGUMENTS, *NUMERICS_ARGUMENTS], ids=lambda argument: argument.name)
def test_every_row_agrees_with_megatrons_parser(argument, parser):
    """Name, flag, default, and that the written flag is parsed to the value again."""
    action = next(action for action in parser._actions if action.dest == argument.name)
    assert argument.flag in action.option_strings
    if argument.name != "num_query_groups":  # written only with --group-query-attention, which has to name it
        assert parser.get_default(argument.name) == argument.default
    value = other_value(argument)
    words = argument.as_flags(value)
    assert words[0] == argument.flag
    parsed = getattr(parser.parse_args(words), argument.name)
    assert parsed == value or float(parsed) == value
    assert argument.as_flags(argument.default) == []


def test_flags_of_a_dense_model_name_no_experts(parser):
    stored = {"num_layers": 2, "hidden_size": 8, "moe_router_topk": 1, "moe_layer_freq": 2, "num_query_groups": 4}
    words = [word for line in model_flags(stored) for word in line]
    assert words == ["--num-layers", "2", "--hidden-size", "8"]


def test_older_names_of_arguments():
    """Checkpoints of older versions say norm_epsilon; the present name wins where both are there."""
    assert differences({"norm_epsilon": 1e-6}, {"layernorm_epsilon": 1e-6}) == []
    ((argument, left, right),) = differences({"norm_epsilon": 1e-6}, {"norm_epsilon": 1e-5})
    assert (argument.flag, left, right) == ("--norm-epsilon", 1e-6, 1e-5)
    assert differences({"apply_layernorm_1p": True}, {"layernorm_zero_centered_gamma": True}) == []


def test_mixtures_settings_count_for_mixtures_alone():
    dense, other = {"moe_router_topk": 2}, {"moe_router_topk": 4}
    assert differences(dense, other) == []
    found = differences({**dense, "num_experts": 4}, {**other, "num_experts": 4})
    assert [argument.flag for argument, _, _ in found] == ["--moe-router-topk"]
    assert [argument.flag for argument, _, _ in differences({"num_experts": 4}, {})] == ["--num-experts"]
    same_size = {"num_experts": 2, "ffn_hidden_size": 48}
    assert differences({**same_size, "moe_ffn_hidden_size": 48}, same_size) == []


def tokenizer(path, kind="HuggingFaceTokenizer") -> dict:
    return {"tokenizer_type": kind, "tokenizer_model": str(path)}


def test_tokenizer_folders_are_compared_by_content(tmp_path):
    """Equal files in two folders are one tokenizer, whatever else lies there; one other byte makes two."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("{}")
        (tmp_path / name / "vocab.txt").write_text("x")
        (tmp_path / name / "model.safetensors").write_text(name)
    sources = {name: tokenizer(tmp_path / name) for name in ("a", "b")}
    check_same_tokenizer(sources, "do something")
    (tmp_path / "b" / "vocab.txt").write_text("y")
    with pytest.raises(
        InputError,
        match="tokenizers differ in kind or files.*a: .*b: .*cannot be read.*do something",
    ):
        check_same_tokenizer(sources, "do something")


def test_a_folder_without_a_tokenizer_is_not_compared(tmp_path):
    """Two folders in which nothing is recognised are not equal but unknown."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text(name)
    with pytest.raises(InputError, match="cannot be found"):
        check_same_tokenizer({name: tokenizer(tmp_path / name) for name in ("a", "b")}, "do something")


def test_another_kind_with_the_same_file(tmp_path):
    (tmp_path / "t.model").write_text("x")
    kinds = {kind: tokenizer(tmp_path / "t.model", kind) for kind in ("Llama2Tokenizer", "SentencePieceTokenizer")}
    with pytest.raises(InputError, match="tokenizers differ"):
        check_same_tokenizer(kinds, "do something")
