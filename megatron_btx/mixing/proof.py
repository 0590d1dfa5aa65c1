"""Proof of a result: a manifest of hashes beside it, and what was written compared with what the rules give."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_btx.ground.errors import CheckpointError, InputError
from megatron_btx.ground.manifest import FILE_NAME, read_manifest, versions
from megatron_btx.mixing.compatible import vocabulary_source
from megatron_btx.mixing.compute import rows_of
from megatron_btx.mixing.layout import Task
from megatron_btx.mixing.plan import Plan
from megatron_btx.mixing.sinks import Output
from megatron_btx.mixing.sources import EMBEDDING, Source

FORM = 2
"""Version of the manifest's form."""
_STEP_BYTES = 4 << 20
Progress = Callable[[int], None]


_DAMAGED = (KeyError, TypeError, AttributeError, ValueError, OverflowError)


def _nothing(done_bytes: int) -> None:
    pass


# --- the manifest ---------------------------------------------------------------------------------------------


def make_manifest(plan: Plan, output: Output, hashes: Mapping[int, str], folder: Path) -> bytes:
    """The manifest of a written result: for every tensor its operation, sources and hashes; for every file the rest.

    Args:
        hashes: SHA-256 of the numbers of each task, by its place in ``output.tasks``.
        folder: where the result lies, complete but for this manifest.
    """
    blocks: dict[str, list[dict[str, Any]]] = {}
    for number, task in enumerate(output.tasks):
        slot = task.slot
        entry: dict[str, Any] = {
            "offsets": list(task.block.offsets),
            "sizes": list(task.block.sizes),
            "file": slot.file,
        }
        entry |= {"position": slot.position_bytes, "bytes": slot.length_bytes, "sha256": hashes[number]}
        blocks.setdefault(task.block.tensor, []).append(entry)
    request = plan.request
    content: dict[str, Any] = {
        "form": FORM,
        "format": output.format,
        "method": request.method,
        "router": {"init": str(request.router), "seed": request.router.seed, "std": request.router.std},
        "take": dict(request.take),
        "vocabulary_union": request.vocabulary_union,
        "vocabulary": _vocabulary(plan),
        "tokenizer": dict(output.tokenizer),
        "experts": [
            {**source_identity(s), "weight": weight} for s, weight in zip(plan.sources, plan.weights, strict=True)
        ],
        "versions": versions(),
        "tensors": {
            t.name: {
                "operation": "+".join(operations_of(t.blocks)),
                "sources": sources_of(plan, t.blocks),
                "shape": list(t.shape),
                "dtype": str(t.dtype).removeprefix("torch."),
                "sha256": tensor_hash([b["sha256"] for b in blocks[t.name]]),
                "blocks": blocks[t.name],
            }
            for t in output.tensors
        },
    }
    slots = _slots_by_file(content)
    names = sorted([*output.files, *output.small_files])
    content["files"] = {name: _frame(folder / name, slots.get(name, [])) for name in names}
    content["manifest_sha256"] = _own_hash(content)
    return _text(content)


def _vocabulary(plan: Plan) -> dict[str, Any]:
    """Whose tokenizer the result has, and which of its rows are tokens."""
    planned = next(piece for piece in plan.pieces if piece.name == EMBEDDING)
    chosen = vocabulary_source(plan.sources)
    stretches = [list(stretch) for stretch in chosen.token_rows(EMBEDDING)]
    return {
        "tokenizer_of": chosen.name,
        "known": chosen.tokens is not None,
        "token_rows": stretches,
        "rows": planned.shape[0],
        "new_rows": planned.new_rows,
    }


def operations_of(blocks: Sequence[Any]) -> list[str]:
    """The operations that make a tensor, each once."""
    return list(dict.fromkeys(fill.planned.operation.name for block in blocks for fill in block.fills))


def sources_of(plan: Plan, blocks: Sequence[Any]) -> dict[str, list[str]]:
    """For each expert, the tensors of its checkpoint that a tensor is made from."""
    found: dict[str, dict[str, None]] = {}
    for block in blocks:
        for fill in block.fills:
            for part in fill.planned.parts:
                source = plan.sources[part.source]
                found.setdefault(source.name, {})[source.pieces[part.piece].location.key] = None
    return {name: list(keys) for name, keys in found.items()}


def tensor_hash(hashes: Sequence[str]) -> str:
    """The hash of a tensor: its block's, or of its blocks' hashes one after the other where there are several."""
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256(b"".join(bytes.fromhex(h) for h in hashes)).hexdigest()


def source_identity(source: Source) -> dict[str, Any]:
    """What a source was: its place, the hash of what describes it, sizes and times of its files, its own manifest."""
    described = hashlib.sha256()
    for file in source.reader.files():
        if file.stat().st_size < 64 << 20 and file.suffix != ".distcp" and file.suffix != ".safetensors":
            described.update(file.read_bytes())
    identity: dict[str, Any] = {
        "name": source.name,
        "path": str(source.folder.resolve()),
        "index_sha256": described.hexdigest(),
        "files": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in source.reader.files()},
    }
    manifest = _manifest_with_tensors(source.root)
    return identity | ({"manifest_sha256": manifest.get("manifest_sha256")} if manifest else {})


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _own_hash(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _slots_by_file(manifest: Mapping[str, Any]) -> dict[str, list[tuple[int, int, str, str]]]:
    """For each file its stretches of numbers: (position, bytes, hash, tensor), in order."""
    found: dict[str, list[tuple[int, int, str, str]]] = {}
    for name, tensor in manifest["tensors"].items():
        for block in tensor["blocks"]:
            stretch = (int(block["position"]), int(block["bytes"]), str(block["sha256"]), str(name))
            found.setdefault(str(block["file"]), []).append(stretch)
    return {file: sorted(stretches) for file, stretches in found.items()}


def _frame(file: Path, slots: Sequence[tuple[int, int, str, str]]) -> dict[str, Any]:
    """Size of a file, and the hash of all its bytes that are no tensor's numbers."""
    digest, size = hashlib.sha256(), file.stat().st_size
    with file.open("rb") as opened:
        at = 0
        for position, length, _, _ in [*slots, (size, 0, "", "")]:
            opened.seek(at)
            while at < position and (piece := opened.read(min(position - at, _STEP_BYTES))):
                digest.update(piece)
                at += len(piece)
            at = max(at, position + length)
    return {"bytes": size, "frame_sha256": digest.hexdigest()}


# --- checking -------------------------------------------------------------------------------------------------


def _manifest_with_tensors(folder: Path) -> dict[str, Any] | None:
    """The manifest of a result, even one that is damaged; None for none, or one without places and a hash of itself."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        raise
    except InputError as error:
        raise CheckpointError(f"{folder / FILE_NAME}: is damaged ({error})") from error
    return manifest if manifest and (manifest.get("form") == FORM or "manifest_sha256" in manifest) else None


def carries_manifest(root: Path, folder: Path) -> bool:
    """Whether a folder has a manifest that :func:`check_manifest` can check: of what is read from ``folder`` in it.

    Training that goes on in the folder of a result adds iterations of its own, which no manifest describes.
    """
    manifest = _manifest_with_tensors(root)
    if manifest is None:
        return False
    name, files = str(folder.relative_to(root)), manifest.get("files")
    honest = isinstance(files, dict) and _own_hash(manifest) == manifest.get("manifest_sha256")
    return not honest or name == "." or any(file.startswith(f"{name}/") for file in manifest["files"])


def manifest_bytes(folder: Path) -> int:
    """How many bytes :func:`check_manifest` reads."""
    manifest = _manifest_with_tensors(folder)
    try:
        return sum(int(entry["bytes"]) for entry in manifest["files"].values()) if manifest else 0
    except _DAMAGED as error:
        raise CheckpointError(f"{folder / FILE_NAME}: is damaged ({error!r}); make the result again") from error


def check_manifest(folder: Path, progress: Progress = _nothing) -> int:
    """Compare every byte of a result with its manifest; returns the number of tensors.

    Raises:
        CheckpointError: no manifest, or names the tensor or file that differs.
    """
    remedy = "make it again"
    manifest = _manifest_with_tensors(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; give that of a result")
    if manifest is None:
        raise CheckpointError(f"{folder}: has no {FILE_NAME} with hashes of its tensors, so it cannot be checked")
    try:
        if _own_hash(manifest) != manifest["manifest_sha256"]:
            raise CheckpointError(f"{folder / FILE_NAME}: was changed after it was written; {remedy}")
        _refuse_additional(folder, {FILE_NAME, *manifest["files"]})
        slots = _slots_by_file(manifest)
        for name, entry in manifest["files"].items():
            file = folder / name
            if not file.is_file():
                raise CheckpointError(f"{file}: is named in {FILE_NAME} and does not exist; {remedy}")
            if file.stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{file}: {file.stat().st_size} bytes, {entry['bytes']} were written; {remedy}")
            if _frame(file, slots.get(name, [])) != entry:
                raise CheckpointError(f"{file}: differs from what was written, outside of its tensors; {remedy}")
            _check_stretches(file, slots.get(name, []), remedy, progress)
        return len(manifest["tensors"])
    except _DAMAGED as error:
        raise CheckpointError(f"{folder / FILE_NAME}: is damaged ({error!r}); {remedy}") from error


def _refuse_additional(folder: Path, named: set[str]) -> None:
    """Refuse files that were not written: one more can change what is read (an index, a tokenizer, a common.pt)."""
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if name not in named and (file.is_symlink() or not file.is_dir()):
            raise CheckpointError(f"{file}: was not written with the rest, {FILE_NAME} does not name it; move it away")


def _check_stretches(
    file: Path, stretches: Sequence[tuple[int, int, str, str]], remedy: str, progress: Progress
) -> None:
    with file.open("rb") as opened:
        for position, length, expected, name in stretches:
            digest, left = hashlib.sha256(), length
            opened.seek(position)
            while left and (piece := opened.read(min(left, _STEP_BYTES))):
                digest.update(piece)
                left -= len(piece)
                progress(len(piece))
            if digest.hexdigest() != expected:
                raise CheckpointError(f"{file}: {name}: differs from what was written; {remedy}")


def check_against_sources(plan: Plan, output: Output, folder: Path) -> Callable[[Task, Progress], None]:
    """Open a written result; returns the check of one task: all its numbers against what the rules give.

    Raises:
        CheckpointError: from here: the result has other tensors than planned; from the check: names what differs.
    """
    import torch

    reader = output.reader(folder)
    planned = {tensor.name for tensor in output.tensors}
    if planned != set(reader.tensors):
        odd = sorted(planned ^ set(reader.tensors))[0]
        raise CheckpointError(f"{folder}: {odd}: planned and stored tensors differ; convert again")

    def check(task: Task, progress: Progress) -> None:
        block = task.block
        # The fills follow each other along the first axis after the leading ones.
        axis = len(block.sizes) - len(block.fills[0].planned.shape)
        row = block.offsets[axis]
        for fill in block.fills:
            for rows in rows_of(plan, fill.planned, fill.start, fill.stop):
                offsets = (*block.offsets[:axis], row, *block.offsets[axis + 1 :])
                sizes = (*block.sizes[:axis], rows.shape[0], *block.sizes[axis + 1 :])
                found = reader.read(block.tensor, offsets, sizes)
                if not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (found, rows))):
                    raise CheckpointError(
                        f"{folder}: {block.tensor} at {list(offsets)} differs from its sources; convert again"
                    )
                row += rows.shape[0]
                progress(rows.numel() * rows.element_size())

    return check
