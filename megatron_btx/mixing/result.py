"""The arguments of a result: what Megatron stores of a model, without what belongs to a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_btx.checkpoint.arguments import MODEL_ARGUMENTS, model_flags
from megatron_btx.tokenizers.vocabulary import TOKENIZER_FILES, as_shell_word


def dense_arguments(first: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model with the weights of ``first``'s kind.

    Only builtin values are kept: newer Megatron versions read arguments under restrictions.
    """
    return {name: value for name, value in first.items() if _is_plain(value)} | {
        "iteration": 0,
        "curr_iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
    }


def mixture_arguments(
    first: Mapping[str, Any], names: Sequence[str], topk: int, ffn: int, frequency: int | list[int]
) -> dict[str, Any]:
    """The arguments of a mixture of the named experts, each of feed-forward size ``ffn``."""
    # What a dense run's launch script may have said of mixtures does not count.
    routing = {argument.name: argument.default for argument in MODEL_ARGUMENTS if argument.moe}
    return (
        dense_arguments(first)
        | routing
        | {
            "btx_experts": list(names),
            # Lasts until the first training run, whose own arguments take the place of these.
            "btx_untrained_routers": True,
            "num_experts": len(names),
            "moe_layer_freq": frequency,
            "moe_ffn_hidden_size": ffn,
            "moe_router_topk": topk,
            # Softmax over the k largest logits alone: gates sum to one, so equal experts give the dense model. With
            # k = 1 that gate would be constant; Megatron demands the full softmax then.
            "moe_router_pre_softmax": topk == 1,
            "moe_router_score_function": "softmax",
            "moe_router_topk_scaling_factor": None,
            "moe_router_dtype": "fp32",
            "moe_shared_expert_intermediate_size": None,
            "moe_grouped_gemm": False,
            "moe_token_dispatcher_type": "alltoall",
        }
    )


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def megatron_args_text(arguments: Mapping[str, Any]) -> str:
    """The flags with which stock Megatron continues from the result, one flag a line, ready for ``$(cat ...)``."""
    lines = model_flags(arguments)
    lines.append(["--seq-length", str(arguments.get("seq_length") or arguments.get("max_position_embeddings"))])
    for name in ("attention_dropout", "hidden_dropout", "init_method_std"):
        if arguments.get(name) is not None:
            lines.append([f"--{name.replace('_', '-')}", str(arguments[name])])
    for name in ("tokenizer_type", *TOKENIZER_FILES, "vocab_size"):
        if arguments.get(name) is not None:
            lines.append([f"--{name.replace('_', '-')}", as_shell_word(str(arguments[name]))])
    for name in ("bf16", "fp16"):
        if arguments.get(name):
            lines.append([f"--{name}"])
    if arguments.get("num_experts"):
        lines.append(["--moe-token-dispatcher-type", "alltoall"])
        lines.append(["--moe-router-load-balancing-type", "aux_loss"])
        lines.append(["--moe-aux-loss-coeff", "0.01"])
    lines.append(["--ckpt-format", "torch_dist"])
    return "\n".join(" ".join(words) for words in lines) + "\n"
