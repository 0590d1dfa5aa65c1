"""What servers make of a Hugging Face mixture: one table of families and conditions, and the words for a plan.

A server can load a folder without complaint and compute another model: llama.cpp has one way of weighing experts per
architecture, whatever the configuration says. Nobody sees that in its answers at once, so whoever writes such a folder
is told. ``bash tests/serving.sh`` runs vLLM and llama.cpp and holds this table against what they do; SGLang was read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

Config = Mapping[str, Any]
Server = Literal["vLLM", "SGLang", "llama.cpp"]
SERVERS: tuple[Server, ...] = ("vLLM", "SGLang", "llama.cpp")
MIXTRAL, QWEN2_MOE, QWEN3_MOE = FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
"""``model_type`` of the mixtures that are written. Of dense models nothing is said here: servers know them well."""

REFUSES, OTHER = "does not load it", "computes another model"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one server does where a condition holds."""

    server: Server
    outcome: str
    """:data:`REFUSES` or :data:`OTHER`."""
    why: str


@dataclasses.dataclass(frozen=True)
class Condition:
    """Something a configuration can say that at least one server does not follow."""

    name: str
    families: tuple[str, ...]
    holds: Callable[[Config], object]
    answers: tuple[Answer, ...]


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


CONDITIONS = (
    Condition(
        "top-k, weights normalised (softmax over the chosen)",
        (QWEN2_MOE,),
        lambda config: _chooses(config) and config["norm_topk_prob"],
        (Answer("llama.cpp", OTHER, "it never normalises the weights of Qwen2-MoE's chosen experts"),),
    ),
    Condition(
        "top-k, weights not normalised (softmax over all)",
        (QWEN3_MOE,),
        lambda config: _chooses(config) and not config["norm_topk_prob"],
        (Answer("llama.cpp", OTHER, "it always normalises the weights of Qwen3-MoE's chosen experts"),),
    ),
    Condition(
        "dense layers among the mixtures",
        (QWEN2_MOE, QWEN3_MOE),
        lambda config: config.get("mlp_only_layers"),
        (
            Answer("SGLang", OTHER, "it takes every layer for a mixture and skips the dense layers' tensors"),
            Answer("llama.cpp", REFUSES, "its converter has no names for their tensors"),
        ),
    ),
    Condition(
        "tied embeddings",
        (QWEN2_MOE,),
        lambda config: config["tie_word_embeddings"],
        (
            Answer("SGLang", OTHER, "it leaves the head of a tied mixture unset"),
            Answer("llama.cpp", REFUSES, "it wants Qwen2-MoE's head as a tensor of its own"),
        ),
    ),
    Condition(
        "tied embeddings",
        (QWEN3_MOE, MIXTRAL),
        lambda config: config["tie_word_embeddings"],
        (Answer("SGLang", OTHER, "it leaves the head of a tied mixture unset"),),
    ),
    Condition(
        "a sliding window shorter than the longest text",
        FAMILIES,
        _has_window,
        (
            Answer("SGLang", OTHER, "it ignores the sliding window"),
            Answer("llama.cpp", OTHER, "it ignores the sliding window"),
        ),
    ),
    Condition(
        "scaled rotary positions",
        (MIXTRAL,),
        lambda config: _rope_type(config) != "default",
        (Answer("SGLang", OTHER, "it does not scale Mixtral's rotary positions"),),
    ),
    Condition(
        "Llama 3's scaled rotary positions",
        (QWEN2_MOE, QWEN3_MOE),
        lambda config: _rope_type(config) == "llama3",
        (Answer("llama.cpp", OTHER, "it scales rotary positions in Llama 3's way for Llama's architectures alone"),),
    ),
    Condition(
        "rotary positions scaled by the text's length (dynamic)",
        FAMILIES,
        lambda config: _rope_type(config) == "dynamic",
        (Answer("llama.cpp", OTHER, "it does not scale rotary positions by the text's length"),),
    ),
    Condition(
        "a head size other than hidden size / heads",
        (MIXTRAL,),
        lambda config: config.get("head_dim") not in (None, config["hidden_size"] // config["num_attention_heads"]),
        (Answer("SGLang", REFUSES, "it takes hidden size / heads for Mixtral's head size"),),
    ),
)
"""Every condition that was found; where none holds, all three servers compute what transformers computes."""


def conditions_of(config: Config) -> tuple[Condition, ...]:
    """The conditions that a configuration meets; none for dense models."""
    family = config["model_type"]
    return tuple(c for c in CONDITIONS if family in c.families and c.holds(config))


def answers_of(config: Config) -> tuple[Answer, ...]:
    """What servers do not follow in a configuration, refusals first."""
    answers = (answer for condition in conditions_of(config) for answer in condition.answers)
    return tuple(sorted(answers, key=lambda answer: (answer.outcome != REFUSES, SERVERS.index(answer.server))))


def server_lines(config: Config) -> list[str]:
    """A plan's lines about servers, for a configuration as it is written; none for dense models."""
    if config["model_type"] not in FAMILIES:
        return []
    answers = answers_of(config)
    faithful, warnings = [], []
    for server in SERVERS:
        own = [answer for answer in answers if answer.server == server]
        if own:
            reasons = "; ".join(answer.why for answer in own)
            warnings.append(f"  warning: {server} {own[0].outcome}: {reasons} (docs/serving.md)")
        else:
            faithful.append(server)
    named = ", ".join(faithful) or "none of " + ", ".join(SERVERS)
    return [f"  servers: computed as by transformers in {named}", *warnings]
