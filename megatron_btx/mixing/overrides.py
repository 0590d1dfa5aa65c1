"""The fields of a configuration that may differ between sources, because a user can choose whose value is taken."""

from __future__ import annotations

from megatron_btx.common.errors import InputError

_ROPE_SCALING = ("use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor", "hf_rope_scaling")

TRAINING_ARGUMENTS = ("attention_dropout", "hidden_dropout", "init_method_std")
"""What changes no number of the model and counts when it is trained on."""

TAKEABLE: dict[str, tuple[str, ...]] = {
    "rotary_base": ("rotary_base",),
    "layernorm_epsilon": ("layernorm_epsilon",),
    "max_position_embeddings": ("max_position_embeddings", "seq_length"),
    "rope_scaling": _ROPE_SCALING,
    "window_size": ("window_size", "window_attn_skip_freq"),
    "dtype": ("bf16", "fp16", "params_dtype"),
    "tokenizer": (),  # no argument: whose files the result gets, where experts have the same tokens
    **{name: (name,) for name in TRAINING_ARGUMENTS},
}
"""What may be taken from one expert, because it shapes no tensor: field, and the arguments it stands for."""

_SYNONYMS = {
    "rope_theta": "rotary_base",
    "rms_norm_eps": "layernorm_epsilon",
    "norm_epsilon": "layernorm_epsilon",
    "sliding_window": "window_size",
    "torch_dtype": "dtype",
    "initializer_range": "init_method_std",
    "max_positions": "max_position_embeddings",
} | dict.fromkeys(_ROPE_SCALING, "rope_scaling")


def field_of(name: str) -> str:
    """The field that a name on the command line (Megatron's, its flag's, or Hugging Face's) stands for.

    Raises:
        InputError: the name stands for none, lists those there are.
    """
    plain = name.removeprefix("--").replace("-", "_")
    field = _SYNONYMS.get(plain, plain)
    if field not in TAKEABLE:
        raise InputError(
            f"--take {name}: shapes tensors or is not known; fields that can be taken: {', '.join(TAKEABLE)}"
        )
    return field


def field_with(argument: str) -> str | None:
    """The field that an argument belongs to; None where it cannot be taken."""
    for field, arguments in TAKEABLE.items():
        if argument in arguments:
            return field
    return None
