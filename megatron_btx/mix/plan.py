"""The plan of a mix: every tensor of the result, where it comes from and what it costs, before anything is written."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.arguments import check_same_tokenizer, differences
from megatron_btx.checkpoint.torch_dist import TorchDistReader, resolve_iteration
from megatron_btx.errors import InputError
from megatron_btx.mix.rules import METHODS, Rule, is_ignored

if TYPE_CHECKING:
    import torch

ROUTER_STD = 0.02
LAYERS = "decoder.layers."


@dataclasses.dataclass(frozen=True)
class Expert:
    """One source of a mix."""

    name: str
    folder: Path
    reader: TorchDistReader
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rule: Rule
    source_key: str
    """The key in every expert; "" for a new tensor."""

    @property
    def leading_axes(self) -> int:
        """How many leading axes count layers and experts: these are written one slice at a time."""
        if not self.key.startswith(LAYERS):
            return 0
        return 2 if self.rule.operation == "stack" else 1

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor in the result."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a mix will write."""

    method: str
    experts: tuple[Expert, ...]
    tensors: tuple[PlannedTensor, ...]
    arguments: Mapping[str, Any]
    """The stored arguments of the result."""
    router_seed: int

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def input_bytes(self) -> int:
        """Bytes read from the experts."""
        keys = {tensor.source_key for tensor in self.tensors if tensor.source_key}
        return sum(
            math.prod(expert.reader.tensors[key].shape) * expert.reader.tensors[key].dtype.itemsize
            for key in keys
            for expert in self.experts
        )


def make_plan(
    named_paths: Sequence[tuple[str, str]], method: str, topk: int, router_seed: int, allow_other_tokenizer: bool
) -> Plan:
    """Open the experts, check that they fit together, and plan the result.

    Args:
        named_paths: (name, path) of each expert, in the order they get in the mixture.
        method: a key of :data:`megatron_btx.mix.rules.METHODS`.
        topk: experts per token in the mixture.

    Raises:
        InputError: fewer than two experts, experts that differ, keys without a rule or rules without a key.
    """
    if len(named_paths) < 2:
        raise InputError(f"{len(named_paths)} expert given, at least 2 needed; repeat --expert NAME=PATH")
    names = [name for name, _ in named_paths]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--expert {name}= is given twice; every expert needs a name of its own")
    if method == "btx" and not 1 <= topk <= len(names):
        raise InputError(f"--moe-router-topk {topk}: expected 1 to {len(names)}, the number of experts")
    experts = tuple(open_expert(name, path) for name, path in named_paths)
    check_same_model(experts, allow_other_tokenizer)
    tensors = tuple(match_rules(METHODS[method], experts))
    first = experts[0].arguments
    arguments = moe_arguments(first, names, topk) if method == "btx" else dense_arguments(first)
    return Plan(method, experts, tensors, arguments, router_seed)


def open_expert(name: str, path: str) -> Expert:
    """Open one checkpoint and check that it is a dense model with stacked layers.

    Raises:
        InputError: see the message.
    """
    folder = resolve_iteration(path)
    reader = TorchDistReader(folder)
    arguments = reader.arguments()
    if arguments.get("num_experts") is not None:
        raise InputError(
            f"{name} ({folder}): is a mixture of {arguments['num_experts']} experts, expected a dense model"
        )
    numbered = next((key for key in reader.tensors if re.match(r"decoder\.layers\.\d+\.", key)), None)
    if numbered is not None:
        raise InputError(
            f"{name} ({folder}): has numbered layers ({numbered}), expected layers stacked in one key; "
            "save it without --moe-layer-freq or heterogeneous layers"
        )
    return Expert(name, folder, reader, arguments)


def check_same_model(experts: Sequence[Expert], allow_other_tokenizer: bool) -> None:
    """Refuse experts that are not copies of one seed: arguments, tokenizers, keys, shapes and dtypes.

    Raises:
        InputError: names the first expert and the one that differs, with both values.
    """
    first = experts[0]
    for expert in experts[1:]:
        wrong = differences(first.arguments, expert.arguments)
        if wrong:
            listed = "; ".join(
                f"{a.name} ({a.flag}): {x!r} in {first.name}, {y!r} in {expert.name}" for a, x, y in wrong
            )
            raise InputError(f"experts differ in their configuration: {listed}; all must come from one seed")
        for key, tensor in first.reader.tensors.items():
            if is_ignored(key):
                continue
            other = expert.reader.tensors.get(key)
            if other is None:
                raise InputError(f"{key}: in {first.name} ({first.folder}), missing in {expert.name} ({expert.folder})")
            if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
                raise InputError(
                    f"{key}: {list(tensor.shape)} {tensor.dtype} in {first.name}, "
                    f"{list(other.shape)} {other.dtype} in {expert.name}; all must come from one seed"
                )
        extra = next((k for k in expert.reader.tensors if k not in first.reader.tensors and not is_ignored(k)), None)
        if extra is not None:
            raise InputError(f"{extra}: in {expert.name} ({expert.folder}), missing in {first.name} ({first.folder})")
    if not allow_other_tokenizer:
        check_same_tokenizer({e.name: e.arguments for e in experts}, "--allow-other-tokenizer")


def match_rules(rules: Iterable[Rule], experts: Sequence[Expert]) -> Iterable[PlannedTensor]:
    """Match the rule table against the experts' keys: every key used once, every rule satisfied.

    Raises:
        InputError: names the key that no rule takes, or the rule that finds no key.
    """
    rules = tuple(rules)
    stored = experts[0].reader.tensors
    unused = set(rules)
    for key, tensor in stored.items():
        if is_ignored(key):
            continue
        taking = [rule for rule in rules if rule.matches(key)]
        if len(taking) != 1:
            raise InputError(
                f"{key} in {experts[0].folder}: {len(taking)} rules take it, expected exactly one; "
                "this architecture is not supported"
            )
        rule = taking[0]
        unused.discard(rule)
        shape = tensor.shape
        if rule.operation == "stack":
            shape = (shape[0], len(experts), *shape[1:])
        for target in rule.targets or (key,):
            yield PlannedTensor(target, shape, tensor.dtype, rule, key)
    layers, hidden, dtype = _sizes(stored, experts[0])
    for rule in rules:
        if not rule.source:
            unused.discard(rule)
            if not rule.with_key or rule.with_key in stored:
                shape = (layers, len(experts), hidden) if rule.operation == "normal" else (layers, len(experts))
                yield PlannedTensor(rule.targets[0], shape, dtype, rule, "")
    missing = [rule.source for rule in unused if not rule.optional]
    if missing:
        raise InputError(f"{experts[0].folder}: no key matches {missing[0]}; this is not a GPT model of Megatron's")


def _sizes(stored: Mapping[str, Any], expert: Expert) -> tuple[int, int, torch.dtype]:
    """Layers, hidden size and dtype, from the second feed-forward matrix [L, H, F]."""
    key = "decoder.layers.mlp.linear_fc2.weight"
    if key not in stored:
        raise InputError(f"{expert.folder}: has no {key}; this is not a dense GPT model of Megatron's")
    return stored[key].shape[0], stored[key].shape[1], stored[key].dtype


def dense_arguments(first: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an averaged model: the first expert's, without what belongs to its run.

    Only builtin values are kept: newer Megatron versions read arguments under restrictions.
    """
    plain = {name: value for name, value in first.items() if _is_plain(value)}
    return plain | {
        "iteration": 0,
        "curr_iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
    }


def moe_arguments(first: Mapping[str, Any], names: Sequence[str], topk: int) -> dict[str, Any]:
    """The arguments of the mixture: the first expert's, describing a mixture of the named experts."""
    return dense_arguments(first) | {
        "btx_experts": list(names),
        "num_experts": len(names),
        "moe_layer_freq": 1,
        "moe_ffn_hidden_size": first["ffn_hidden_size"],
        "moe_router_topk": topk,
        # Softmax over the k largest logits alone: gates sum to one, so equal experts give the dense model. With k = 1
        # that gate would be constant; Megatron demands the full softmax then.
        "moe_router_pre_softmax": topk == 1,
        "moe_router_score_function": "softmax",
        "moe_router_topk_scaling_factor": None,
        "moe_router_dtype": "fp32",
        "moe_shared_expert_intermediate_size": None,
        "moe_grouped_gemm": False,
        "moe_token_dispatcher_type": "alltoall",
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def as_namespace(arguments: Mapping[str, Any]) -> argparse.Namespace:
    """The form in which Megatron stores arguments."""
    return argparse.Namespace(**arguments)
