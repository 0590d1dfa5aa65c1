"""Names that wrappers give to tensors: read as what they wrap, where that is certain.

``torch.compile``, FSDP, activation checkpointing, data parallelism and multimodal models put a word of their own before
the names, or within them. transformers finds no tensor under such names and fills the model with random numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from megatron_btx.common.errors import CheckpointError

_OUTER = ("module.", "_forward_module.", "base_model.model.", "language_model.")
"""Words before the name: certain where every tensor has them."""
_INNER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Words of modules that wrap one other, anywhere in a name; they mean nothing by themselves."""
_LANGUAGE_PART, _HEAD = "model.language_model.", "lm_head."
_ADAPTER = re.compile(r"(?:^|\.)(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save)\.")


def unwrap_names[T](tensors: Mapping[str, T], where: str) -> dict[str, T]:
    """Tensors under the names that a plain model has.

    Raises:
        CheckpointError: some have a wrapper's word and others have not, two get one name, or adapters lie among them.
    """
    found: dict[str, T] = {}
    for name, tensor in tensors.items():
        if _ADAPTER.search(name):
            raise CheckpointError(
                f"{where}: {name} is a part of a LoRA or another adapter, not merged into the model; merge it first, "
                "with merge_and_unload() of peft, and save the result"
            )
        plain = _INNER.sub("", name)
        if plain in found:
            raise CheckpointError(f"{where}: {name} and {plain} are one tensor under two names; save the plain model")
        found[plain] = tensor
    while word := _outer_word(found, where):
        found = {name.removeprefix(word): tensor for name, tensor in found.items()}
    if found and all(name.startswith((_LANGUAGE_PART, _HEAD)) for name in found):
        found = {name.replace(_LANGUAGE_PART, "model.", 1): tensor for name, tensor in found.items()}
    return found


def _outer_word(names: Collection[str], where: str) -> str:
    """The word that stands before every name; "" where none does."""
    for word in _OUTER:
        having = [name for name in names if name.startswith(word)]
        without = [name for name in names if not name.startswith(word)]
        if having and not without:
            return word
        if having:
            raise CheckpointError(
                f"{where}: {having[0]} has {word!r} before its name and {without[0]} has not, so what is the model is "
                "not certain; save the wrapped model alone, by its own state_dict()"
            )
    return ""
