"""The sizes and parts of a model, and which of its layers are mixtures: read from Megatron's arguments."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from megatron_btx.checkpoint.arguments import MODEL_ARGUMENTS
from megatron_btx.common.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that say how a model's tensors are shaped and fused, and the parts that not every model has."""

    layers: int
    hidden: int
    ffn: int
    expert_ffn: int
    heads: int
    groups: int
    """Query groups, which are the key-value heads."""
    head_size: int
    gated: bool
    experts: int
    """0 for a dense model."""
    mixture_layers: tuple[bool, ...]
    """For each layer whether it is a mixture of experts."""
    parts: frozenset[str]
    """Of what not every model has: "biases" (of linear layers), "qkv biases", "norm biases", "qk norm", "positions"."""
    vocabulary: int | None = None
    positions: int | None = None

    @functools.cached_property
    def extents(self) -> dict[str, int]:
        """The length of every axis of the table of names; -1 where the configuration does not say it."""
        return {
            "V": self.vocabulary or -1,
            "P": self.positions or -1,
            "H": self.hidden,
            "D": self.head_size,
            "Q": self.heads * self.head_size,
            "K": self.groups * self.head_size,
            "F": self.ffn,
            "E": self.experts,
            "X": self.expert_ffn,
        }

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> Sizes:
        """The sizes of a model described by Megatron's arguments."""
        layers, heads = arguments["num_layers"], arguments["num_attention_heads"]
        groups = heads
        if arguments.get("group_query_attention"):
            groups = arguments.get("num_query_groups") or heads
        experts = arguments.get("num_experts") or 0
        mixtures = (False,) * layers
        if experts:
            mixtures = mixture_layers(arguments.get("moe_layer_freq", 1), layers)
        return Sizes(
            layers=layers,
            hidden=arguments["hidden_size"],
            ffn=arguments["ffn_hidden_size"],
            expert_ffn=arguments.get("moe_ffn_hidden_size") or arguments["ffn_hidden_size"],
            heads=heads,
            groups=groups,
            head_size=arguments.get("kv_channels") or arguments["hidden_size"] // heads,
            gated=bool(arguments.get("swiglu") or arguments.get("quick_geglu")),
            experts=experts,
            mixture_layers=mixtures,
            parts=_parts(arguments),
            vocabulary=arguments.get("padded_vocab_size"),
            positions=arguments.get("max_position_embeddings"),
        )


def _parts(arguments: Mapping[str, Any]) -> frozenset[str]:
    value = {argument.name: argument.value(arguments) for argument in MODEL_ARGUMENTS}
    has = {
        "biases": value["add_bias_linear"],
        "qkv biases": value["add_bias_linear"] or value["add_qkv_bias"],
        "norm biases": value["normalization"] == "LayerNorm",
        "qk norm": value["qk_layernorm"] and not value["qk_l2_norm"],
        "positions": value["position_embedding_type"] == "learned_absolute",
    }
    return frozenset(part for part, there in has.items() if there)


def mixture_layers(frequency: int | list[int] | tuple[int, ...] | None, layers: int) -> tuple[bool, ...]:
    """For each layer whether it is a mixture, as Megatron reads ``moe_layer_freq`` (core/models/gpt)."""
    if isinstance(frequency, list | tuple):
        return tuple(map(bool, frequency))
    return tuple(layer % (frequency or 1) == 0 for layer in range(layers))


def layer_frequency(text: str) -> int | tuple[int, ...]:
    """``--moe-layer-freq`` as a text, read without running it.

    A number, or a list built with + and *, as [0,1,1,0] or ([0]+[1]*3)*2. Raises InputError for anything else.
    """
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError) as error:
        raise InputError(
            f"--moe-layer-freq {text}: expected a number, or a list of 0 and 1 as [0,1,1,0] or ([0]+[1]*3)*2"
        ) from error
    if isinstance(value, list):
        return tuple(value)
    return int(value)


def _evaluate(node: ast.expr) -> Any:
    """A number, a list of numbers, or what + and * make of them; ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        values = [_evaluate(element) for element in node.elts]
        if all(isinstance(value, int) for value in values):
            return values
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _evaluate(node.left) + _evaluate(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _evaluate(node.left) * _evaluate(node.right)
    raise ValueError(ast.dump(node))
