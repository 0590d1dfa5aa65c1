"""Build Megatron's Transformer Engine layers with our routers on the CPU, load a mix into them, and say what they are.

A program of its own, because whether there is a Transformer Engine is settled when Megatron is first imported.
Arguments: the root of a mix of four pico experts; ``real`` or ``stand-ins``; a file for the parameters. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch  # before Transformer Engine: it loads the libraries that are linked to

from megatron_btx.engine.cpu import install_cpu_stand_ins, prepare_environment
from megatron_btx.engine.restricted_loading import restrict_unpickling


def main(mix: Path, kind: str, parameters: Path) -> dict[str, Any]:
    """Facts of four models: sampled top-1 and the paper's balancing, over single and grouped experts."""
    prepare_environment()
    if kind == "stand-ins":
        from tests.support import te_stand_ins

        te_stand_ins.install()
    import transformer_engine  # noqa: F401

    install_cpu_stand_ins()
    restrict_unpickling()
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    assert HAVE_TE
    if kind == "real":  # its modules refuse to be built otherwise
        torch.cuda.is_available = lambda: True
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    facts, loaded = {}, {}
    for routing in ("sampled", "paper"):
        for grouped in (False, True):
            name = f"{routing} {'grouped' if grouped else 'sequential'}"
            model = build(routing, grouped)
            facts[name] = {**describe(model), **load(model, mix)}
            loaded[name] = {key: parameter.detach() for key, parameter in model.named_parameters()}
    torch.save(loaded, parameters)
    return facts


def build(routing: str, grouped: bool) -> Any:
    """A pico mixture whose parameters are all nan."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_btx.model.layers import layer_specs
    from megatron_btx.model.routers import RouterSettings
    from megatron_btx.model.sampling import Annealing, Step

    sampled = routing == "sampled"
    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        moe_ffn_hidden_size=48,
        num_moe_experts=4,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        bias_activation_fusion=False,
        moe_router_topk=1 if sampled else 2,
        moe_router_pre_softmax=sampled,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=grouped,
        transformer_impl="transformer_engine",
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    settings = RouterSettings(Annealing() if sampled else None, not sampled)
    specs = layer_specs(settings, Step())(SimpleNamespace(transformer=config))
    named = {"vocab_size": 128, "max_sequence_length": 32, "position_embedding_type": "rope"}
    model = GPTModel(config, specs, **named, share_embeddings_and_output_weights=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def describe(model: Any) -> dict[str, Any]:
    """What routes in every layer, and the group of every parameter."""
    from megatron_btx.model.groups import group_of

    layers = []
    for layer in model.decoder.layers:
        mlp, router = layer.mlp, layer.mlp.router
        kinds = [type(part).__name__ for part in (mlp, router, mlp.experts)]
        own = router.config is not model.config
        settings = router.settings
        topk = [router.topk, mlp.token_dispatcher.config.moe_router_topk]
        layers.append([*kinds, *topk, own, settings.sampling is not None, settings.paper_balancing])
    groups = {name: group_of(name, False) for name, _ in model.named_parameters()}
    return {"layers": layers, "topk": model.config.moe_router_topk, "groups": groups}


def load(model: Any, mix: Path) -> dict[str, Any]:
    """Load the mix with Megatron's own loader: the tensors that were asked for, and what was not there."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.dist_checkpointing.validation import StrictHandling

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = model.sharded_state_dict(metadata={"singleton_local_shards": False, "dp_cp_group": group})
    asked = {}
    for leaf in nested_values(state):
        for part in nested_values(leaf.build()) if isinstance(leaf, ShardedTensorFactory) else [leaf]:
            if isinstance(part, ShardedTensor):
                asked[part.key] = list(part.global_shape)
    loaded, _, absent = dist_checkpointing.load(state, str(mix / "release"), strict=StrictHandling.RETURN_ALL)
    problems = model.load_state_dict(loaded, strict=False)
    return {"asked": asked, "absent": sorted(absent), "missing": list(problems.missing_keys)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))))
