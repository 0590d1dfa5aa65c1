"""What servers make of a Hugging Face mixture: one table, as found on 2026-11-26, and its lines in a plan.

A server can load a folder without complaint and compute another model: llama.cpp has one way of weighing experts per
architecture, whatever the configuration says. Nobody sees that in its answers at once, so whoever writes such a folder
is told. ``bash tests/serving.sh`` runs the servers and holds this table against what they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

type Config = Mapping[str, Any]
SERVERS = ("vLLM", "llama.cpp")
FAMILIES = MIXTRAL, QWEN2_MOE, QWEN3_MOE = "mixtral", "qwen2_moe", "qwen3_moe"
"""``model_type`` of the mixtures that are written. Of dense models nothing is said here: servers know them well."""
REFUSES, OTHER = "does not load it", "computes another model"


class Deviation(NamedTuple):
    """Something a configuration can say that a server does not follow."""

    server: str
    outcome: str
    condition: str
    families: tuple[str, ...]
    holds: Callable[[Config], object]
    why: str


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


_LLAMA = SERVERS[1]
_Q2, _Q3, _QWEN = (QWEN2_MOE,), (QWEN3_MOE,), (QWEN2_MOE, QWEN3_MOE)
# fmt: off
TABLE = (
    Deviation(_LLAMA, REFUSES, "dense layers among the mixtures", _QWEN,
        lambda config: config.get("mlp_only_layers"), "its converter has no names for their tensors"),
    Deviation(_LLAMA, REFUSES, "tied embeddings", _Q2,
        lambda config: config["tie_word_embeddings"], "it wants Qwen2-MoE's head as a tensor of its own"),
    Deviation(_LLAMA, OTHER, "top-k, weights normalised (softmax over the chosen)", _Q2,
        lambda config: _chooses(config) and config["norm_topk_prob"],
        "it never normalises the weights of Qwen2-MoE's chosen experts"),
    Deviation(_LLAMA, OTHER, "top-k, weights not normalised (softmax over all)", _Q3,
        lambda config: _chooses(config) and not config["norm_topk_prob"],
        "it always normalises the weights of Qwen3-MoE's chosen experts"),
    Deviation(_LLAMA, OTHER, "a sliding window shorter than the longest text", FAMILIES,
        _has_window, "it ignores the sliding window"),
    Deviation(_LLAMA, OTHER, "Llama 3's scaled rotary positions", _QWEN,
        lambda config: _rope_type(config) == "llama3",
        "it scales rotary positions in Llama 3's way for Llama's architectures alone"),
    Deviation(_LLAMA, OTHER, "rotary positions scaled by the text's length (dynamic)", FAMILIES,
        lambda config: _rope_type(config) == "dynamic", "it does not scale rotary positions by the text's length"),
)
# fmt: on
"""All that was found, refusals first; where nothing holds, servers compute what transformers computes."""


def deviations(config: Config) -> dict[str, tuple[str, list[str]]]:
    """Server -> what it does with a configuration that it does not follow, and why: a refusal before all else."""
    found: dict[str, tuple[str, list[str]]] = {}
    for row in TABLE:
        if config["model_type"] in row.families and row.holds(config):
            found.setdefault(row.server, (row.outcome, []))[1].append(row.why)
    return found


def server_lines(config: Config) -> list[str]:
    """A plan's lines about servers, for a configuration as it is written; none for dense models."""
    if config["model_type"] not in FAMILIES:
        return []
    found = deviations(config)
    faithful = [server for server in SERVERS if server not in found]
    lines = [f"  servers: computed as by transformers in {', '.join(faithful)}"]
    for server, (outcome, reasons) in found.items():
        lines.append(f"  warning: {server} {outcome}: {'; '.join(reasons)} (docs/formats.md)")
    return lines
