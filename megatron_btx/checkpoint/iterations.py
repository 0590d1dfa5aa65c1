"""Megatron's checkpoint folders: the one that a path stands for, and a refusal of the formats that are not read."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_btx.common.errors import CheckpointError
from megatron_btx.common.files import read_json_object

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
BACKEND_FILE = "metadata.json"
"""Megatron writes it last: a folder without it is not whole (``core/dist_checkpointing/serialization.py``, save)."""
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is (or claims to be) a Megatron checkpoint: a root, or one iteration."""
    return any((path / mark).exists() for mark in (TRACKER, BACKEND_FILE, ".metadata"))


def resolve_iteration(path: str | Path) -> Path:
    """The folder of one iteration, from a checkpoint root (its latest) or from the folder itself.

    Raises:
        CheckpointError: nothing there, no tracker, a dangling tracker, or a format that is not torch_dist.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a checkpoint's root or one of its iter_ folders")
    folder = path
    if not any((path / name).is_file() for name in (BACKEND_FILE, ".metadata")) and not any(path.glob("mp_rank_*")):
        folder = _find_latest(path)
    legacy = sorted(folder.glob("mp_rank_*"))
    if legacy:
        raise CheckpointError(
            f"{folder}: holds {legacy[0].name}, so it is of Megatron's old format 'torch', which is pickled and not "
            "read; convert it with Megatron's tools/checkpoint, or load and save it with --ckpt-format torch "
            "--ckpt-convert-format torch_dist --ckpt-convert-save FOLDER"
        )
    remedy = "load it with the Megatron that wrote it and save it with --ckpt-format torch_dist"
    backend_file = folder / BACKEND_FILE
    if not backend_file.is_file():
        raise CheckpointError(
            f"{folder}: has no metadata.json, so it is not a torch_dist checkpoint, perhaps one of the formats "
            f"'fsdp_dtensor' and 'torch_dcp'; {remedy}"
        )
    backend = read_json_object(backend_file, "the checkpoint is damaged", CheckpointError).get("sharded_backend")
    if backend != BACKEND["sharded_backend"]:
        raise CheckpointError(f"{backend_file}: format {backend!r}, expected 'torch_dist'; {remedy}")
    return folder


def read_tracker(root: Path) -> int | str | None:
    """The step that a root's tracker names, or :data:`RELEASE`; None when it holds neither, as after a crash."""
    text = (root / TRACKER).read_bytes()[:40].decode(errors="replace").strip()
    if text == RELEASE:
        return RELEASE
    if re.fullmatch(r"[0-9]{1,18}", text):
        return int(text)
    return None


def list_iterations(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything in a root that has the name of an iteration, whole or not, by step."""
    found = []
    for folder in root.glob("iter_*"):
        number = folder.name.removeprefix("iter_")
        if re.fullmatch(r"[0-9]{7,18}", number) and folder.is_dir():
            found.append((int(number), folder))
    return sorted(found)


def root_of(folder: Path) -> Path:
    """The root of a checkpoint, of which ``folder`` is the root itself or one iteration."""
    if (folder.parent / TRACKER).is_file():
        return folder.parent
    return folder


def _find_latest(root: Path) -> Path:
    tracker = root / TRACKER
    if not tracker.is_file():
        raise CheckpointError(
            f"{root}: has neither {TRACKER} nor metadata.json; give a checkpoint's root or one of its iter_ folders"
        )
    latest = read_tracker(root)
    if latest is None:
        held = tracker.read_bytes()[:40].decode(errors="replace").strip()
        raise CheckpointError(
            f"{tracker}: holds {held!r}, expected an iteration number or 'release'; give one of its iter_ folders"
        )
    folder = root / (RELEASE if latest == RELEASE else f"iter_{latest:07d}")
    if not folder.is_dir():
        raise CheckpointError(f"{tracker}: names {folder.name}, which does not exist beside it; give an iter_ folder")
    return folder
