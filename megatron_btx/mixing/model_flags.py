"""What a given model is, as JSON: for programs that must not import torch, which call this one.

Standard input has names and paths, ``{"seed": "models/llama"}``; the answer has the flags of each, ``{"seed": {"model":
{"num-layers": "32", "swiglu": true, ...}, "tokenizer": {"tokenizer-type": "HuggingFaceTokenizer", ...}}}``.
"""

from __future__ import annotations

import json
import sys

from megatron_btx.common.errors import InputError, exits_with_one_line
from megatron_btx.mixing.loader import Source, open_source
from megatron_btx.mixing.result import dense_arguments, megatron_args_text
from megatron_btx.tokenizers.vocabulary import TOKENIZER_FILES, tokenizer_files

Flags = dict[str, str | int | bool]
_ELSEWHERE = ("ckpt-format", "vocab-size")
"""Flags beside a checkpoint that are no part of the model."""


def model_flags_of(source: Source) -> Flags:
    """The flags that build the model and continue from it, without those of its tokenizer."""
    flags: Flags = {}
    for line in megatron_args_text(dense_arguments(source.arguments)).splitlines():
        name, _, value = line.removeprefix("--").partition(" ")
        if not name.startswith("tokenizer-") and name not in _ELSEWHERE:
            flags[name] = value or True
    flags.setdefault("padded-vocab-size", str(source.pieces["embedding.weight"].shape[0]))
    return flags


def tokenizer_flags_of(source: Source) -> Flags:
    """Megatron's flags of the model's own tokenizer; empty where none is known."""
    folder = source.hf_folder
    if folder is not None and tokenizer_files(folder):
        return {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": str(folder)}
    flags: Flags = {}
    for name in ("tokenizer_type", *TOKENIZER_FILES, "vocab_size"):
        value = source.arguments.get(name)
        if value is not None and source.arguments.get("tokenizer_type") is not None:
            flags[name.replace("_", "-")] = value if isinstance(value, int) else str(value)
    return flags


@exits_with_one_line
def main() -> int:
    """Read names and paths from standard input; print what the models there are."""
    found: dict[str, dict[str, Flags]] = {}
    refused = []
    for name, path in json.load(sys.stdin).items():
        try:
            source = open_source(name, path)
            found[name] = {"model": model_flags_of(source), "tokenizer": tokenizer_flags_of(source)}
        except InputError as error:
            refused.append(f"{name}.from: {error}")
    if refused:
        raise InputError("; ".join(refused))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
