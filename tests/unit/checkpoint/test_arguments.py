"""The table of model arguments: it agrees with Megatron's parser, and its flags give back the values they came from."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace

import pytest

from megatron_btx.checkpoint import arguments
from megatron_btx.checkpoint.arguments import (
    MODEL_ARGUMENTS,
    NUMERICS_ARGUMENTS,
    TENSOR_ARGUMENTS,
    compare_with_stored,
    differences,
    model_flags,
)
from megatron_btx.checkpoint.tokenizers.comparison import check_same_tokenizer
from megatron_btx.engine.checks.resume import check_resume
from megatron_btx.engine.flags import add_routing_arguments
from megatron_btx.ground.errors import InputError


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser())
    add_routing_arguments(parser)
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
    with pytest.raises(InputError, match="tokenizers differ in kind or files.*a: .*b: .*has no model.*do something"):
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


LAYOUT = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "use_distributed_optimizer": False,
    "train_iters": 10,
    "override_opt_param_scheduler": False,
    "use_checkpoint_opt_param_scheduler": False,
    "num_layers": 2,
    "num_experts": None,
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None,
    "untie_embeddings_and_output_weights": True,
    "decoupled_lr": None,
    "lr": 1e-2,
    "min_lr": 1e-3,
    "lr_decay_iters": 10,  # Megatron stores train_iters where it was not given
    "start_weight_decay": 0.1,
    "global_batch_size": 8,
    "btx_freeze": [],
    "btx_lr_multiplier": [],
}
SHARDED = {**LAYOUT, "use_distributed_optimizer": True}
FREE = {**SHARDED, "dist_ckpt_optim_fully_reshardable": True}
MOE = {**LAYOUT, "num_experts": 4}
SAMPLES = {"train_iters": None, "lr_decay_iters": None}
SPREAD = {**MOE, "expert_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("stored", "change", "named"),
    [
        (LAYOUT, {"tensor_model_parallel_size": 2}, None),
        (LAYOUT, {"train_iters": 20}, ["--train-iters 10", "given 20", "--override-opt-param-scheduler"]),
        (LAYOUT, {"train_iters": 20, "override_opt_param_scheduler": True}, None),
        (LAYOUT, {"lr_decay_iters": None}, None),
        (LAYOUT, {"lr_decay_iters": 5}, ["--lr-decay-iters 10", "given 5", "--use-checkpoint-opt-param-scheduler"]),
        (LAYOUT, {"start_weight_decay": 0.2}, ["--weight-decay", "0.1", "given 0.2"]),
        (LAYOUT, {"global_batch_size": 4}, ["--global-batch-size 8", "given 4"]),
        # Megatron stores the steps that it counted; its own command does not have them.
        ({**LAYOUT, "train_samples": 80, "lr_decay_samples": 80}, {**SAMPLES, "lr_decay_samples": None}, None),
        ({**LAYOUT, "train_samples": 80}, {**SAMPLES, "train_samples": 160}, ["--train-samples 80", "given 160"]),
        (
            {**LAYOUT, "train_samples": 80},
            {**SAMPLES, "global_batch_size": 4, "override_opt_param_scheduler": True},
            ["--global-batch-size 8, given 4", "--train-samples", "--pretrained-checkpoint path"],
        ),
        # These rates name the optimizer's groups, whoever decides about the schedule.
        (LAYOUT, {"lr": 0.02, "override_opt_param_scheduler": True}, ["--lr 0.01", "given 0.02", "--pretrained"]),
        (LAYOUT, {"min_lr": 0.0, "override_opt_param_scheduler": True}, ["--min-lr 0.001", "given 0.0", "--save"]),
        (LAYOUT, {"btx_freeze": ["norms"]}, ["--btx-freeze (none)", "given norms", "--pretrained-checkpoint path"]),
        ({**MOE, "btx_freeze": ["all-but:router"]}, {"btx_freeze": []}, ["--btx-freeze experts attention", "(none)"]),
        ({**MOE, "btx_freeze": ["all-but:router,norms,head,embeddings,attention"]}, {"btx_freeze": ["experts"]}, None),
        (MOE, {"btx_freeze": ["router"], "no_load_optim": True}, None),
        (MOE, {"btx_freeze": ["router"], "skip_train": True}, None),
        (MOE, {"btx_lr_multiplier": ["router=3"]}, ["--btx-lr-multiplier (none)", "given router=3.0"]),
        (
            {**MOE, "btx_lr_multiplier": ["router=3", "experts=0.5"]},
            {"btx_lr_multiplier": ["experts=.5", "router=3.0"]},
            None,
        ),
        (LAYOUT, {"use_distributed_optimizer": True}, ["--use-distributed-optimizer", "without"]),
        (SHARDED, {"use_distributed_optimizer": False}, ["--use-distributed-optimizer", "was saved with"]),
        (SHARDED, {"tensor_model_parallel_size": 2}, ["--tensor-model-parallel-size 1", "given 2", "reshardable"]),
        (SHARDED, {"pipeline_model_parallel_size": 2}, ["--pipeline-model-parallel-size 1", "given 2"]),
        (SHARDED, {"tensor_model_parallel_size": 2, "no_load_optim": True}, None),
        (FREE, {"tensor_model_parallel_size": 2}, None),
        (MOE, {"expert_model_parallel_size": 2}, ["--expert-model-parallel-size 1", "one optimizer;", "-size 2"]),
        (SPREAD, {"expert_model_parallel_size": 4}, None),
        (SPREAD, {"expert_model_parallel_size": 1}, ["--expert-model-parallel-size 2", "two optimizers;"]),
        (SPREAD, {"expert_model_parallel_size": 1, "tensor_model_parallel_size": 2}, None),
        (MOE, {"tensor_model_parallel_size": 2}, ["--tensor-model-parallel-size 1", "--expert-tensor-parallel-size 1"]),
        (MOE, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}, None),
        (MOE, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": None}, None),
        ({**MOE, "btx_freeze": ["experts"]}, {"expert_model_parallel_size": 2}, None),
        ({**MOE, "no_save_optim": True}, {"expert_model_parallel_size": 2, "no_load_optim": True}, None),
        ({**MOE, "no_save_optim": True}, {}, ["saved without its optimizer", "--no-load-optim", "--pretrained"]),
    ],
)
def test_what_can_be_resumed(stored, change, named):
    """What Megatron can bring the stored optimizer to passes; the rest is refused with flag, both values and remedy."""
    given = {**stored, "no_save_optim": False, **change}
    if named is None:
        check_resume("path", stored, given)
        return
    with pytest.raises(InputError) as refusal:
        check_resume("path", stored, given)
    for text in ["path", *named]:
        assert text in str(refusal.value)


@pytest.mark.parametrize(("batch", "refused"), [(8, False), (16, False), (4, True)])
def test_a_run_that_would_read_beyond_its_data(batch, refused, tmp_path):
    """Ten steps of smaller batches have fewer samples than four of the old size and six of the new."""
    folder = tmp_path / "iter_0000004"
    folder.mkdir()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    stored = {**LAYOUT, "consumed_train_samples": 32}
    given = {**LAYOUT, "global_batch_size": batch, "override_opt_param_scheduler": True}
    if not refused:
        check_resume(str(folder), stored, given)
        return
    with pytest.raises(InputError, match="has read 32 samples in 4 steps; .*-size 4 .* resume it with 8 or more"):
        check_resume(str(folder), stored, given)


def test_a_finished_run_needs_no_optimizer():
    check_resume("path", {**LAYOUT, "no_save_optim": True}, LAYOUT, done=True)


def test_megatrons_own_checkpoints_are_of_a_run_without_our_flags():
    stored = {name: value for name, value in LAYOUT.items() if not name.startswith("btx_")}
    check_resume("path", stored, LAYOUT)
    with pytest.raises(InputError, match="--btx-freeze .none., given head"):
        check_resume("path", stored, {**LAYOUT, "btx_freeze": ["head"]})


def test_a_change_is_offered_only_where_the_weights_fit(monkeypatch):
    """Sizes decide the tensors: allowing them would end in Megatron's loader. Dense models and mixtures never meet."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_experts": None, "position_embedding_type": "rope"}
    sizes |= {"max_position_embeddings": 64, "btx_allow_change": []}

    def said(stored: dict, given: dict) -> str:
        stand_in = Namespace(folder="f", check_objects=lambda: None, arguments=lambda: sizes | stored)
        monkeypatch.setattr(arguments, "TorchDistReader", lambda _: stand_in)
        monkeypatch.setattr(arguments, "resolve_iteration", lambda path: path)
        monkeypatch.setattr(arguments, "root_of", lambda path: path)
        monkeypatch.setattr(arguments, "with_tokenizer_beside", lambda found, _: found)
        with pytest.raises(InputError) as refusal:
            compare_with_stored("here", sizes | given)
        return str(refusal.value)

    assert {argument.name for argument in MODEL_ARGUMENTS} >= TENSOR_ARGUMENTS
    shapes = said({}, {"hidden_size": 64, "num_layers": 4})
    assert shapes.endswith("Give the stored values: the weights do not fit another --num-layers, --hidden-size")
    both = said({}, {"hidden_size": 64, "rotary_base": 500})
    assert both.endswith(
        "another --hidden-size; for the rest you can allow the change with --btx-allow-change rotary_base"
    )
    assert said({}, {"rotary_base": 500}).endswith("or allow the change with --btx-allow-change rotary_base")
    longer = {"max_position_embeddings": 128}
    assert "--btx-allow-change max_position_embeddings" in said({}, longer)
    learned = {"position_embedding_type": "learned_absolute"}
    assert "--btx-allow-change" not in said(learned, learned | longer)
    for stored, given, what in (
        (None, 4, "a dense model: give it .* without"),
        (4, None, "a mixture: give it .* with "),
    ):
        message = said({"num_experts": stored}, {"num_experts": given})
        assert re.search(what + r".*the mixture's flags", message) and "--btx-allow-change" not in message
    assert "do not fit another --num-experts" in said({"num_experts": 4}, {"num_experts": 2})
