"""A tokenizer that travels with a checkpoint: found beside it where the path that was stored leads nowhere.

Checkpoints and the flags beside them name paths of the machine they were made on. When a folder is moved, the tokenizer
in it moves along, and under the new path it is the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_btx.tokenizers.vocabulary import TOKENIZER_FILES, tokenizer_files

HF_FOLDER = "huggingface"
"""Beside a Megatron checkpoint made from Hugging Face models: their configuration, tokenizer and generation files."""
_SPECIAL = re.compile(r"[\s*?\[\\]")
"""What a shell would cut or read as a pattern in the words of ``$(cat FILE)``."""


def locate_tokenizer(arguments: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Arguments with the tokenizer's files where they are, if not where they are said to be.

    Files of the same names beside the weights, or in the folder with Hugging Face's files, take the place of those that
    are gone.
    """
    found = dict(arguments)
    for argument in TOKENIZER_FILES:
        named = arguments.get(argument)
        if not isinstance(named, str | Path) or not str(named) or Path(named).exists():
            continue
        for folder in (root, root / HF_FOLDER):
            if (folder / Path(named).name).is_file():
                found[argument] = str(folder / Path(named).name)
                break
    named, folder = found.get("tokenizer_model"), root / HF_FOLDER
    is_folder = found.get("tokenizer_type") == "HuggingFaceTokenizer" and isinstance(named, str)
    if is_folder and not Path(str(named)).exists() and tokenizer_files(folder):
        found["tokenizer_model"] = str(folder)
    return found


def as_shell_word(path: str) -> str:
    """A path as one word of ``$(cat FILE)``, which a shell cuts at blanks, whatever quotes are in the file.

    ``?`` for each special character is a pattern that the shell makes the path of again, in one word.
    """
    return _SPECIAL.sub("?", path)
