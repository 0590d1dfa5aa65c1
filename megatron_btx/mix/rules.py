"""The rules of a mix: which tensors of the experts make which tensor of the result, and how.

A rule set is a table. The planner (:mod:`megatron_btx.mix.plan`) matches it against the keys that are there; a source
key that no rule takes, or a rule that finds no source, is an error and never a guess.

Axes: L layers, E experts, H hidden, G = 2F gated or F, F feed-forward, V vocabulary, Q = query + key + value rows.
Source of the method: Sukhbaatar et al. 2024, arXiv 2403.07816, section 3.2.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

Operation = Literal["average", "stack", "normal", "zeros"]
EXPERTS = "decoder.layers.mlp.experts.experts."


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of the table."""

    source: str
    """Key in the experts' checkpoints, as a regular expression that must match whole; "" for a new tensor."""
    operation: Operation
    """average: mean over the experts, rounded once. stack: moved bit for bit onto a new expert axis after the
    layers. normal: drawn, with the standard deviation of the initialisation. zeros: new, and no influence at first."""
    targets: tuple[str, ...] = ()
    """Keys of the result; () for the source's own key. More than one where the two kinds of layers differ."""
    optional: bool = False
    """Whether a model may lack it (biases, an untied head, QK norms)."""
    with_key: str = ""
    """For a new tensor: the key whose presence in the experts calls for it; "" for always."""

    def matches(self, key: str) -> bool:
        """Whether this rule takes a source key."""
        return bool(self.source) and re.fullmatch(self.source, key) is not None


_LAYERS = r"decoder\.layers\."

SHARED = (
    Rule(r"embedding\.word_embeddings\.weight", "average"),
    Rule(r"embedding\.position_embeddings\.weight", "average", optional=True),
    Rule(_LAYERS + r"self_attention\.linear_qkv\.layer_norm_(weight|bias)", "average", optional=True),
    Rule(_LAYERS + r"input_layernorm\.(weight|bias)", "average", optional=True),
    Rule(_LAYERS + r"self_attention\.linear_qkv\.weight", "average"),
    Rule(_LAYERS + r"self_attention\.linear_qkv\.bias", "average", optional=True),
    Rule(_LAYERS + r"self_attention\.[qk]_layernorm\.(weight|bias)", "average", optional=True),
    Rule(_LAYERS + r"self_attention\.linear_proj\.weight", "average"),
    Rule(_LAYERS + r"self_attention\.linear_proj\.bias", "average", optional=True),
    Rule(r"decoder\.final_layernorm\.weight", "average"),
    Rule(r"decoder\.final_layernorm\.bias", "average", optional=True),
    Rule(r"output_layer\.weight", "average", optional=True),
    Rule(r"output_layer\.bias", "average", optional=True),
)

_NORM = "decoder.layers.mlp.linear_fc1.layer_norm_"
_PRE_MLP_NORM = tuple(
    # Megatron's local mixture layers look for the dense key, its Transformer Engine ones for their own
    # (core/models/gpt/gpt_layer_specs.py, sharded_state_dict_keys_map): both are written.
    Rule(re.escape(_NORM + part), "average", (_NORM + part, f"decoder.layers.pre_mlp_layernorm.{part}"), part == "bias")
    for part in ("weight", "bias")
)

BTX = (
    *SHARED,
    *_PRE_MLP_NORM,
    Rule(_LAYERS + r"mlp\.linear_fc1\.weight", "stack", (EXPERTS + "linear_fc1.weight",)),
    Rule(_LAYERS + r"mlp\.linear_fc1\.bias", "stack", (EXPERTS + "linear_fc1.bias",), optional=True),
    Rule(_LAYERS + r"mlp\.linear_fc2\.weight", "stack", (EXPERTS + "linear_fc2.weight",)),
    Rule(_LAYERS + r"mlp\.linear_fc2\.bias", "stack", (EXPERTS + "linear_fc2.bias",), optional=True),
    Rule("", "normal", ("decoder.layers.mlp.router.weight",)),
    # Megatron's router has a bias where the linear layers have (core/transformer/moe/router.py).
    Rule("", "zeros", ("decoder.layers.mlp.router.bias",), with_key="decoder.layers.mlp.linear_fc1.bias"),
)
"""Branch-Train-MiX: feed-forward blocks become the experts, everything else is averaged, routers are new."""

AVERAGE = (
    *SHARED,
    Rule(_LAYERS + r"mlp\.linear_fc1\.layer_norm_(weight|bias)", "average"),
    Rule(_LAYERS + r"mlp\.linear_fc[12]\.weight", "average"),
    Rule(_LAYERS + r"mlp\.linear_fc[12]\.bias", "average", optional=True),
)
"""The plain average of the experts, a dense model: the baseline that a mixture has to beat."""

METHODS: dict[str, tuple[Rule, ...]] = {"btx": BTX, "average": AVERAGE}

IGNORED = (
    r"optimizer\..*",
    r"chained_\d+\..*",
    r".*\._extra_state(/.*)?",
    r"rng_state(/.*)?",
    r"rerun_state_machine_state(/.*)?",
    r"common_state(/.*)?",
    r"content_metadata(/.*)?",
)
"""Source entries that are no part of the model: a mix starts with a fresh optimizer, and empty extra states."""


def is_ignored(key: str) -> bool:
    """Whether a source entry is left out on purpose."""
    return any(re.fullmatch(pattern, key) for pattern in IGNORED)
