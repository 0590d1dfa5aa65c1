"""What a PATH on the command line may be: a folder, a folder of the hub's cache, or the name of a model in that cache.

Nothing is downloaded: a model that is not here is refused with the command that fetches it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_btx.common.errors import CheckpointError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHED = "models--"
_FILES = {
    ".gguf": "take the model that it was made from, with safetensors",
    ".nemo": "an archive of NeMo 1: unpack it with tar and give the folder",
}


def model_path(text: str | Path) -> Path:
    """The folder that a path stands for.

    ``~`` is the home folder, as in a shell, which does not see it in ``NAME=~/model``. A folder ``models--org--name``
    of the hub's cache stands for its snapshot, and so does the name ``org/name``, unless it is a folder here.

    Raises:
        CheckpointError: a model of the hub that is not in the cache, or a file; says what to do.
    """
    path = Path(os.path.expanduser(text))
    if path.is_file():
        remedy = _FILES.get(path.suffix, f"give the folder that holds the whole model, {path.parent}")
        raise CheckpointError(f"{path}: is a file and no such folder; {remedy}")
    address = re.fullmatch(r"(?:https?://(?:www\.)?huggingface\.co/|hf://(?:models/)?)([^/]+/[^/?#]+).*", str(text))
    name = str(text)
    if address:
        name = address[1]
    if path.name.startswith(_CACHED) and (path / "snapshots").is_dir():
        cached, name = path, path.name.removeprefix(_CACHED).replace("--", "/", 1)
    elif path.is_dir() or not _HUB_NAME.fullmatch(name):
        return path
    else:
        from huggingface_hub import constants

        cached = Path(constants.HF_HUB_CACHE) / (_CACHED + name.replace("/", "--"))
    snapshots, reference = list((cached / "snapshots").glob("*")), cached / "refs" / "main"
    if reference.is_file():
        snapshots = [cached / "snapshots" / reference.read_text().strip()]
    if len(snapshots) == 1 and snapshots[0].is_dir():
        return snapshots[0]
    raise CheckpointError(
        f"{text}: no such folder, and no model of this name in the hub's cache with one snapshot of the main revision "
        f"({cached}); correct the path, give one of its snapshots, or download it first: hf download {name}"
    )
