"""THE table of names: what every tensor of a model is called in each kind of checkpoint, and where it lies.

A model is a set of *pieces*: the smallest tensors that mean something by themselves (the query projection of a layer,
the gate projection of an expert, ...). Checkpoints store pieces alone or fused, with layers and experts in the name or
on an axis. One row per piece says all of that, for every dialect; reading and writing, in either direction, use the
same row.

Axes: V vocabulary, P positions, H hidden, D head size, Q queries and K keys (or values) of all heads, F feed-forward, E
experts, X feed-forward of an expert, S of a shared expert.
Sources: Megatron-core ``core/models/gpt/gpt_layer_specs.py``, ``core/transformer/{attention,mlp}.py`` and
``core/transformer/moe/experts.py``; transformers' model classes.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Part = Literal["whole", "q", "k", "v", "gate", "up"]
DialectName = Literal["stacked", "numbered", "singleton", "llama", "mixtral", "qwen_moe", "fused_moe"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of piece: its name, and its names in the dialects.

    ``{layer}`` and ``{expert}`` are numbers that some dialects have in the name and others on an axis; ``{kind}`` is
    weight or bias.
    """

    piece: str
    axes: str
    """Of its weight, a letter for each; a bias has the first alone."""
    megatron: str
    llama: str = ""
    mixtral: str = ""
    """"" for the same as llama."""
    qwen_moe: str = ""
    fused_moe: str = ""
    part: Part = "whole"
    """Which rows of the Megatron tensor (and of the fused Hugging Face one) are this piece."""
    also: tuple[str, ...] = ()
    """Other Megatron names: read as well, and written where mixture layers of the other kind look for them."""
    needs: str = ""
    """The one of :attr:`Sizes.parts` without which a model has no such piece."""


_L = "decoder.layers.{layer}."
_E = _L + "mlp.experts.experts.{expert}."
_HF = "model.layers.{layer}."
_QKV = _L + "self_attention.linear_qkv.{kind}"
_HF_A = _HF + "self_attn."

ROWS = (
    Row("embedding.weight", "VH", "embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    Row("positions.weight", "PH", "embedding.position_embeddings.weight", needs="positions"),
    Row(
        "layers.{layer}.input_norm.{kind}",
        "H",
        _L + "self_attention.linear_qkv.layer_norm_{kind}",
        _HF + "input_layernorm.{kind}",
        also=(_L + "input_layernorm.{kind}",),
    ),
    Row("layers.{layer}.attention.q.{kind}", "QH", _QKV, _HF_A + "q_proj.{kind}", part="q"),
    Row("layers.{layer}.attention.k.{kind}", "KH", _QKV, _HF_A + "k_proj.{kind}", part="k"),
    Row("layers.{layer}.attention.v.{kind}", "KH", _QKV, _HF_A + "v_proj.{kind}", part="v"),
    Row(
        "layers.{layer}.attention.q_norm.{kind}",
        "D",
        _L + "self_attention.q_layernorm.{kind}",
        _HF_A + "q_norm.{kind}",
        needs="qk norm",
    ),
    Row(
        "layers.{layer}.attention.k_norm.{kind}",
        "D",
        _L + "self_attention.k_layernorm.{kind}",
        _HF_A + "k_norm.{kind}",
        needs="qk norm",
    ),
    Row("layers.{layer}.attention.o.{kind}", "HQ", _L + "self_attention.linear_proj.{kind}", _HF_A + "o_proj.{kind}"),
    # Local mixture layers look for the dense name of this norm, Transformer Engine ones for their own
    # (gpt_layer_specs.py, sharded_state_dict_keys_map): mixtures are written with both.
    Row(
        "layers.{layer}.mlp_norm.{kind}",
        "H",
        _L + "mlp.linear_fc1.layer_norm_{kind}",
        _HF + "post_attention_layernorm.{kind}",
        also=(_L + "pre_mlp_layernorm.{kind}",),
    ),
    Row(
        "layers.{layer}.ffn.gate.{kind}", "FH", _L + "mlp.linear_fc1.{kind}", _HF + "mlp.gate_proj.{kind}", part="gate"
    ),
    Row("layers.{layer}.ffn.up.{kind}", "FH", _L + "mlp.linear_fc1.{kind}", _HF + "mlp.up_proj.{kind}", part="up"),
    Row("layers.{layer}.ffn.down.{kind}", "HF", _L + "mlp.linear_fc2.{kind}", _HF + "mlp.down_proj.{kind}"),
    Row(
        "layers.{layer}.router.{kind}",
        "EH",
        _L + "mlp.router.{kind}",
        mixtral=_HF + "block_sparse_moe.gate.{kind}",
        qwen_moe=_HF + "mlp.gate.{kind}",
        fused_moe=_HF + "mlp.gate.{kind}",
    ),
    Row(
        "layers.{layer}.experts.{expert}.gate.{kind}",
        "XH",
        _E + "linear_fc1.{kind}",
        mixtral=_HF + "block_sparse_moe.experts.{expert}.w1.{kind}",
        qwen_moe=_HF + "mlp.experts.{expert}.gate_proj.{kind}",
        fused_moe=_HF + "mlp.experts.{expert}.gate_up_proj",
        part="gate",
    ),
    Row(
        "layers.{layer}.experts.{expert}.up.{kind}",
        "XH",
        _E + "linear_fc1.{kind}",
        mixtral=_HF + "block_sparse_moe.experts.{expert}.w3.{kind}",
        qwen_moe=_HF + "mlp.experts.{expert}.up_proj.{kind}",
        fused_moe=_HF + "mlp.experts.{expert}.gate_up_proj",
        part="up",
    ),
    Row(
        "layers.{layer}.experts.{expert}.down.{kind}",
        "HX",
        _E + "linear_fc2.{kind}",
        mixtral=_HF + "block_sparse_moe.experts.{expert}.w2.{kind}",
        qwen_moe=_HF + "mlp.experts.{expert}.down_proj.{kind}",
        fused_moe=_HF + "mlp.experts.{expert}.down_proj",
    ),
    Row("final_norm.{kind}", "H", "decoder.final_layernorm.{kind}", "model.norm.{kind}"),
    Row("head.weight", "VH", "output_layer.weight", "lm_head.weight"),
)
"""Every piece of every model the project knows."""

IGNORED_MEGATRON = (
    r"optimizer\..*",
    r"chained_\d+\..*",
    r".*\._extra_state(/.*)?",
    r"rng_state(/.*)?",
    r"rerun_state_machine_state(/.*)?",
    r"common_state(/.*)?",
    r"content_metadata(/.*)?",
)
"""Entries that are no part of the model: a mix starts with a fresh optimizer, and empty extra states."""

REFUSED_MEGATRON = {
    r".*\.mlp\.shared_experts\..*": "a shared expert is neither mixed nor converted; take a model without "
    "--moe-shared-expert-intermediate-size",
}
"""Parts of a model that Megatron trains and that have no row here, each with what is said of it."""

IGNORED_HF = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Tensors that mean nothing: rotary frequencies follow from the configuration."""


@dataclasses.dataclass(frozen=True)
class Dialect:
    """A kind of checkpoint: which column names its tensors, and which numbers are axes there."""

    name: DialectName
    column: str
    axes: tuple[str, ...] = ()
    """Numbers that are no part of the name but a leading axis."""
    fused: bool = True
    """Whether pieces of one tensor are stored together."""


DIALECTS = {
    "stacked": Dialect("stacked", "megatron", ("layer", "expert")),
    "numbered": Dialect("numbered", "megatron", ("expert",)),
    # Megatron-core 0.14 to 0.19 with singleton_local_shards: a name for every layer, expert and half of a gated fc1.
    "singleton": Dialect("singleton", "megatron"),
    "llama": Dialect("llama", "llama", fused=False),
    "mixtral": Dialect("mixtral", "mixtral", fused=False),
    "qwen_moe": Dialect("qwen_moe", "qwen_moe", fused=False),
    # How transformers 5 holds the experts of any mixture in memory.
    "fused_moe": Dialect("fused_moe", "fused_moe", ("expert",)),
}
