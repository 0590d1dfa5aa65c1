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
    if path.is_dir():
        if (path / "snapshots").is_dir() and path.name.startswith(_CACHED):
            return _find_snapshot(path)
        return path
    address = re.fullmatch(r"(?:https?://(?:www\.)?huggingface\.co/|hf://(?:models/)?)([^/]+/[^/?#]+).*", str(text))
    name = str(text)
    if address:
        name = address[1]
    if not _HUB_NAME.fullmatch(name):
        return path
    cached = hub_cache() / (_CACHED + name.replace("/", "--"))
    if cached.is_dir():
        return _find_snapshot(cached)
    raise CheckpointError(
        f"{text}: no such folder, and no model of this name in the hub's cache ({hub_cache()}); correct the path, or "
        f"download it first: hf download {name}"
    )


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads (``huggingface_hub/constants.py``)."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{caches}/huggingface")
    older = os.environ.get("HUGGINGFACE_HUB_CACHE", f"{home}/hub")
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE", older)))


def _find_snapshot(cached: Path) -> Path:
    """The snapshot that ``refs/main`` names; without it the only one there is."""
    snapshots = [place for place in (cached / "snapshots").glob("*") if place.is_dir()]
    reference = cached / "refs" / "main"
    if reference.is_file():
        revision = reference.read_text().strip()
        snapshots = [place for place in snapshots if place.name == revision]
    if len(snapshots) == 1:
        return snapshots[0]
    name = cached.name.removeprefix(_CACHED).replace("--", "/", 1)
    raise CheckpointError(
        f"{cached}: has {len(snapshots)} snapshots of the main revision, expected one; give one of its snapshots, or "
        f"download it again: hf download {name}"
    )
