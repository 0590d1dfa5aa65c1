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
    are gone. A path may be a pattern as of :func:`as_shell_word`.
    """
    found = dict(arguments)
    for argument in TOKENIZER_FILES:
        named = arguments.get(argument)
        if not isinstance(named, str | Path) or not str(named) or Path(named).exists():
            continue
        place = _find_beside(Path(named), root)
        if place is not None:
            found[argument] = str(place)
    named, folder = found.get("tokenizer_model"), root / HF_FOLDER
    is_folder = found.get("tokenizer_type") == "HuggingFaceTokenizer" and isinstance(named, str)
    if is_folder and not Path(str(named)).exists() and tokenizer_files(folder):
        found["tokenizer_model"] = str(folder)
    return found


def _find_beside(path: Path, root: Path) -> Path | None:
    """The file of the same name beside the weights; None where there is none."""
    folders = [root, root / HF_FOLDER]
    if "?" in path.name:
        folders.insert(0, path.parent)
    for folder in folders:
        matches = _find_matches(folder, path.name)
        if matches:
            return matches[0]
    return None


def _find_matches(folder: Path, name: str) -> list[Path]:
    """The file of a name in a folder, in which ``?`` may stand for any character."""
    if (folder / name).is_file():
        return [folder / name]
    if "?" not in name or not folder.is_dir():
        return []
    pattern = re.compile(re.escape(name).replace(re.escape("?"), "."))
    return [file for file in sorted(folder.iterdir()) if pattern.fullmatch(file.name) and file.is_file()]


def as_shell_word(path: str) -> str:
    """A path as one word of ``$(cat FILE)``, which a shell cuts at blanks, whatever quotes are in the file.

    ``?`` for each special character is a pattern that the shell makes the path of again, in one word.
    """
    return _SPECIAL.sub("?", path)
