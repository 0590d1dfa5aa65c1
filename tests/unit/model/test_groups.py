"""Groups of parameters: every name in one group, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_btx.common.errors import BTXError, InputError
from megatron_btx.model.groups import (
    TrainedGroups,
    check_optimizers,
    group_of,
    list_groups,
    resolve_groups,
)
from tests.support import pico

NAMES = {
    "embedding.word_embeddings.weight": "embeddings",
    "module.module.embedding.position_embeddings.weight": "embeddings",
    "decoder.layers.0.input_layernorm.weight": "norms",
    "decoder.layers.0.self_attention.linear_qkv.weight": "attention",
    "decoder.layers.0.self_attention.linear_qkv.bias": "attention",
    "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": "norms",
    "decoder.layers.0.self_attention.q_layernorm.weight": "norms",
    "decoder.layers.0.self_attention.linear_proj.weight": "attention",
    "decoder.layers.0.pre_mlp_layernorm.weight": "norms",
    "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": "norms",
    "decoder.layers.0.mlp.linear_fc1.weight": "mlp",
    "decoder.layers.0.mlp.router.weight": "router",
    "decoder.layers.0.mlp.router.bias": "router",
    "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight": "experts",
    "decoder.layers.0.mlp.experts.linear_fc2.weight3": "experts",
    "decoder.layers.0.mlp.shared_experts.linear_fc1.weight": "mlp",
    "decoder.final_layernorm.bias": "norms",
    "output_layer.weight": "head",
}


def model(**changes: object) -> dict[str, Any]:
    """Arguments of a mixture."""
    settings = {
        "num_experts": 4,
        "num_layers": 4,
        "moe_layer_freq": 1,
        "moe_shared_expert_intermediate_size": None,
        "untie_embeddings_and_output_weights": True,
        "btx_freeze": [],
        "decoupled_lr": None,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
    }
    return {**settings, **changes}


@pytest.mark.parametrize("name", NAMES)
def test_group_of_a_name(name):
    """Local layers and Transformer Engine's."""
    assert group_of(name, tied=False) == NAMES[name]


def test_tied_head_is_embedding():
    """The last stage's copy of a shared embedding must not train where the first stage's stands still."""
    assert group_of("output_layer.weight", tied=True) == "embeddings"


@pytest.mark.parametrize("name", ["mtp.layers.0.eh_proj.weight", "something.else"])
def test_unknown_names_are_refused(name):
    """Rather than trained or frozen by accident."""
    with pytest.raises(BTXError, match=name):
        group_of(name, tied=False)


def test_groups_of_models():
    """What a model has follows from its arguments, on every pipeline stage alike."""
    assert list_groups(model()) == ["experts", "router", "attention", "norms", "embeddings", "head"]
    assert list_groups(model(num_experts=None)) == ["attention", "mlp", "norms", "embeddings", "head"]
    assert "mlp" in list_groups(model(moe_layer_freq=[0, 1, 1, 1]))
    assert "head" not in list_groups(model(untie_embeddings_and_output_weights=False))


def frozen(words: list[str]) -> list[str]:
    return list(resolve_groups(model(btx_freeze=words)).frozen)


def test_frozen_groups():
    """Names, complements and both together."""
    assert frozen([]) == []
    assert frozen(["router", "experts"]) == ["experts", "router"]
    assert frozen(["all-but:router"]) == ["experts", "attention", "norms", "embeddings", "head"]
    assert frozen(["all-but:router,norms"]) == ["experts", "attention", "embeddings", "head"]


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        (["expert"], {}, "no such group; this model has experts, router, attention"),
        (["all-but:routers"], {}, "'routers'"),
        (["mlp"], {}, "this model has none"),
        (["router"], {"num_experts": None}, "this model has none"),
        (["head"], {"untie_embeddings_and_output_weights": False}, "this model has none"),
        (["all-but:router", "router"], {}, "freezes everything"),
        ([""], {}, "''"),
    ],
)
def test_freezing_is_refused(words, changes, said):
    """A group that matches nothing lists what there is; nothing left to train is an error."""
    with pytest.raises(InputError, match=said):
        resolve_groups(model(btx_freeze=words, **changes))


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        (["router"], {}, "expected GROUP=X"),
        (["router=0"], {}, "above zero"),
        (["router=-1"], {}, "above zero"),
        (["router=nan"], {}, "above zero"),
        (["router=inf"], {}, "above zero"),
        (["routers=2"], {}, "no such group"),
        (["router=2", "router=3"], {}, "once"),
        (["router=2"], {"btx_freeze": ["router"]}, "frozen"),
        (["head=2"], {"decoupled_lr": 1e-3}, "decoupled"),
    ],
)
def test_multipliers_are_refused(words, changes, said):
    """The form, the group, and what contradicts another flag."""
    with pytest.raises(InputError, match=said):
        resolve_groups(model(btx_lr_multiplier=words, **changes))


def test_multipliers():
    """Any positive factor."""
    groups = resolve_groups(model(btx_lr_multiplier=["router=10", "experts=1e-2"]))
    assert groups == TrainedGroups((), {"router": 10.0, "experts": 0.01}, is_tied=False)


def test_a_checkpoint_of_megatrons_own_trains_everything():
    """It has no flags of ours."""
    stored = model()
    del stored["btx_freeze"]
    assert resolve_groups(stored) == TrainedGroups((), {}, is_tied=False)


LAYERS = "--num-layers 4 --pipeline-model-parallel-size 2 "
SPREAD = "--expert-model-parallel-size 2 "


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (LAYERS, ""),
        (LAYERS + SPREAD, ""),
        (LAYERS + SPREAD + "--moe-layer-freq [0,0,1,1]", "0 trains no experts, 1 trains experts and more"),
        (LAYERS + SPREAD + "--moe-layer-freq [0,0,1,1] --use-distributed-optimizer", ""),
        (LAYERS + "--moe-layer-freq [0,0,1,1]", ""),
        (
            LAYERS + SPREAD + "--moe-layer-freq [0,1,0,1] --num-layers-per-virtual-pipeline-stage 1",
            "0 trains no experts",
        ),
        (LAYERS + SPREAD + "--moe-layer-freq [0,1,1,0] --num-layers-per-virtual-pipeline-stage 1", ""),
        (LAYERS + SPREAD + "--moe-layer-freq [0,1,1,1] --decoder-first-pipeline-num-layers 1", "0 trains no experts"),
        (
            LAYERS + SPREAD + "--moe-layer-freq [0,1,1,1] --pipeline-model-parallel-layout Et|tttL",
            "0 trains no experts",
        ),
        (LAYERS + SPREAD + "--btx-freeze all-but:experts,embeddings", "1 trains experts alone"),
        (LAYERS + "--btx-freeze all-but:embeddings", "1 trains nothing"),
        ("--btx-freeze all-but:experts " + SPREAD, "nothing but the experts trains"),
        ("--btx-freeze all-but:experts --use-distributed-optimizer " + SPREAD, "nothing but the experts trains"),
        ("--btx-freeze all-but:experts", ""),
    ],
)
def test_what_each_stage_trains(flags, said):
    """From the command line alone, for every way to lay layers on stages."""
    from megatron_btx.model.build import model_config
    from megatron_btx.training.check_stages import _unwrap_single_values, _validate, megatron_parser

    args = megatron_parser().parse_args([*pico.MODEL, *pico.MOE, *pico.TRAINING, "--train-iters", "4", *flags.split()])
    args.world_size, args.rank = 4, 0
    _unwrap_single_values(args)
    _validate(args)
    groups = resolve_groups(vars(args))
    if not said:
        return check_optimizers(args, groups, model_config(args).transformer)
    with pytest.raises(InputError, match=said):
        check_optimizers(args, groups, model_config(args).transformer)
