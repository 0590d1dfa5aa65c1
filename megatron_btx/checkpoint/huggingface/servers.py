"""What servers make of a Hugging Face mixture: one table, as found on 2026-11-26, and its lines in a plan.

A server can load a folder without complaint and compute another model: llama.cpp has one way of weighing experts per
architecture, whatever the configuration says. Nobody sees that in its answers at once, so whoever writes such a folder
is told. ``bash tests/serving.sh`` runs vLLM and llama.cpp and holds this table against what they do; SGLang was read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

type Config = Mapping[str, Any]
SERVERS = VLLM, SGLANG, LLAMA_CPP = "vLLM", "SGLang", "llama.cpp"
FAMILIES = MIXTRAL, QWEN2_MOE, QWEN3_MOE = "mixtral", "qwen2_moe", "qwen3_moe"
"""``model_type`` of the mixtures that are written. Of dense models nothing is said here: servers know them well."""
REFUSES, OTHER = "does not load it", "computes another model"


class Row(NamedTuple):
    """Something a configuration can say that at least one server does not follow."""

    condition: str
    families: tuple[str, ...]
    holds: Callable[[Config], object]
    answers: Mapping[str, tuple[str, str]]
    """Server -> what it does, and why; the others follow."""


def _chooses(config: Config) -> bool:
    """Whether tokens leave experts out; where they take all, the weights sum to one anyway."""
    experts = config.get("num_local_experts", config.get("num_experts"))
    return bool(config["num_experts_per_tok"] < experts)


def _has_window(config: Config) -> bool:
    """Whether a sliding window hides tokens of a text that fits into the model."""
    if config["model_type"] != MIXTRAL and not config.get("use_sliding_window"):
        return False
    width = config.get("sliding_window")
    return width is not None and width < config["max_position_embeddings"]


def _rope_type(config: Config) -> str:
    return str((config.get("rope_scaling") or {}).get("rope_type", "default"))


TABLE = (
    Row(
        "top-k, weights normalised (softmax over the chosen)",
        (QWEN2_MOE,),
        lambda config: _chooses(config) and config["norm_topk_prob"],
        {LLAMA_CPP: (OTHER, "it never normalises the weights of Qwen2-MoE's chosen experts")},
    ),
    Row(
        "top-k, weights not normalised (softmax over all)",
        (QWEN3_MOE,),
        lambda config: _chooses(config) and not config["norm_topk_prob"],
        {LLAMA_CPP: (OTHER, "it always normalises the weights of Qwen3-MoE's chosen experts")},
    ),
    Row(
        "dense layers among the mixtures",
        (QWEN2_MOE, QWEN3_MOE),
        lambda config: config.get("mlp_only_layers"),
        {
            SGLANG: (OTHER, "it takes every layer for a mixture and skips the dense layers' tensors"),
            LLAMA_CPP: (REFUSES, "its converter has no names for their tensors"),
        },
    ),
    Row(
        "tied embeddings",
        (QWEN2_MOE,),
        lambda config: config["tie_word_embeddings"],
        {
            SGLANG: (OTHER, "it leaves the head of a tied mixture unset"),
            LLAMA_CPP: (REFUSES, "it wants Qwen2-MoE's head as a tensor of its own"),
        },
    ),
    Row(
        "tied embeddings",
        (QWEN3_MOE, MIXTRAL),
        lambda config: config["tie_word_embeddings"],
        {SGLANG: (OTHER, "it leaves the head of a tied mixture unset")},
    ),
    Row(
        "a sliding window shorter than the longest text",
        FAMILIES,
        _has_window,
        dict.fromkeys((SGLANG, LLAMA_CPP), (OTHER, "it ignores the sliding window")),
    ),
    Row(
        "scaled rotary positions",
        (MIXTRAL,),
        lambda config: _rope_type(config) != "default",
        {SGLANG: (OTHER, "it does not scale Mixtral's rotary positions")},
    ),
    Row(
        "Llama 3's scaled rotary positions",
        (QWEN2_MOE, QWEN3_MOE),
        lambda config: _rope_type(config) == "llama3",
        {LLAMA_CPP: (OTHER, "it scales rotary positions in Llama 3's way for Llama's architectures alone")},
    ),
    Row(
        "rotary positions scaled by the text's length (dynamic)",
        FAMILIES,
        lambda config: _rope_type(config) == "dynamic",
        {LLAMA_CPP: (OTHER, "it does not scale rotary positions by the text's length")},
    ),
    Row(
        "a head size other than hidden size / heads",
        (MIXTRAL,),
        lambda config: config.get("head_dim") not in (None, config["hidden_size"] // config["num_attention_heads"]),
        {SGLANG: (REFUSES, "it takes hidden size / heads for Mixtral's head size")},
    ),
)
"""Every condition that was found; where none holds, all three servers compute what transformers computes."""


def deviations(config: Config) -> dict[str, tuple[str, list[str]]]:
    """Server -> what it does with a configuration that it does not follow, and why: a refusal before all else."""
    found: dict[str, tuple[str, list[str]]] = {}
    for wanted in (REFUSES, OTHER):
        for row in TABLE:
            if config["model_type"] not in row.families or not row.holds(config):
                continue
            for server, (outcome, why) in row.answers.items():
                if outcome == wanted:
                    found.setdefault(server, (outcome, []))[1].append(why)
    return found


def server_lines(config: Config) -> list[str]:
    """A plan's lines about servers, for a configuration as it is written; none for dense models."""
    if config["model_type"] not in FAMILIES:
        return []
    found = deviations(config)
    faithful = [server for server in SERVERS if server not in found]
    lines = [f"  servers: computed as by transformers in {', '.join(faithful) or 'none of ' + ', '.join(SERVERS)}"]
    for server in sorted(found, key=SERVERS.index):
        outcome, reasons = found[server]
        lines.append(f"  warning: {server} {outcome}: {'; '.join(reasons)} (docs/serving.md)")
    return lines
