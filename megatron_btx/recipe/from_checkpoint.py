"""The models that a recipe is given under ``from``: what lies there, and which flags build them.

All that the converter reads is taken: a Megatron checkpoint (its root, or one iteration), a Hugging Face model folder,
a model in the hub's cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.iterations import TRACKER, is_checkpoint
from megatron_btx.checkpoint.nemo import weights_folder
from megatron_btx.checkpoint.paths import model_path
from megatron_btx.checkpoint.safetensors import is_model_folder
from megatron_btx.checkpoint.unsupported import check_kind
from megatron_btx.common.errors import InputError
from megatron_btx.recipe.flags import Flags


@dataclass(frozen=True)
class GivenModel:
    """What a model says of itself."""

    model: Flags
    """Megatron's flags that build it."""
    tokenizer: Flags
    """Those of its tokenizer; empty where none lies with it."""


def find_model(text: str) -> Path:
    """The absolute folder of a model that the converter can read.

    Raises:
        ValueError: there is none; says what is expected.
    """
    expected = "expected a Megatron checkpoint (its root, or one iter_ folder) or a Hugging Face model folder"
    try:
        path = weights_folder(model_path(text)).absolute()
        is_model = not path.is_dir() or is_checkpoint(path) or is_model_folder(path)
        if not is_model:
            check_kind(path)  # which knows a LoRA and many others by name
    except InputError as error:
        raise ValueError(str(error)) from None
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; {expected}")
    if not is_model:
        raise ValueError(f"{path} is no model; {expected}")
    return path


def is_loadable(path: Path) -> bool:
    """Whether Megatron can start from what lies here: a checkpoint's root. All else must be imported first."""
    return (path / TRACKER).is_file()


def read_models(paths: Mapping[str, Path]) -> dict[str, GivenModel]:
    """What the models at ``paths`` say of themselves: name -> flags.

    Another process reads them, because that takes torch, which would then stay in this one.

    Raises:
        InputError: a model that the converter would refuse, in its words.
    """
    found = json.loads(ask("megatron_btx.mixing.model_flags", {name: str(path) for name, path in paths.items()}))
    return {name: GivenModel(said["model"], said["tokenizer"]) for name, said in found.items()}


def ask(module: str, asked: Mapping[str, Any], environment: Mapping[str, str] | None = None, place: str = "") -> str:
    """The answer of a program of ours, in a process of its own. Raises InputError with its one line."""
    command = [sys.executable, "-P", "-W", "ignore", "-m", module]
    answer = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, check=False, env=environment
    )
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or [f"{module} ended with status {answer.returncode}"]
        raise InputError(place + lines[-1].removeprefix("error: "))
    return answer.stdout
