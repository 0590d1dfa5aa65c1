"""The manifest of a result: of every tensor its operation, origin and hash, of every file the hash of the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_btx.common.manifest import read_manifest, versions
from megatron_btx.mixing.compatible import vocabulary_source
from megatron_btx.mixing.layout import LaidOutTensor
from megatron_btx.mixing.loader import EMBEDDING, Source
from megatron_btx.mixing.plan import Plan
from megatron_btx.mixing.writers import Output

FORM = 2
"""Version of the manifest's form."""
Progress = Callable[[int], None]
"""Called with the bytes done since the last call."""
_STEP_BYTES = 4 << 20
"""Files are read this many bytes at a time."""


class Stretch(NamedTuple):
    """Numbers of a tensor in a file."""

    position: int
    length: int
    """Bytes."""
    sha256: str
    tensor: str
    """Its name."""


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
            "position": slot.position_bytes,
            "bytes": slot.length_bytes,
            "sha256": hashes[number],
        }
        blocks.setdefault(task.block.tensor, []).append(entry)
    experts = []
    for source, weight in zip(plan.mixed, plan.weights, strict=True):
        experts.append({**source_identity(source), "weight": weight})
    tensors = {tensor.name: _tensor_entry(plan, tensor, blocks[tensor.name]) for tensor in output.tensors}
    request = plan.request
    chosen = vocabulary_source(plan.mixed, request)
    embedding = next(piece for piece in plan.pieces if piece.name == EMBEDDING)
    content: dict[str, Any] = {
        "form": FORM,
        "format": output.format,
        "method": request.method,
        "router": {"init": request.router.how, "seed": request.router.seed, "std": request.router.std},
        "take": dict(request.take),
        "vocabulary_union": request.vocabulary == "union",
        "vocabulary": {
            "tokenizer_of": chosen.name,
            "known": chosen.tokenizer.tokens is not None,
            "token_rows": [list(stretch) for stretch in chosen.token_rows(EMBEDDING)],
            "rows": embedding.shape[0],
            "new_rows": embedding.new_rows,
        },
        "tokenizer": dict(output.tokenizer),
        "experts": experts,
        "versions": versions(),
        "tensors": tensors,
    }
    if request.own:
        content["options"] = dict(request.own)
    if plan.base is not None:
        content["base"] = source_identity(plan.base)
    stretches = stretches_by_file(content)
    content["files"] = {}
    for name in sorted([*output.files, *output.small_files]):
        content["files"][name] = describe_frame(folder / name, stretches.get(name, []))
    content["manifest_sha256"] = own_hash(content)
    return (json.dumps(content, indent=1) + "\n").encode()


def _tensor_entry(plan: Plan, tensor: LaidOutTensor, blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    operations: dict[str, None] = {}
    sources: dict[str, dict[str, None]] = {}
    for block in tensor.blocks:
        for fill in block.fills:
            operations[fill.planned.operation.name] = None
            for part in fill.planned.parts:
                sources.setdefault(plan.sources[part.source].name, {})[plan.held(part).location.key] = None
    digest = blocks[0]["sha256"]
    if len(blocks) > 1:
        digest = hashlib.sha256(b"".join(bytes.fromhex(block["sha256"]) for block in blocks)).hexdigest()
    return {
        "operation": "+".join(operations),
        "sources": {name: list(keys) for name, keys in sources.items()},
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": digest,
        "blocks": list(blocks),
    }


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
    manifest = read_result_manifest(source.root)
    if manifest:
        identity["manifest_sha256"] = manifest.get("manifest_sha256")
    return identity


def own_hash(content: Mapping[str, Any]) -> str:
    """The hash of all that a manifest says but its hash."""
    rest = dict(content)
    rest.pop("manifest_sha256", None)
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def stretches_by_file(manifest: Mapping[str, Any]) -> dict[str, list[Stretch]]:
    """For each file its stretches of numbers, in order."""
    found: dict[str, list[Stretch]] = {}
    for name, tensor in manifest["tensors"].items():
        for block in tensor["blocks"]:
            stretch = Stretch(int(block["position"]), int(block["bytes"]), str(block["sha256"]), str(name))
            found.setdefault(str(block["file"]), []).append(stretch)
    return {file: sorted(stretches) for file, stretches in found.items()}


def hash_stretch(file: Path, position: int, length: int, progress: Progress = lambda done_bytes: None) -> str:
    """SHA-256 of a stretch of a file, as hexadecimal digits; of what is there, where the file is shorter."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        opened.seek(position)
        while length > 0 and (piece := opened.read(min(length, _STEP_BYTES))):
            digest.update(piece)
            length -= len(piece)
            progress(len(piece))
    return digest.hexdigest()


def describe_frame(file: Path, stretches: Sequence[Stretch]) -> dict[str, Any]:
    """Size of a file, and the hash of all its bytes that are no tensor's numbers."""
    digest, size = hashlib.sha256(), file.stat().st_size
    with file.open("rb") as opened:
        at = 0
        for stretch in [*stretches, Stretch(size, 0, "", "")]:
            opened.seek(at)
            while at < stretch.position and (piece := opened.read(min(stretch.position - at, _STEP_BYTES))):
                digest.update(piece)
                at += len(piece)
            at = max(at, stretch.position + stretch.length)
    return {"bytes": size, "frame_sha256": digest.hexdigest()}


def read_result_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a result, even one that is damaged; None for none, or one without places and a hash of itself."""
    manifest = read_manifest(folder)
    if manifest and (manifest.get("form") == FORM or "manifest_sha256" in manifest):
        return manifest
    return None
